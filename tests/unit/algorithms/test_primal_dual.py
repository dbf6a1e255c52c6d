"""The online loop on policies that are tables of logits: it ends at MoCAN's λ* and π*, and swings from η = 2/L on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import enumerable_world as world
import numpy as np
import pyarrow as pa
import pytest
import torch
from exact_run import PROMPTS_ARE_UNUSED, make_config

from can_dist.algorithms.ascent import diverges, moved, swings
from can_dist.algorithms.primal_dual import primal_dual
from can_dist.errors import DataError, NumericalError
from can_dist.run import Run
from can_dist.stages.advantages import label_advantages, leave_one_out
from can_dist.stages.slack import largest_step
from can_dist.stages.trajectory import ReferenceData
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE, RESPONSES
from can_dist.training.losses import example_losses
from can_dist.workspace import Workspace

BETA, MARGIN, NUM_SAMPLES = 1.0, 0.4, 200
NUM_PROMPTS, NUM_RESPONSES = world.REWARD_PK.shape
REF_PK = np.exp(0.5 * np.random.default_rng(3).normal(size=world.REWARD_PK.shape))
REF_PK /= REF_PK.sum(axis=1, keepdims=True)
(LAM,), OPTIMUM_PK = world.optimal_policy(REF_PK, [world.HARMLESS_PK], [MARGIN], BETA)


class TabularRun(Run):
    """Policies are tables of ln π; a response is its number; sampling is systematic, and training plain torch.

    A training is one step of the natural gradient: with ``rate`` 1 it ends at π_λ, but for the draw; with less it lags.
    """

    rate, solves = 0.5, False  # nothing of the dual is needed where η is given

    def reference_data(self, prompts: Any, reference: Any, reward: Any, constraints: Any, beta: float) -> ReferenceData:
        responses = self.generate(reference, prompts)
        scores = self.score(responses, reward, constraints, reference)
        solution: Any = self.solve(scores, constraints, beta) if self.solves else None
        return ReferenceData(scores, solution, responses, scores, None)

    def step_sizes(self, data: ReferenceData, step_size: Any) -> dict[str, float]:
        return super().step_sizes(data, step_size) if self.solves else {"harmless": step_size}

    def logp(self, policy: Any) -> np.ndarray:
        """ln π of the reference, or of a trained policy, (P, K)."""
        if not isinstance(policy, Artifact):
            return np.log(REF_PK)
        return policy.table.column("logp").to_numpy().reshape(REF_PK.shape)

    def generate(self, policy: Any, prompts: Any, *, split: str = "train", seed: int | None = None) -> Artifact:
        """Draw by one uniform number per prompt: response k where (k + u)/K falls in the distribution function."""
        offset_P = np.random.default_rng(0 if seed is None else seed).random(NUM_PROMPTS)
        rows = []
        for prompt, offset, logp_K in zip(world.PROMPTS, offset_P, self.logp(policy), strict=True):
            places = (np.arange(NUM_SAMPLES) + offset) / NUM_SAMPLES
            drawn = np.minimum(np.searchsorted(np.exp(logp_K).cumsum(), places), NUM_RESPONSES - 1)
            for k, response in enumerate(drawn.tolist()):
                message = {"role": "user", "content": prompt}
                row = {"prompt_id": prompt, "response_id": f"{prompt}/{k}", "messages": [message]}
                text = {"text": world.RESPONSES[response], "token_ids": [response], "num_tokens": 1}
                rows.append({**row, **text, "finish_reason": "length"})
        inputs = {"policy": policy} if isinstance(policy, Artifact) else {}
        stage = open_stage(self._work.directory, "generate", "samples", {"seed": seed}, inputs)
        write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
        return stage.commit()

    def score(
        self,
        responses: Artifact,
        reward: Any,
        constraints: Any,
        reference: Any,
        aligned: Any = None,
        policy: Any = None,
    ) -> Artifact:
        index_N = np.array(responses.table.column("token_ids").to_pylist())[:, 0]
        prompt_N = np.repeat(np.arange(NUM_PROMPTS), NUM_SAMPLES)
        tables = {"reward": world.REWARD_PK, "harmless": world.HARMLESS_PK, LOGP_REFERENCE: np.log(REF_PK)}
        tables |= {} if policy is None else {LOGP_POLICY: self.logp(policy)}
        columns = {name: table[prompt_N, index_N] for name, table in tables.items()}
        stage = open_stage(self._work.directory, "scores", "exact", {}, {"responses": responses})
        keys = responses.table.select(["prompt_id", "response_id", "num_tokens"]).to_pydict()
        write_part(stage.path, 0, pa.table({**keys, **columns}))
        return stage.commit()

    def train(self, reference: Any, preferences: Artifact, beta: float, **unused: Any) -> Artifact:
        rows = preferences.table.to_pylist()
        assert preferences.info["loss"] == "clipped"
        index_PK = torch.tensor([[tokens[0] for tokens in row["token_ids"]] for row in rows])
        own_PK, advantage_PK = (torch.tensor([row[name] for row in rows]) for name in ("logp_ref", "target"))
        logit_PK = torch.tensor(self.logp(reference)).requires_grad_()
        ratio_PK = logit_PK.log_softmax(dim=1).gather(1, index_PK) - own_PK
        is_real_PK = torch.ones_like(ratio_PK, dtype=torch.bool)
        example_losses("clipped", ratio_PK, advantage_PK, is_real_PK, beta).sum().backward()
        with torch.no_grad():  # the Fisher information of logits is diag(π) up to their common constant
            logit_PK -= self.rate / beta * logit_PK.grad / logit_PK.softmax(dim=1)
        stage = open_stage(self._work.directory, "train", "torch", {"rate": self.rate}, {"preferences": preferences})
        write_part(stage.path, 0, pa.table({"logp": logit_PK.detach().log_softmax(dim=1).numpy().ravel()}))
        return stage.commit()


@pytest.fixture(autouse=True)
def nothing_is_lost_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop writes hundreds of small artifacts; waiting for the disk is most of what they cost."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def loop(directory: Path, run_class: type[TabularRun] = TabularRun, **options: Any) -> tuple[np.ndarray, list[Any]]:
    """Run the loop; return π of all responses, and the rounds of its trajectory."""
    config = make_config(
        BETA, {"harmless": MARGIN}, "primal_dual", primal_dual=options, label={"validation_fraction": 0}
    )
    with run_class(directory, config) as run:
        policy = primal_dual(
            run,
            prompts=PROMPTS_ARE_UNUSED,
            reference=config.reference,
            reward=config.reward,
            constraints=config.constraints,
            beta=BETA,
            options=config.primal_dual,
        )
        return np.exp(run.logp(policy)), rounds_of(directory)


def rounds_of(directory: Path) -> list[Any]:
    (path,) = directory.glob("trajectory-*/trajectory.json")
    rounds: list[Any] = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    return rounds


@pytest.mark.slow  # 24 rounds of artifacts
@pytest.mark.parametrize(("power", "options"), [(0, {}), (2, {"form": "log", "start": 0.5})], ids=["linear", "log"])
def test_the_loop_ends_at_the_policy_of_mocan(tmp_path: Path, power: int, options: dict[str, Any]) -> None:
    """The curvature along ln λ is λ*² times that along λ."""
    policy_PK, rounds = loop(tmp_path, rounds=24, step_size=0.8 / (curvature_of(LAM) * LAM**power), **options)
    distance, moved_by = world.kl(policy_PK, OPTIMUM_PK), world.kl(OPTIMUM_PK, REF_PK)
    print(f"{options}: KL(π‖π*) = {distance:.4f} nats of {moved_by:.3f}, λ {rounds[-1]['lam']}, λ* {LAM:.4f}")
    assert moved_by > 0.3  # the reference itself must not pass
    assert distance <= 0.01
    assert rounds[-1]["lam"]["harmless"] == pytest.approx(LAM, rel=0.05)
    gain = world.gain(policy_PK, REF_PK, world.HARMLESS_PK)
    assert gain == pytest.approx(MARGIN, abs=0.03)
    assert rounds[-1]["constraints"]["harmless"]["improvement"] == pytest.approx(gain, abs=0.03)
    assert rounds[-1]["kl"]["mean"] == pytest.approx(world.kl(policy_PK, REF_PK), abs=0.03)


class PromptRun(TabularRun):
    """A policy that is π_λ as soon as λ moves, so that the loop is the dual's own gradient descent."""

    solves = True

    def train(self, reference: Any, preferences: Artifact, beta: float, **unused: Any) -> Artifact:
        lam = preferences.manifest["identity"]["lam"]["harmless"]
        stage = open_stage(self._work.directory, "train", "exact", {}, {"preferences": preferences})
        write_part(stage.path, 0, pa.table({"logp": np.log(tilted(lam)).ravel()}))
        return stage.commit()


@pytest.mark.slow  # a dozen rounds of artifacts
def test_a_step_above_two_over_the_curvature_is_stopped_with_its_trajectory(tmp_path: Path) -> None:
    curvature = curvature_of(LAM)
    with pytest.raises(NumericalError) as caught:
        loop(tmp_path, PromptRun, rounds=40, step_size=2.6 / curvature)
    message = str(caught.value)
    print(message)
    bound = float(message.partition("2/L = ")[2].partition(",")[0])
    assert bound == pytest.approx(2 / curvature, rel=0.1)  # of 200 samples per prompt
    assert f"Set primal_dual.step_size below {bound:.3g}" in message
    rounds = rounds_of(tmp_path)
    assert 4 <= len(rounds) < 40
    assert f"Stopped after round {len(rounds)} of 40" in message


# ------------------------------------------------------------------------------------------- the dual's own recursion


def tilted(lam: float) -> np.ndarray:
    weight_PK = REF_PK * np.exp((world.REWARD_PK + lam * world.HARMLESS_PK) / BETA)
    return weight_PK / weight_PK.sum(axis=1, keepdims=True)


def curvature_of(lam: float) -> float:
    """D''(λ) = E Var_{π_λ} g / β."""
    policy_PK = tilted(lam)
    mean_P = (policy_PK * world.HARMLESS_PK).sum(axis=1)
    return float(((policy_PK * world.HARMLESS_PK**2).sum(axis=1) - mean_P**2).mean() / BETA)


def exact_rounds(step: float, number: int, se: float = 0.01, noise: float = 0.0) -> list[Any]:
    """λ ← [λ − η∇D(λ)]_+ from 0, with exact policies, and errors of measurement where they are asked for."""
    random, lam, rounds = np.random.default_rng(7), 0.0, []
    for _ in range(number):
        slack = world.gain(tilted(lam), REF_PK, world.HARMLESS_PK) - MARGIN + noise * random.normal()
        rounds.append(turn(lam, slack, se))
        lam = moved({"harmless": lam}, rounds[-1].constraints, {"harmless": step})["harmless"]
    return rounds


def turn(lam: float, slack: float, se: float = 0.01) -> Any:
    return SimpleNamespace(lam={"harmless": lam}, constraints={"harmless": {"slack": slack, "se": se, "equal": False}})


def first_stop(rounds: list[Any]) -> int | None:
    return next((n for n in range(1, len(rounds) + 1) if diverges(rounds[:n])), None)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_steps_below_two_over_the_curvature_are_never_stopped(share: float) -> None:
    rounds = exact_rounds(share * 2 / curvature_of(LAM), 200)
    assert rounds[-1].lam["harmless"] == pytest.approx(LAM, rel=1e-3)
    assert first_stop(rounds) is None


@pytest.mark.parametrize("share", [1.2, 2.0, 5.0])
def test_steps_above_it_are_stopped_and_would_never_have_ended(share: float) -> None:
    rounds = exact_rounds(share * 2 / curvature_of(LAM), 200)
    assert np.std([entry.lam["harmless"] for entry in rounds[-20:]]) > 0.1
    stop = first_stop(rounds)
    assert stop is not None
    assert stop < 40


def test_a_lambda_that_swings_with_its_samples_is_not_stopped() -> None:
    """At 1/H the errors of 0.05 of a slack move λ for ever: around λ*, which is no divergence."""
    rounds = exact_rounds(1 / curvature_of(LAM), 400, se=0.05, noise=0.05)
    assert np.std([entry.lam["harmless"] for entry in rounds[-50:]]) > 0.05
    assert first_stop(rounds) is None


def test_swings_are_between_turns_and_count_when_their_slack_is_no_error() -> None:
    lams = [0.0, 1.0, 1.5, 0.5, 0.5, 0.0, 2.0]
    rounds = [turn(lam, slack) for lam, slack in zip(lams, [-1, -1, 1, 1, 1, -1, 0], strict=True)]
    assert swings(rounds, "harmless") == [1.5, 1.5, 2.0]
    rounds[2] = turn(1.5, 1, se=2.0)
    assert swings(rounds, "harmless") == [2.0], "the fall from 1.5 may be the samples' doing"
    assert diverges([turn(float("nan"), 0.0)]) == "harmless"


@pytest.mark.parametrize(
    ("lam", "slack", "form", "expected"),
    [
        (1.0, -0.5, "linear", 1.2),
        (0.1, 0.5, "linear", 0.0),
        (1.0, -0.5, "log", np.exp(0.2)),
        (2.0, 0.5, "log", 2 * np.exp(-0.4)),
        (1.0, -1e6, "log", np.e),
    ],
)
def test_the_two_forms_of_the_step(lam: float, slack: float, form: str, expected: float) -> None:
    stepped = moved({"harmless": lam}, turn(lam, slack).constraints, {"harmless": 0.4}, form=form)
    assert stepped["harmless"] == pytest.approx(expected, rel=1e-12)


# -------------------------------------------------------------------------------------------------------- advantages


def test_an_advantage_is_over_the_mean_of_the_others() -> None:
    return_K = np.array([1.0, 4.0, -2.0, 0.5])
    expected = [value - np.delete(return_K, k).mean() for k, value in enumerate(return_K)]
    np.testing.assert_allclose(leave_one_out(return_K), expected, rtol=1e-12)


def sampled(folder: Path, rewards: list[list[float]], logps: list[list[float]] | None = None) -> tuple[Artifact, ...]:
    """Responses of prompts p0, p1, ... with these rewards, harmless 0, ln π_ref −1, and ln π where it is given."""
    names = [(f"p{p}", k) for p, row in enumerate(rewards) for k in range(len(row))]
    rows = [
        {
            "prompt_id": prompt,
            "response_id": f"{prompt}/{k}",
            "messages": [{"role": "user", "content": prompt}],
            "text": "same",  # a response that was drawn twice counts twice
            "token_ids": [1],
            "num_tokens": 1,
            "finish_reason": "length",
        }
        for prompt, k in names
    ]
    stage = open_stage(folder, "generate", "made up", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
    responses = stage.commit()
    stage = open_stage(folder, "scores", "made up", {}, {"responses": responses})
    keys = {name: [row[name] for row in rows] for name in ("prompt_id", "response_id", "num_tokens")}
    scores = {"reward": np.concatenate(rewards), "harmless": [0.5] * len(rows), LOGP_REFERENCE: [-1.0] * len(rows)}
    own = {} if logps is None else {LOGP_POLICY: np.concatenate(logps)}
    write_part(stage.path, 0, pa.table({**keys, **scores, **own}))
    return responses, stage.commit()


@pytest.fixture
def work(tmp_path: Path) -> Any:
    config = make_config(BETA, {"harmless": MARGIN}, "primal_dual", label={"validation_fraction": 0})
    with_log = Workspace(tmp_path / "run", config)
    yield with_log
    with_log.close()


def test_examples_hold_advantages_of_the_return_and_the_log_probability_of_who_responded(work: Workspace) -> None:
    responses, scores = sampled(work.directory, [[1.0, 2.0, 4.0], [3.0]], [[-1.5, -1.0, 0.0], [-1.0]])
    beta, lam = 0.5, 2.0
    table = label_advantages(work, responses, scores, {"harmless": lam}, reward="reward", beta=beta)
    (row,) = table.table.to_pylist()
    returns = np.array([1.0 + lam * 0.5 + beta * 0.5, 2.0 + lam * 0.5, 4.0 + lam * 0.5 - beta * 1.0])
    np.testing.assert_allclose(row["scores"], returns)
    np.testing.assert_allclose(row["target"], [r - np.delete(returns, k).mean() for k, r in enumerate(returns)])
    assert row["logp_ref"] == [-1.5, -1.0, 0.0]
    assert (table.info["loss"], table.manifest["identity"]["lam"]) == ("clipped", {"harmless": lam})
    assert table.info["counts"] == {"less than two responses": 1, "examples": 1}
    assert table.read_json("noted_examples.json")[0]["example_id"] == "p1"


def test_returns_without_a_difference_are_refused(work: Workspace) -> None:
    responses, scores = sampled(work.directory, [[1.0, 1.0], [3.0, 3.0]])
    with pytest.raises(DataError, match=r"every prompt have one and the same return.*Check the scorers"):
        label_advantages(work, responses, scores, {"harmless": 1.0}, reward="reward", beta=BETA)


def test_prompts_with_one_response_each_are_refused(work: Workspace) -> None:
    responses, scores = sampled(work.directory, [[1.0], [3.0]])
    with pytest.raises(DataError, match=r"no example is left to train on \(2 less than two responses\)"):
        label_advantages(work, responses, scores, {"harmless": 1.0}, reward="reward", beta=BETA)


@pytest.mark.slow  # numba compiles the dual
def test_the_largest_step_is_two_over_the_largest_eigenvalue(tmp_path: Path) -> None:
    config = make_config(BETA, {"harmless": MARGIN}, "primal_dual")
    with PromptRun(tmp_path, config) as run:
        data = run.reference_data(None, config.reference, config.reward, config.constraints, BETA)
        bound = largest_step(data.scores, data.solution, reward="reward")
        of_logarithm = largest_step(data.scores, data.solution, reward="reward", of_logarithm=True)
        assert of_logarithm == pytest.approx(bound / data.lam["harmless"] ** 2, rel=1e-9)
        assert bound == pytest.approx(2 * run.step_sizes(data, "1/H")["harmless"], rel=1e-9)
    assert bound == pytest.approx(2 / curvature_of(LAM), rel=0.1)
