"""SACPO, C-DPO and CAID through the real trainer, where π* is known: they agree with one another and with MoCAN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import enumerable_world as world
import numpy as np
import pytest
from test_enumerable_world import BETA, PAIRS, EnumeratedRun, configure, enumerate_responses

from can_dist.algorithms.caid import caid
from can_dist.algorithms.cdpo import cdpo
from can_dist.algorithms.sacpo import sacpo
from can_dist.config import Config, validate_config
from can_dist.run import LOGP, REWARD
from can_dist.stages import measure
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact

MARGIN = 0.6
METHODS = {"sacpo": sacpo, "cdpo": cdpo, "caid": caid}


class MeasuredRun(EnumeratedRun):
    """The slack of a policy, too, over all responses there are, weighted by the policy's probability of each."""

    def measure(self, policy: Any, prompts: Any, reference_scores: Artifact, reward: Any, constraints: Any) -> Artifact:
        scores = self.score(self.enumerated, reward, constraints, policy)
        return measure.measure(self._work, scores, reference_scores, constraints, reward=REWARD, log_weight=LOGP)


def with_method(config: Config, method: str, options: dict[str, Any]) -> Config:
    return validate_config({**json.loads(config.model_dump_json()), "method": method, method: options})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "labels", "options"),
    [
        ("sacpo", "soft", {"order": "helpful_first"}),
        ("sacpo", "soft", {"order": "safe_first"}),
        ("sacpo", "regression", {"order": "helpful_first"}),
        ("cdpo", "soft", {"rounds": 6, "tolerance": 0.01, "standard_errors": 0}),
        ("caid", "soft", {"rounds": 1, "epochs": 8}),
    ],
    ids=["SACPO", "SACPO, safe first", "SACPO, regression", "C-DPO", "CAID"],
)
def test_methods_agree_on_one_policy(tmp_path: Path, method: str, labels: str, options: dict[str, Any]) -> None:
    reference = world.make_reference(tmp_path / "reference")
    ref_PK = world.probabilities(reference)
    lam, optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
    if method == "sacpo":
        options = options | {"labels_from": "scores", "beta_over_lambda": BETA / float(lam[0])}
    plain = configure(reference, {"harmless": MARGIN}, {"learning_rate": 5e-3, "max_steps": 400, **PAIRS}, labels)
    config = with_method(plain, method, options)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    prompts, responses = enumerate_responses(run_dir, reference)
    with MeasuredRun(run_dir, config) as run:
        run.enumerated = responses
        policy = METHODS[method](
            run,
            prompts=prompts,
            reference=config.reference,
            reward=config.reward,
            constraints=config.constraints,
            beta=BETA,
            options=getattr(config, method),
        )
    trained_PK = world.probabilities(policy.path / POLICY)
    distance, gain = world.kl(trained_PK, optimum_PK), world.gain(trained_PK, ref_PK, world.HARMLESS_PK)
    print(f"{method} {labels} {options}: KL(π_θ‖π*) = {distance:.5f} nats, gain {gain:.4f}, λ* = {lam[0]:.4f}")
    for path in run_dir.glob("trajectory-*/trajectory.json"):
        rounds = json.loads(path.read_text())["rounds"]
        told = [(round(r["lam"]["harmless"], 4), round(r["constraints"]["harmless"]["slack"], 4)) for r in rounds]
        print(f"(λ, slack) of every round: {told}")
        assert rounds[-1]["constraints"]["harmless"]["slack"] == pytest.approx(gain - MARGIN, abs=1e-4)  # float32
        np.testing.assert_allclose(rounds[-1]["lam"]["harmless"], lam[0], rtol=0.05)
    assert distance <= 0.01
    assert gain == pytest.approx(MARGIN, rel=0.03)
