"""λ* for other trainers: the weights, the reward function, and each tool's file, parsed as the tool parses it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import scorers
import torch
import yaml
from click.testing import CliRunner, Result
from solved_run import solved_run

from can_dist import constrained_reward
from can_dist.cli import cli
from can_dist.config import dump_yaml
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.outcomes import weights as module
from can_dist.outcomes.weights import export_weights

CALM = {"constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.2}}}
TEXTS = ["w1 w5 w9", "w9", "w1 w1 w2 w5"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    run, solution, _ = solved_run(tmp_path_factory.mktemp("weights"), **CALM)
    return run, solution.read_json("solution.json")["lam"]


@pytest.fixture(autouse=True)
def no_tool_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files with and without the tools; what is asked of an installed one has tests of its own."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


def expected(lam: float, texts: list[str]) -> list[float]:
    words, calm = scorers.num_words([], texts), scorers.num_calm([], texts)
    return [r + lam * g for r, g in zip(words, calm, strict=True)]


def can_dist(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------------------- reward function


def test_reward_is_r_plus_lambda_g_in_the_signature_of_trl(solved: tuple[Path, dict[str, float]]) -> None:
    run, lam = solved
    assert lam["calm"] > 0.1, "the constraint must bind"
    reward = constrained_reward(run)
    assert reward(prompts=["p"] * 3, completions=TEXTS, trainer_state=None) == pytest.approx(
        expected(lam["calm"], TEXTS), rel=1e-12
    )
    talks = [[{"role": "assistant", "content": text}] for text in TEXTS]
    asked = [[{"role": "user", "content": "p"}]] * 3
    assert reward(prompts=asked, completions=talks) == reward(prompts=["p"] * 3, completions=TEXTS)
    assert reward.part("calm")(prompts=["p"] * 3, completions=TEXTS) == scorers.num_calm([], TEXTS)
    assert (reward.__name__, reward.part("calm").__name__) == ("constrained_reward", "calm")


def test_reward_in_the_signature_of_openrlhf(solved: tuple[Path, dict[str, float]]) -> None:
    run, lam = solved
    reward, prompts = constrained_reward(run), ["w0 w6 ", "<s>w1 w7 ", "w2"]
    end = constrained_reward(run)._end_tokens[0]
    queries = [prompt + text + end for prompt, text in zip(prompts, TEXTS, strict=True)]
    labels = [None, json.dumps([{"role": "user", "content": "w1 w7"}]), ""]
    made = reward.openrlhf(queries, prompts, labels)
    assert made["rewards"].tolist() == pytest.approx(expected(lam["calm"], TEXTS), rel=1e-12)
    torch.testing.assert_close(made["scores"], made["rewards"])
    assert made["extra_logs"]["calm"].tolist() == scorers.num_calm([], TEXTS)
    with pytest.raises(DataError, match=r"query 0: 'w5 w1' does not begin with its prompt 'w0'"):
        reward.openrlhf(["w5 w1"], ["w0"], [None])
    with pytest.raises(DataError, match=r"label 'forty-two': expected a conversation as JSON"):
        reward.openrlhf(["w0 w1"], ["w0"], ["forty-two"])


def test_reward_in_the_signature_of_verl(solved: tuple[Path, dict[str, float]]) -> None:
    run, lam = solved
    reward, messages = constrained_reward(run), [{"role": "user", "content": "w0 w6"}]
    given = {"data_source": "mine", "solution_str": TEXTS[2], "ground_truth": None}
    assert reward.verl(**given, extra_info={"messages": messages}) == pytest.approx(expected(lam["calm"], TEXTS)[2])
    with pytest.raises(DataError, match=r"extra_info has no key 'messages' \(found split\)"):
        reward.verl(**given, extra_info={"split": "train"})


def test_the_conversation_reaches_the_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = solved_run(tmp_path, **CALM)
    seen: list[Any] = []
    reward = constrained_reward(run)
    reward._opened["reward"] = lambda responses: torch.tensor(
        [seen.append(r.messages) or 0.0 for r in responses]
    ).numpy()
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    reward.part("reward")([messages, "plain"], ["w2", "w3"])
    assert seen == [messages, [{"role": "user", "content": "plain"}]]


# ------------------------------------------------------------------------------------------------------ tools' files


def functions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import ``reward_func.py`` as a tool does."""
    spec = importlib.machinery.SourceFileLoader("reward_func", str(folder / "reward_func.py"))
    made = type(sys)("reward_func")
    spec.exec_module(made)
    return made


def test_trl_gets_weights_beta_and_no_standardisation(
    solved: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lam = solved
    done = can_dist("export", "weights", run, "--for", "trl", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"weights reward 1, calm {lam['calm']:.6g}; β 0.5" in done.stderr
    config = yaml.safe_load((tmp_path / "out" / "rloo.yaml").read_text())
    assert config["reward_weights"] == [1.0, lam["calm"]]
    assert (config["beta"], config["normalize_advantages"], config["temperature"]) == (0.5, False, 1.0)
    assert config["reward_funcs"] == ["reward_func.score_reward", "reward_func.score_calm"]
    made = functions(tmp_path / "out", monkeypatch)
    assert made.score_calm(["p"] * 3, TEXTS) == scorers.num_calm([], TEXTS)
    record = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert record["weights"] == {"reward": 1.0, "calm": lam["calm"]}
    assert record["solution"].startswith("solve-")


def test_openrlhf_gets_flags(
    solved: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lam = solved
    export_weights(run, tmp_path / "out", tool="openrlhf")
    # names, types and choices as openrlhf/cli/train_ppo_ray.py declares them
    parser = argparse.ArgumentParser()
    for name in ("--init_kl_coef", "--gamma", "--temperature", "--top_p"):
        parser.add_argument(name, type=float)
    parser.add_argument("--reward_clip_range", type=float, nargs=2)
    parser.add_argument("--remote_rm_url", type=str)
    parser.add_argument("--generate_max_len", type=int)
    parser.add_argument("--kl_estimator", choices=["k1", "k2", "k3"])
    parser.add_argument("--advantage_estimator", choices=["gae", "reinforce", "rloo", "reinforce_baseline", "dr_grpo"])
    flags = parser.parse_args((tmp_path / "out" / "flags.txt").read_text().split())
    assert (flags.init_kl_coef, flags.kl_estimator, flags.advantage_estimator) == (0.5, "k1", "rloo")
    assert flags.reward_clip_range == [-1e6, 1e6]
    assert flags.remote_rm_url == str(tmp_path / "out" / "reward_func.py")
    made = functions(tmp_path / "out", monkeypatch).reward_func(queries=TEXTS, prompts=[""] * 3, labels=[None] * 3)
    assert made["rewards"].tolist() == pytest.approx(expected(lam["calm"], TEXTS))


def test_verl_gets_overrides(
    solved: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lam = solved
    export_weights(run, tmp_path / "out", tool="verl")
    pairs = [line.split("=", 1) for line in (tmp_path / "out" / "overrides.txt").read_text().splitlines()]
    found = {name: yaml.safe_load(value) for name, value in pairs}
    assert found["algorithm.kl_ctrl.kl_coef"] == 0.5
    assert (found["algorithm.adv_estimator"], found["algorithm.use_kl_in_reward"]) == ("rloo", True)
    assert (found["algorithm.kl_ctrl.type"], found["algorithm.kl_penalty"]) == ("fixed", "kl")
    assert (found["actor_rollout_ref.actor.use_kl_loss"], found["algorithm.norm_adv_by_std_in_grpo"]) == (False, False)
    compute = getattr(functions(tmp_path / "out", monkeypatch), found["custom_reward_function.name"])
    made = compute(data_source="x", solution_str=TEXTS[0], ground_truth="", extra_info={"messages": []})
    assert made == pytest.approx(expected(lam["calm"], TEXTS)[0])


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_run_without_a_dual_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = can_dist("export", "weights", tmp_path / "run", "--for", "trl", "--out", tmp_path / "out")
    assert isinstance(done.exception, DataError)
    assert "has no dual's solution (solve-...), so there is no λ* and no weight to give." in str(done.exception)
    assert (done.exception.exit_code, (tmp_path / "out").exists()) == (3, False)


def test_several_solutions_are_told_apart_by_their_path(tmp_path: Path) -> None:
    run, first, _ = solved_run(tmp_path, **CALM)
    config = {**CALM["constraints"]["calm"], "margin": 0.1}
    solved_run(tmp_path, constraints={"calm": config})
    with pytest.raises(DataError, match=r"expected one dual's solution, found solve-\w+, solve-\w+\. Give the path"):
        export_weights(run, tmp_path / "out", tool="trl")
    made, _ = export_weights(first.path, tmp_path / "out", tool="trl")
    assert made["calm"] == first.read_json("solution.json")["lam"]["calm"]


def test_other_scorers_than_those_of_the_dual_are_refused(tmp_path: Path) -> None:
    run, _, config = solved_run(tmp_path, **CALM)
    other = config.reward.model_copy(update={"function": "scorers:constant"})
    (run / "config.yaml").write_text(dump_yaml(config.model_copy(update={"reward": other})))
    with pytest.raises(DataError, match=r"solved on scores of another scorer 'reward' than config\.yaml has now"):
        constrained_reward(run)


def test_log_ratios_are_refused(tmp_path: Path) -> None:
    from can_dist.config import LogRatio, Model

    run, _, config = solved_run(tmp_path, **CALM)
    ratio = LogRatio(beta=0.1, model=Model(model=str(tmp_path / "lm")))
    (run / "config.yaml").write_text(dump_yaml(config.model_copy(update={"reward": ratio})))
    with pytest.raises(ConfigError, match="score 'reward' is a log-ratio of policies, which needs the tokens"):
        constrained_reward(run)


@pytest.mark.parametrize(
    ("tool", "file", "lacking"),
    [
        ("trl", "trainer/rloo_config.py", "normalize_advantages, reward_weights"),
        (
            "openrlhf",
            "cli/train_ppo_ray.py",
            "advantage_estimator, gamma, generate_max_len, init_kl_coef, kl_estimator",
        ),
        ("verl", "trainer/config/ppo.yaml", "adv_estimator, gamma, kl_coef"),
    ],
)
def test_a_version_that_lacks_a_switch_is_told(
    solved: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    file: str,
    lacking: str,
) -> None:
    package = tmp_path / tool
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text("beta temperature top_p max_completion_length reward_funcs rloo_k\n")
    spec = importlib.machinery.ModuleSpec(tool, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EnvironmentProblem) as caught:
        export_weights(solved[0], tmp_path / "out", tool=tool)
    assert f"has no switch {lacking}" in str(caught.value)
    assert f"Install a newer {tool}" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (package / file).write_text(" ".join(["reward_weights normalize_advantages beta temperature top_p reward_funcs",
        "max_completion_length path name adv_estimator norm_adv_by_std_in_grpo use_kl_in_reward kl_penalty type",
        "kl_coef gamma use_kl_loss max_response_length remote_rm_url advantage_estimator init_kl_coef kl_estimator",
        "reward_clip_range generate_max_len"]))  # fmt: skip
    assert export_weights(solved[0], tmp_path / "out", tool=tool)[1] == 0.5
