"""SafeDPO by real trainings (Ray, ZeRO-3) on people's votes in the enumerable world, against its own closed form."""

from __future__ import annotations

import json
from pathlib import Path

import enumerable_world as world
import numpy as np
import pyarrow as pa
import pytest
from enumerated_run import BETA, EnumeratedRun, configure, enumerate_responses
from scipy.special import expit

from can_dist.algorithms.safedpo import safedpo
from can_dist.config import validate_config
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import GIVEN_RESPONSES

COPIES = 4  # people per pair
NEIGHBOURS = range(1, 9)  # response k is compared with k + 1, ..., k + 8
SAFE_PK = world.HARMLESS_PK >= 0


def votes() -> list[tuple[int, int, int, int]]:
    """(prompt, a, b, people of COPIES who prefer a) by Bradley and Terry, rounded."""
    return [
        (p, a, b, round(COPIES * expit(world.REWARD_PK[p, a] - world.REWARD_PK[p, b])))
        for p in range(3)
        for a in range(64)
        for b in ((a + step) % 64 for step in NEIGHBOURS)
    ]


def write_votes(run_dir: Path, prompts: Artifact) -> Artifact:
    rows = [
        {
            "prompt_id": world.PROMPTS[p],
            "response_id": f"{world.PROMPTS[p]}/{number}-{copy}{side}",
            "messages": [{"role": "user", "content": world.PROMPTS[p]}],
            "text": world.RESPONSES[response],
            "token_ids": [world.WORDS.index(word) for word in world.RESPONSES[response].split()],
            "num_tokens": 2,
            "finish_reason": "given",
            "better": int((copy < better) == (side == "a")),
            "safer": -1,
            "safe": int(SAFE_PK[p, response]),
        }
        for number, (p, a, b, better) in enumerate(votes())
        for copy in range(COPIES)
        for side, response in (("a", a), ("b", b))
    ]
    stage = open_stage(run_dir, "pairs", "votes", {}, {"prompts": prompts})
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=GIVEN_RESPONSES))
    return stage.commit(info={"mismatched": False})


class PeopleRun(EnumeratedRun):
    voted: Artifact

    def human_pairs(self, *_, **__):
        return self.voted


def trained(tmp_path: Path, reference: Path, offset: float) -> np.ndarray:
    raw = json.loads(configure(reference, {"harmless": 0.6}, {}).model_dump_json())
    raw |= {"method": "safedpo", "safedpo": {"offset": offset}}
    raw["label"] = {"preferences": {"source": "unused"}, "validation_fraction": 0.0}
    raw["train"] |= {"learning_rate": 5e-3, "max_steps": 500, "num_epochs": 200, "batch_size": 768}
    config = validate_config(raw)
    run_dir = tmp_path / f"offset-{offset:g}"
    run_dir.mkdir()
    prompts, _ = enumerate_responses(run_dir, reference)
    with PeopleRun(run_dir, config) as run:
        run.voted = write_votes(run_dir, prompts)
        problem = {"prompts": prompts, "reference": config.reference, "constraints": config.constraints, "beta": BETA}
        policy = safedpo(run, **problem, options=config.safedpo)
    return world.probabilities(policy.path / POLICY)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trained_policies_are_safe_and_among_safe_responses_the_closed_form(tmp_path: Path) -> None:
    reference = world.make_reference(tmp_path / "reference")
    ref_PK = world.probabilities(reference)
    both_safe = [(p, a, b, better) for p, a, b, better in votes() if SAFE_PK[p, a] and SAFE_PK[p, b]]
    *places, count_V = np.array(both_safe).T
    own_PK = world.people_policy(ref_PK, *places, count_V / COPIES, BETA) * SAFE_PK
    own_PK /= own_PK.sum(axis=1, keepdims=True)
    before = (ref_PK * SAFE_PK).sum(axis=1).mean()
    safe_mass = {}
    for offset in (0.0, 3.0):
        policy_PK = trained(tmp_path, reference, offset)
        safe_mass[offset] = (policy_PK * SAFE_PK).sum(axis=1).mean()
        on_safe_PK = np.where(SAFE_PK, policy_PK, 0) / (policy_PK * SAFE_PK).sum(axis=1, keepdims=True)
        apart, at_first = (0.5 * np.abs(p_PK - own_PK).sum(axis=1).mean() for p_PK in (on_safe_PK, ref_PK))
        print(f"Δ {offset:g}: {safe_mass[offset]:.4f} safe, {apart:.3f} from its closed form (π_ref {at_first:.3f})")
        assert apart < 0.15 * at_first
    assert before < 0.7
    assert safe_mass[0.0] > 0.95
    assert 1 - safe_mass[3.0] < 0.5 * (1 - safe_mass[0.0])
