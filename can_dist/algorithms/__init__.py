"""The methods, one file each, close to their papers; ``RUN`` calls each with the values of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from can_dist.algorithms.caid import caid
from can_dist.algorithms.cdpo import cdpo
from can_dist.algorithms.dpo import dpo
from can_dist.algorithms.mocan import mocan
from can_dist.algorithms.p_sacpo import p_sacpo
from can_dist.algorithms.pecan import pecan
from can_dist.algorithms.primal_dual import primal_dual
from can_dist.algorithms.sacpo import sacpo
from can_dist.algorithms.safedpo import safedpo
from can_dist.config import METHODS, Config
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact


def _base(config: Config, prompts: Artifact) -> dict[str, Any]:
    return {"prompts": prompts, "reference": config.reference, "beta": config.beta}


def _scored(config: Config, prompts: Artifact) -> dict[str, Any]:
    return {**_base(config, prompts), "reward": config.reward, "constraints": config.constraints}


RUN: dict[str, Callable[[Run, Config, Artifact], dict[str, Artifact]]] = {
    "mocan": lambda run, config, prompts: {"": mocan(run, **_scored(config, prompts))},
    "pecan": lambda run, config, prompts: {"": pecan(run, **_scored(config, prompts))},
    "dpo_h": lambda run, config, prompts: {"": dpo(run, **_base(config, prompts), criterion="helpful")},
    "dpo_s": lambda run, config, prompts: {"": dpo(run, **_base(config, prompts), criterion="safe")},
    "safedpo": lambda run, config, prompts: {
        "": safedpo(run, **_base(config, prompts), constraints=config.constraints, options=config.safedpo)
    },
    "sacpo": lambda run, config, prompts: {"": sacpo(run, **_scored(config, prompts), options=config.sacpo)},
    "p_sacpo": lambda run, config, prompts: {
        f"q={q:g}": policy
        for q, policy in p_sacpo(run, **_scored(config, prompts), options=config.sacpo, mixture=config.p_sacpo).items()
    },
    "cdpo": lambda run, config, prompts: {"": cdpo(run, **_scored(config, prompts), options=config.cdpo)},
    "caid": lambda run, config, prompts: {"": caid(run, **_scored(config, prompts), options=config.caid)},
    "primal_dual": lambda run, config, prompts: {
        "": primal_dual(run, **_scored(config, prompts), options=config.primal_dual)
    },
}
"""Every method's function: from an open run, a configuration and the prompts to its policies by name."""

assert tuple(RUN) == tuple(METHODS), "every method has a row in can_dist.config.methods and a function here"
