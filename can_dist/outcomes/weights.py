"""λ* for people who train elsewhere: reward weights, β, and the switches under which they mean what the dual says.

The dual's policy maximises E[r + ⟨λ*, g⟩] − β KL(π‖π_ref), with KL of whole responses. An online trainer does so when
the weighted scores are added up as they are (none of them standardised, no advantage divided by a deviation: arXiv
2602.05863), and when β times the log-ratio of the whole response is taken off the reward. All three tools have
leave-one-out baselines (RLOO), which do both.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from can_dist.config import load_config
from can_dist.config.sections import Generate
from can_dist.config.yaml_files import format_yaml
from can_dist.errors import EnvironmentProblem
from can_dist.outcomes.constrained_reward import run_solution, weights_of
from can_dist.outcomes.estimate import CONFIG
from can_dist.outcomes.export import check_new
from can_dist.tables.artifacts import Artifact, atomic_directory, write_json

WEIGHTS, FUNCTIONS = "weights.json", "reward_func.py"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What switches are made of: the folder of the export, the weights, β, and how the run sampled."""

    out: Path
    weights: Mapping[str, float]
    beta: float
    sampling: Generate


@dataclass(frozen=True)
class Tool:
    """A trainer of other people's: its package, the files of it that know the switches, and its own files' texts.

    Attributes:
        package: the name it is imported by.
        sources: patterns of files in the package, of which the switches are configuration.
        switches: the value of each switch.
        write: from the switches to the texts of the files that it reads, by name.
        functions: the lines of ``reward_func.py``, from the weights.
    """

    package: str
    sources: tuple[str, ...]
    switches: Callable[[Given], Settings]
    write: Callable[[Settings], dict[str, str]]
    functions: Callable[[Mapping[str, float]], list[str]]


def export_weights(path: Path, out: Path, *, tool: str) -> tuple[dict[str, float], float]:
    """Write λ* of a run for another trainer into the new directory ``out``; return the weights and β.

    ``weights.json`` holds the weights and where they are from, ``reward_func.py`` the scorers of the run as functions
    that the tool calls, and the tool's own file what else has to be set.

    Args:
        path: A run with one dual's solution, or an artifact of the stage ``solve``.
        out: The new directory.
        tool: A key of ``TOOLS``.

    Raises:
        ConfigError: ``out`` exists or cannot be made.
        DataError: The run has no dual's solution, or several.
        EnvironmentProblem: The tool is installed here in a version that lacks a switch.
    """
    check_new(out)
    solution = run_solution(path)
    row, weights = TOOLS[tool], weights_of(solution)
    config = load_config(solution.path.parent / CONFIG)
    beta = float(solution.manifest["identity"]["beta"])
    switches = row.switches(Given(out.absolute(), weights, beta, config.generate))
    check_installed(row, switches)
    with atomic_directory(out) as built:
        write_json(built / WEIGHTS, {"weights": weights, "beta": beta, "tool": tool, **_origin(solution)})
        texts = row.write(switches) | {FUNCTIONS: _functions(row, solution, weights)}
        for name, text in texts.items():
            (built / name).write_text(text, encoding="utf-8")
    return weights, beta


def check_installed(tool: Tool, switches: Settings) -> None:
    """Raise ``EnvironmentProblem`` where the tool is installed here and its sources do not name a switch."""
    spec = importlib.util.find_spec(tool.package)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    text = "\n".join(p.read_text(encoding="utf-8") for pattern in tool.sources for p in sorted(root.glob(pattern)))
    names = [name.lstrip("-").rpartition(".")[2] for name in switches]
    if missing := sorted({name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)}):
        raise EnvironmentProblem(
            f"{tool.package}, in {root}, has no switch {', '.join(missing)}; without it the weights do not mean what "
            "the dual says.",
            f"Install a newer {tool.package}, or export where it is not installed and set the switches by hand.",
        )


def _origin(solution: Artifact) -> dict[str, str]:
    return {"solution": solution.path.name, "manifest_sha256": solution.digest}


def _functions(tool: Tool, solution: Artifact, weights: Mapping[str, float]) -> str:
    head = [
        '"""The scorers of a CAN-Dist run as reward functions; written by can-dist export weights."""',
        "",
        "from can_dist import constrained_reward",
        "",
        f"REWARD = constrained_reward({json.dumps(str(solution.path.absolute()), ensure_ascii=False)})",
    ]
    return "\n".join([*head, *tool.functions(weights)]) + "\n"


def _function_name(score: str) -> str:
    return "score_" + re.sub(r"\W", "_", score)


# -------------------------------------------------------------------------------------------------- one tool at a time


def _trl_switches(given: Given) -> Settings:
    return {
        "reward_weights": list(given.weights.values()),
        "beta": given.beta,
        "normalize_advantages": False,
        "temperature": given.sampling.temperature,
        "top_p": given.sampling.top_p,
        "max_completion_length": given.sampling.max_new_tokens,
        "reward_funcs": [f"{Path(FUNCTIONS).stem}.{_function_name(name)}" for name in given.weights],
    }


def _openrlhf_switches(given: Given) -> Settings:
    return {
        "--remote_rm_url": given.out / FUNCTIONS,
        "--advantage_estimator": "rloo",
        "--init_kl_coef": given.beta,
        "--kl_estimator": "k1",
        "--reward_clip_range": "-1000000 1000000",  # its default cuts at 10
        "--gamma": 1.0,
        "--temperature": given.sampling.temperature,
        "--top_p": given.sampling.top_p,
        "--generate_max_len": given.sampling.max_new_tokens,
    }


def _verl_switches(given: Given) -> Settings:
    return {
        "custom_reward_function.path": given.out / FUNCTIONS,
        "custom_reward_function.name": "compute_score",
        "algorithm.adv_estimator": "rloo",
        "algorithm.norm_adv_by_std_in_grpo": False,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_ctrl.kl_coef": given.beta,
        "algorithm.gamma": 1.0,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.rollout.temperature": given.sampling.temperature,
        "actor_rollout_ref.rollout.top_p": given.sampling.top_p,
        "data.max_response_length": given.sampling.max_new_tokens,
    }


def _lines(joint: str) -> Callable[[Settings], str]:
    return lambda switches: "".join(f"{name}{joint}{value}\n" for name, value in switches.items())


TOOLS: dict[str, Tool] = {
    "trl": Tool(
        "trl",
        ("trainer/rloo_config.py", "scripts/rloo.py"),
        _trl_switches,
        lambda switches: {"rloo.yaml": format_yaml(dict(switches))},
        lambda weights: [f"{_function_name(name)} = REWARD.part({name!r})" for name in weights],
    ),
    "openrlhf": Tool(
        "openrlhf",
        ("cli/train_ppo_ray.py",),
        _openrlhf_switches,
        lambda switches: {"flags.txt": _lines(" ")(switches)},
        lambda _: ["reward_func = REWARD.openrlhf"],
    ),
    "verl": Tool(
        "verl",
        ("trainer/config/**/*.yaml", "trainer/config/*.py"),
        _verl_switches,
        lambda switches: {"overrides.txt": _lines("=")(switches)},
        lambda _: ["compute_score = REWARD.verl"],
    ),
}
"""The trainers that λ* is written for, by the name of ``--for``."""
