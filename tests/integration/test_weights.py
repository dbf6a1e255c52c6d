"""λ* in the hands of the real TRL: the file parsed by its own parser, and one step of its trainers on a tiny model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scorers
from datasets import Dataset
from solved_run import PROMPTS, solved_run

from can_dist import constrained_reward
from can_dist.outcomes.weights import export_weights

CALM = {"constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.2}}}
GROUP = 4


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["RLOO", "GRPO"])
def test_one_step_of_trl_has_the_combined_reward(tmp_path: Path, monkeypatch: Any, trainer: str) -> None:
    trl = pytest.importorskip("trl")
    run, solution, config = solved_run(tmp_path, **CALM)
    weights, beta = export_weights(run, tmp_path / "out", tool="trl")
    parser = trl.TrlParser((trl.RLOOConfig, importlib.import_module("trl.scripts.rloo").RLOOScriptArguments))
    common = ["--output_dir", str(tmp_path / "trl"), "--report_to", "none", "--use_cpu", "--bf16", "False"]
    monkeypatch.syspath_prepend(tmp_path / "out")
    args, script = parser.parse_args_and_config(["--config", str(tmp_path / "out" / "rloo.yaml"), *common])
    assert (args.reward_weights, args.beta) == (list(weights.values()), beta)
    assert (args.normalize_advantages, args.reward_clip_range) == (False, None)
    names = [name.rpartition(".")[2] for name in script.reward_funcs]
    import reward_func

    said: list[str] = []

    def heard(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
        said.extend(completions)
        return getattr(reward_func, names[0])(prompts, completions, **rest)

    options = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1,
               "per_device_train_batch_size": 3 * GROUP, "num_generations": GROUP, "max_completion_length": 6,
               "logging_steps": 1, "beta": args.beta, "reward_weights": args.reward_weights}  # fmt: skip
    own = {"RLOO": {"normalize_advantages": args.normalize_advantages}, "GRPO": {"scale_rewards": "none"}}[trainer]
    made = getattr(trl, f"{trainer}Trainer")(
        model=config.reference.model,
        args=getattr(trl, f"{trainer}Config")(**options, **own),
        reward_funcs=[heard, *(getattr(reward_func, name) for name in names[1:])],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    made.train()
    lam = solution.read_json("solution.json")["lam"]["calm"]
    combined = np.array(scorers.num_words([], said)) + lam * np.array(scorers.num_calm([], said))
    assert len(said) == 3 * GROUP
    assert combined.std() > 0.1
    np.testing.assert_allclose(constrained_reward(run)(PROMPTS * GROUP, said), combined, rtol=1e-12)
    logged = next(line for line in made.state.log_history if "reward" in line)
    assert logged["reward"] == pytest.approx(combined.mean(), abs=1e-6)
    group = combined.reshape(-1, GROUP)
    left_out = {
        "RLOO": (group.sum(axis=1, keepdims=True) - group) / (GROUP - 1),
        "GRPO": group.mean(axis=1, keepdims=True),
    }
    advantages = np.array(list(made._logs["advantages"])[: len(said)])
    np.testing.assert_allclose(advantages, (group - left_out[trainer]).ravel(), atol=1e-6)
    print(f"{trainer}: reward {logged['reward']:.7f}, by hand {combined.mean():.7f}")
