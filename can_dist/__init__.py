"""CAN-Dist: make a language model safer by a stated amount in one fine-tuning run.

    from can_dist import Run, load_config, mocan, run_pipeline, solve_dual

The names load on first use, so that ``import can_dist`` is quick and the solver alone needs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from can_dist.algorithms.caid import caid as caid
    from can_dist.algorithms.cdpo import cdpo as cdpo
    from can_dist.algorithms.dpo import dpo as dpo
    from can_dist.algorithms.mocan import mocan as mocan
    from can_dist.algorithms.p_sacpo import p_sacpo as p_sacpo
    from can_dist.algorithms.pecan import pecan as pecan
    from can_dist.algorithms.primal_dual import primal_dual as primal_dual
    from can_dist.algorithms.sacpo import sacpo as sacpo
    from can_dist.algorithms.safedpo import safedpo as safedpo
    from can_dist.config import Beaver as Beaver
    from can_dist.config import Guard as Guard
    from can_dist.config import HttpScorer as HttpScorer
    from can_dist.config import LogRatio as LogRatio
    from can_dist.config import MultiHead as MultiHead
    from can_dist.config import PythonCallable as PythonCallable
    from can_dist.config import SequenceClassifier as SequenceClassifier
    from can_dist.config import load_config as load_config
    from can_dist.config.sections import Constraint as Constraint
    from can_dist.dual import DualSolution as DualSolution
    from can_dist.dual import Margin as Margin
    from can_dist.dual import solve_dual as solve_dual
    from can_dist.outcomes.constrained_reward import constrained_reward as constrained_reward
    from can_dist.pipeline import run_pipeline as run_pipeline
    from can_dist.reporting.frontier import frontier as frontier
    from can_dist.run import Run as Run
    from can_dist.scoring.protocol import Scorer as Scorer

_ALGORITHMS = ("caid", "cdpo", "dpo", "mocan", "p_sacpo", "pecan", "primal_dual", "sacpo", "safedpo")
_CONFIG = ("Beaver", "Constraint", "Guard", "HttpScorer", "LogRatio", "MultiHead", "PythonCallable")
_HOMES = {
    **{name: f"can_dist.algorithms.{name}" for name in _ALGORITHMS},
    **dict.fromkeys((*_CONFIG, "SequenceClassifier", "load_config"), "can_dist.config"),
    **dict.fromkeys(("DualSolution", "Margin", "solve_dual"), "can_dist.dual"),
    "Run": "can_dist.run",
    "run_pipeline": "can_dist.pipeline",
    "constrained_reward": "can_dist.outcomes.constrained_reward",
    "Scorer": "can_dist.scoring.protocol",
    "frontier": "can_dist.reporting.frontier",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'can_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
