"""All methods through the real trainer, where the policy each must reach is known by independent code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import enumerable_world as world
import numpy as np
import pyarrow as pa
import pytest
import torch
from enumerated_run import BETA, LISTS, EnumeratedRun, align, configure, enumerate_responses
from scipy.special import expit

from can_dist.algorithms.caid import caid
from can_dist.algorithms.cdpo import cdpo
from can_dist.algorithms.dpo import dpo
from can_dist.algorithms.pecan import pecan
from can_dist.algorithms.sacpo import sacpo
from can_dist.config import Config, validate_config
from can_dist.config.walk import REWARD
from can_dist.stages import slack as measure
from can_dist.stages.human_labels import Criterion
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import GIVEN_RESPONSES, LOGP_REFERENCE

MARGIN = 0.6
METHODS = {"sacpo": sacpo, "cdpo": cdpo, "caid": caid}


class MeasuredRun(EnumeratedRun):
    """The slack of a policy, too, over all responses there are, weighted by the policy's probability of each."""

    def measure(self, policy: Any, prompts: Any, reference_scores: Artifact, reward: Any, constraints: Any) -> Artifact:
        scores = self.score(self.enumerated, reward, constraints, policy)
        return measure.measure(
            self._work, scores, reference_scores, constraints, reward=REWARD, log_weight=LOGP_REFERENCE
        )


def with_method(config: Config, method: str, options: dict[str, Any]) -> Config:
    return validate_config({**json.loads(config.model_dump_json()), "method": method, method: options})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("method", "labels", "options"),
    [
        ("sacpo", "soft", {"order": "helpful_first"}),
        ("sacpo", "soft", {"order": "safe_first"}),
        ("sacpo", "regression", {"order": "helpful_first"}),
        ("cdpo", "soft", {"rounds": 6, "tolerance": 0.01, "standard_errors": 0}),
        ("caid", "soft", {"rounds": 1, "epochs": 256}),  # of one step each: three prompts
    ],
    ids=["SACPO", "SACPO, safe first", "SACPO, regression", "C-DPO", "CAID"],
)
def test_methods_agree_on_one_policy(tmp_path: Path, method: str, labels: str, options: dict[str, Any]) -> None:
    reference = world.make_reference(tmp_path / "reference")
    ref_PK = world.probabilities(reference)
    lam, optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
    if method == "sacpo":
        options = options | {"labels_from": "scores", "beta_over_lambda": BETA / float(lam[0])}
    plain = configure(reference, {"harmless": MARGIN}, {"learning_rate": 5e-3, "max_steps": 400, **LISTS}, labels)
    config = with_method(plain, method, options)
    run_dir = tmp_path / "run"
    trained_PK, _ = align(run_dir, config, METHODS[method], MeasuredRun, options=getattr(config, method))
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


# ------------------------------------------------------------------------------------------ DPO-H, DPO-S: people

COPIES = 6  # people per pair
OFFSETS = range(1, 9)  # response k is compared with k + 1, ..., k + 8


def votes(table_PK: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (prompt, a, b, people of COPIES who prefer a) by Bradley and Terry, rounded."""
    size = table_PK.shape[1]
    return [
        (row, a, (a + offset) % size, round(COPIES * expit(table_PK[row, a] - table_PK[row, (a + offset) % size])))
        for row in range(table_PK.shape[0])
        for a in range(size)
        for offset in OFFSETS
    ]


class PeopleRun(EnumeratedRun):
    """People's pairs of all the responses there are."""

    def human_pairs(self, *_: Any, **__: Any) -> Artifact:
        return self.voted


def write_votes(run_dir: Path, prompts: Artifact) -> Artifact:
    """Write each vote as a pair: 'better' by the reward, 'safer' by the harmlessness."""
    helpful, safe = votes(world.REWARD_PK), votes(world.HARMLESS_PK)
    rows = []
    for number, ((row, a, b, better), (*_, safer)) in enumerate(zip(helpful, safe, strict=True)):
        for copy in range(COPIES):
            for side, response in (("a", a), ("b", b)):
                text = world.RESPONSES[response]
                won = side == "a"
                rows.append(
                    {
                        "prompt_id": world.PROMPTS[row],
                        "response_id": f"{world.PROMPTS[row]}/{number}-{copy}{side}",
                        "messages": [{"role": "user", "content": world.PROMPTS[row]}],
                        "text": text,
                        "token_ids": [world.WORDS.index(word) for word in text.split()],
                        "num_tokens": 2,
                        "finish_reason": "given",
                        "better": int((copy < better) == won),
                        "safer": int((copy < safer) == won),
                        "safe": -1,
                    }
                )
    stage = open_stage(run_dir, "pairs", "votes", {}, {"prompts": prompts})
    for part in range(4):
        size = len(rows) // 4
        table = pa.Table.from_pylist(rows[part * size : (part + 1) * size], schema=GIVEN_RESPONSES)
        write_part(stage.path, part, table)
    return stage.commit(info={"mismatched": False})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("criterion", "smoothing", "steps"),
    # people agree more on what is helpful: its policy is 1.9 nats away, and takes longer to reach
    [("helpful", 0.0, 2000), ("safe", 0.0, 1200), ("safe", 0.1, 1200)],
    ids=["DPO-H", "DPO-S", "DPO-S, smoothed"],
)
def test_dpo_on_people_is_its_own_closed_form(
    tmp_path: Path, criterion: Criterion, smoothing: float, steps: int
) -> None:
    reference = world.make_reference(tmp_path / "reference")
    raw = json.loads(configure(reference, {"harmless": MARGIN}, {}).model_dump_json())
    raw["method"] = "dpo_h" if criterion == "helpful" else "dpo_s"
    raw["label"] = {
        "preferences": {"source": "unused"},
        "validation_fraction": 0.0,
        "human": {"smoothing": smoothing},
    }
    raw["train"] |= {"learning_rate": 5e-3, "max_steps": steps, "num_epochs": 200, "batch_size": 768}
    config = validate_config(raw)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    prompts, _ = enumerate_responses(run_dir, reference)
    with PeopleRun(run_dir, config) as run:
        run.voted = write_votes(run_dir, prompts)
        policy = dpo(run, prompts=prompts, reference=config.reference, criterion=criterion, beta=BETA)
    ref_PK, table_PK = world.probabilities(reference), world.REWARD_PK if criterion == "helpful" else world.HARMLESS_PK
    *pairs, count_V = np.array(votes(table_PK)).T
    own_PK = world.people_policy(ref_PK, *pairs, smoothing + (1 - 2 * smoothing) * count_V / COPIES, BETA)
    trained_PK = world.probabilities(policy.path / POLICY)
    distance, moved = world.kl(trained_PK, own_PK), world.kl(own_PK, ref_PK)
    print(f"{criterion}, smoothing {smoothing}: KL to its closed form {distance:.6f} nats, which is {moved:.3f} away")
    assert moved > 0.2  # the reference itself must not pass
    assert distance <= 0.01


# ---------------------------------------------------------------------------------------- PeCAN: exact π_r and π_g


def fit_exactly(reference: Path, target_PK: np.ndarray, out: Path) -> float:
    """Save the reference with its weights moved until its distribution is ``target_PK``; return what KL is left.

    Full-batch L-BFGS in float64 on the enumerated distribution, nothing of the product's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)
    ids_NT = torch.tensor(
        [[world.WORDS.index(word) for word in f"{p} {y}".split()] for p in world.PROMPTS for y in world.RESPONSES]
    )
    target_N = torch.tensor(target_PK).flatten()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def divergence() -> torch.Tensor:
        logp_NTV = model(ids_NT).logits.log_softmax(dim=-1)
        logp_N = logp_NTV[:, 1].gather(1, ids_NT[:, 2:3])[:, 0] + logp_NTV[:, 2].gather(1, ids_NT[:, 3:4])[:, 0]
        return (target_N * (target_N.log() - logp_N)).sum() / len(world.PROMPTS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.float().save_pretrained(out)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)
    return world.kl(target_PK, world.probabilities(out))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pecan_from_exact_policies_is_the_optimum(tmp_path: Path) -> None:
    """π_r and π_g with a β of their own each, given as models; the final training has a third one."""
    reference = world.make_reference(tmp_path / "reference")
    ref_PK = world.probabilities(reference)
    tables = {"reward": (world.REWARD_PK, 0.4), "harmless": (world.HARMLESS_PK, 0.3)}
    for name, (table_PK, beta) in tables.items():
        target_PK = ref_PK * np.exp(table_PK / beta)
        left = fit_exactly(reference, target_PK / target_PK.sum(axis=1, keepdims=True), tmp_path / name)
        assert left < 1e-4
    raw = json.loads(configure(reference, {"harmless": MARGIN}, {}, "regression").model_dump_json())
    scorers = {
        name: {"kind": "log_ratio", "beta": beta, "model": {"model": str(tmp_path / name), "template": "{prompt}"}}
        for name, (_, beta) in tables.items()
    }
    raw |= {"method": "pecan", "reward": scorers["reward"]}
    raw["constraints"] = {"harmless": {"scorer": scorers["harmless"], "margin": MARGIN}}
    raw["train"] |= {"learning_rate": 5e-3, "max_steps": 400, **LISTS}
    config = validate_config(raw)
    trained_PK, found = align(tmp_path / "run", config, pecan)
    lam, optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
    distance, gain = world.kl(trained_PK, optimum_PK), world.gain(trained_PK, ref_PK, world.HARMLESS_PK)
    print(
        f"exact π_r, π_g: λ {found['harmless']:.5f}, exactly {lam[0]:.5f}; KL(π_θ‖π*) {distance:.6f}, gain {gain:.4f}"
    )
    assert found["harmless"] == pytest.approx(lam[0], rel=5e-3)
    assert distance <= 0.01
    assert gain == pytest.approx(MARGIN, rel=0.02)
