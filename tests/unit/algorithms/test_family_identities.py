"""What the methods share where trainings are exact: one optimum, reached by tilting, by the loop on λ, or at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_run import ExactRun, arguments, make_config, normalised

from can_dist.algorithms.caid import caid
from can_dist.algorithms.cdpo import cdpo
from can_dist.algorithms.mocan import mocan
from can_dist.algorithms.sacpo import sacpo
from can_dist.dual import Margin, solve_dual

# categorical with a weighted reference
REF = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
REWARD = np.array([[1, 0.2, -0.5, 0.7], [0, 1.5, -1, 0.5]])
SAFETY = np.array([[-1, 0.5, 2, -0.3], [1, -2, 0.8, 0.1]])
BETA, MARGIN, LAM = 0.5, 1.0, 1.0232216096
OPTIMUM = np.array([[0.061051, 0.199077, 0.704782, 0.035090], [0.639335, 0.027691, 0.057463, 0.275512]])
ONE = {"reward": REWARD, "safety": SAFETY}

# three constraints that pull on one another, the last of which ends at λ = 0
RANDOM = np.random.default_rng(4)
SHAPE = (6, 12)
REF_3 = np.exp(normalised(RANDOM.normal(size=SHAPE)))
REWARD_3 = RANDOM.normal(size=SHAPE)
SAFE = RANDOM.normal(size=SHAPE) - 0.5 * REWARD_3
KIND = 3.0 * (RANDOM.normal(size=SHAPE) + 0.2 * SAFE)  # in other units
EASY = RANDOM.normal(size=SHAPE) + 0.3 * SAFE
THREE = {"reward": REWARD_3, "safe": SAFE, "kind": KIND, "easy": EASY}
MARGINS_3 = {"safe": 0.5, "kind": 2.0, "easy": 0.1}


def lam_star(scores: dict[str, np.ndarray], ref_PK: np.ndarray, margins: dict[str, float]) -> dict[str, float]:
    utility_NJ = np.stack([scores[name].ravel() for name in margins], axis=1)
    prompt_N = np.repeat(np.arange(len(ref_PK)), ref_PK.shape[1])
    constraints = [Margin(name, margin) for name, margin in margins.items()]
    solution = solve_dual(
        scores["reward"].ravel(), utility_NJ, prompt_N,
        beta=BETA, constraints=constraints, log_weight_N=np.log(ref_PK).ravel(),
    )  # fmt: skip
    return solution.lam


def optimum(scores: dict[str, np.ndarray], ref_PK: np.ndarray, lam: dict[str, float]) -> np.ndarray:
    """ln π* from the closed form."""
    total = scores["reward"] + sum(value * scores[name] for name, value in lam.items())
    return normalised(np.log(ref_PK) + total / BETA)


WORLDS = {"one": (ONE, REF, {"safety": MARGIN}), "three": (THREE, REF_3, MARGINS_3)}


@pytest.fixture(autouse=True)
def nothing_is_lost_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops write hundreds of small artifacts; waiting for the disk is most of what they cost."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def trajectory(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("trajectory-*/trajectory.json")
    return json.loads(path.read_text())


def test_worlds_are_what_they_should_be() -> None:
    np.testing.assert_allclose(lam_star(ONE, REF, {"safety": MARGIN})["safety"], LAM, atol=1e-10)
    np.testing.assert_allclose(np.exp(optimum(ONE, REF, {"safety": LAM})), OPTIMUM, atol=1e-6)
    lam = lam_star(THREE, REF_3, MARGINS_3)
    assert lam["safe"] > 0.1
    assert lam["kind"] > 0.05
    assert lam["easy"] == 0


@pytest.mark.parametrize("order", ["helpful_first", "safe_first"])
def test_sacpo_at_beta_over_lambda_star_is_the_constrained_optimum(tmp_path: Path, order: str) -> None:
    """Tilting by r/β and then by λg/β, or the other way round, is tilting by (r + λg)/β."""
    lam = lam_star(ONE, REF, {"safety": MARGIN})["safety"]
    options = {"order": order, "labels_from": "scores", "beta_over_lambda": BETA / lam}
    config = make_config(BETA, {"safety": MARGIN}, "sacpo", sacpo=options)
    with ExactRun(tmp_path, config, REF, ONE) as run:
        logp_PK = run.logp(sacpo(run, **arguments(config), options=config.sacpo))
    np.testing.assert_allclose(logp_PK, optimum(ONE, REF, {"safety": lam}), atol=1e-10)
    gain = ((np.exp(logp_PK) - REF) * SAFETY).sum(axis=1).mean()
    assert gain == pytest.approx(MARGIN, abs=1e-9)


def test_sacpo_elsewhere_is_another_policy(tmp_path: Path) -> None:
    options = {"labels_from": "scores", "beta_over_lambda": 2 * BETA / LAM}
    config = make_config(BETA, {"safety": MARGIN}, "sacpo", sacpo=options)
    with ExactRun(tmp_path, config, REF, ONE) as run:
        logp_PK = run.logp(sacpo(run, **arguments(config), options=config.sacpo))
    np.testing.assert_allclose(logp_PK, optimum(ONE, REF, {"safety": LAM / 2}), atol=1e-10)
    assert ((np.exp(logp_PK) - REF) * SAFETY).sum(axis=1).mean() < 0.9 * MARGIN


@pytest.mark.parametrize(
    ("name", "warm", "step_size"),
    [
        ("one", False, "1/H"),
        ("one", True, "1/H"),
        ("one", False, 0.4),
        ("three", False, "1/H"),
        ("three", True, "1/H"),
    ],
)
def test_cdpo_converges_to_the_lambda_of_mocan(tmp_path: Path, name: str, warm: bool, step_size: Any) -> None:
    scores, ref_PK, margins = WORLDS[name]
    options = {"rounds": 500, "step_size": step_size, "warm_start": warm, "tolerance": 1e-11, "standard_errors": 0}
    config = make_config(BETA, margins, "cdpo", cdpo=options)
    with ExactRun(tmp_path, config, ref_PK, scores) as run:
        run.trajectory = lambda rounds, is_settled: setattr(run, "rounds", (rounds, is_settled))
        policy = cdpo(run, **arguments(config), options=config.cdpo)
        logp_PK = run.logp(policy)
    rounds, is_settled = run.rounds
    lam = lam_star(scores, ref_PK, margins)
    assert is_settled
    assert rounds[-1].policy == policy
    assert run.trained == len(rounds)
    found = rounds[-1].lam
    np.testing.assert_allclose([found[name] for name in lam], list(lam.values()), atol=1e-10)
    np.testing.assert_allclose(logp_PK, optimum(scores, ref_PK, lam), atol=1e-9)
    if warm:
        assert len(rounds) == 1  # MoCAN's policy, and nothing to correct
    else:
        assert rounds[0].lam == dict.fromkeys(margins, 0.0)
        assert len(rounds) > 2


@pytest.mark.parametrize("name", WORLDS)
def test_caid_stays_at_the_lambda_of_mocan(tmp_path: Path, name: str) -> None:
    """Where the one-shot training is exact, there is nothing to feed back."""
    scores, ref_PK, margins = WORLDS[name]
    config = make_config(BETA, margins, "caid", caid={"rounds": 3})
    with ExactRun(tmp_path, config, ref_PK, scores) as run:
        one_shot = mocan(run, **arguments(config))
        policy = caid(run, **arguments(config), options=config.caid)
        logp_PK, one_shot_PK = run.logp(policy), run.logp(one_shot)
    lam = lam_star(scores, ref_PK, margins)
    record = trajectory(tmp_path)
    assert len(record["rounds"]) == 4  # the one-shot policy, and one of each round
    assert record["rounds"][0]["policy"] == one_shot.path.name
    for one in record["rounds"]:
        np.testing.assert_allclose([one["lam"][name] for name in lam], list(lam.values()), atol=1e-10)
    np.testing.assert_allclose(logp_PK, one_shot_PK, atol=1e-9)


class WeakRun(ExactRun):
    """Trainings that go only a share of the way in ln π, from wherever they start."""

    share = 0.7

    def train(self, reference: Any, score_PK: Any, beta: float, *, start: Any = None, **unused: Any) -> Any:
        first_PK = self.logp(reference if start is None else start)
        aim_PK = self.logp(reference) + score_PK / beta
        return self._written("train", {"logp.reference": normalised((1 - self.share) * first_PK + self.share * aim_PK)})


def test_feedback_corrects_what_the_training_misses(tmp_path: Path) -> None:
    """CAID and C-DPO meet the margin with trainings that fall short, where the one-shot policy misses it."""
    config = make_config(BETA, {"safety": MARGIN}, "caid", caid={"rounds": 60})
    with WeakRun(tmp_path, config, REF, ONE) as run:
        caid(run, **arguments(config), options=config.caid)
    rounds = trajectory(tmp_path)["rounds"]
    slacks = [one["constraints"]["safety"]["slack"] for one in rounds]
    assert slacks[0] < -0.1
    assert abs(slacks[1]) < abs(slacks[0])
    assert slacks[-1] == pytest.approx(0, abs=1e-10)
    assert rounds[-1]["lam"]["safety"] == pytest.approx(LAM, abs=1e-9)  # epochs go on from the policy: they get there

    options = {"rounds": 100, "tolerance": 1e-11, "standard_errors": 0}
    config = make_config(BETA, {"safety": MARGIN}, "cdpo", cdpo=options)
    with WeakRun(tmp_path / "cdpo", config, REF, ONE) as run:
        cdpo(run, **arguments(config), options=config.cdpo)
    last = trajectory(tmp_path / "cdpo")["rounds"][-1]
    assert last["constraints"]["safety"]["slack"] == pytest.approx(0, abs=1e-11)
    assert last["lam"]["safety"] > 1.1 * LAM  # every training starts at π_ref and falls short: λ makes up for it
