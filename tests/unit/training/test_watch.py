"""What watches a training: targets of a λ, responses in packs, and what is said of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import watched_world as ww
from scipy.special import expit, softmax

from can_dist.config import Model
from can_dist.errors import NumericalError
from can_dist.modeling.formatter import open_formatter
from can_dist.training.batches import Slot, collate, load_examples
from can_dist.training.spec import TrainSpec
from can_dist.training.targets import combined_score, score_targets
from can_dist.training.watch import Watch, _parts


@pytest.fixture(scope="module", params=["listwise", "soft", "regression"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ww.Watching:
    return ww.make_watching(tmp_path_factory.mktemp("watch"), request.param, constraints=("calm", "short"))


def watch_of(world: ww.Watching, **train: object) -> Watch:
    spec = TrainSpec.model_validate_json(world.spec("spec", 8, feedback="validation", **train))
    watch = Watch.of(spec, world.preferences, open_formatter(Model(model=str(world.reference))))
    assert watch is not None
    return watch


def test_targets_against_scipy() -> None:
    score = np.array([0.3, -1.2, 2.0])
    np.testing.assert_allclose(score_targets("listwise", score, 0.7), softmax(score / 0.7), rtol=1e-14)
    p = expit(score[0] - score[1])
    np.testing.assert_allclose(score_targets("sigmoid", score[:2]), [p, 1 - p], rtol=1e-14)
    assert score_targets("sigmoid", [800.0, -800.0]) == [1.0, 0.0]
    assert score_targets("regression", score[:2]) == [0.3, -1.2]
    assert score_targets("pairwise", score + 1e9) == pytest.approx([-1.7, -3.2, 0.0], abs=1e-6)
    utility = np.array([[1.0, 0.5], [2.0, 0.0], [-1.0, 3.0]])
    np.testing.assert_allclose(combined_score(score, utility, [2.0, 10.0]), score + utility @ [2.0, 10.0])


def test_labels_of_the_first_lambda_are_those_of_the_table_and_of_another_follow_it(world: ww.Watching) -> None:
    watch = watch_of(world)
    examples, _ = load_examples(world.preferences, open_formatter(Model(model=str(world.reference))), 512)
    batch = collate([Slot(example, 1.0) for example in examples[:5]], "shared")
    assert torch.equal(watch.labelled(batch).target_BN, batch.target_BN)
    watch.lam = {"calm": 0.2, "short": 7.0}
    by_id = {row["response_id"]: row for row in world.train_rows}
    rows = {row["example_id"]: row["response_ids"] for row in world.preferences.table.to_pylist()}
    for example, target_N in zip(examples, watch.labelled(batch).target_BN, strict=False):
        of_example = [by_id[name] for name in rows[example.example_id]]
        score = np.array([row["reward"] + 0.2 * row["calm"] + 7.0 * row["short"] for row in of_example])
        expected = {
            "listwise": softmax(score / ww.tw.BETA),
            "pairwise": score - score.max(),
            "regression": score,
        }[watch.loss]
        np.testing.assert_allclose(target_N[: len(expected)], expected, rtol=1e-6)


def test_every_response_lies_in_one_pack_of_one_rank(world: ww.Watching) -> None:
    for budget in (8, 60, 10_000):
        watch = watch_of(world, tokens_per_pack=budget)
        packs = [watch.packs(rank, 3) for rank in range(3)]
        assert len({len(of_rank) for of_rank in packs}) == 1
        slots = [slot for of_rank in packs for pack in of_rank for slot in pack if slot.share]
        rows = sorted(row for slot in slots for row in watch._rows[slot.example.example_id])
        assert rows == list(range(len(world.validation_rows)))
        for slot in slots:
            its_rows = watch._rows[slot.example.example_id]
            assert [world.validation_rows[row]["token_ids"] for row in its_rows] == list(slot.example.responses)
            assert slot.example.num_tokens <= budget or len(slot.example.responses) == 1


@pytest.mark.parametrize(
    ("sizes", "budget", "parts"),
    [([3, 3, 3], 9, [[0, 1, 2]]), ([3, 3, 3], 8, [[0, 1], [2]]), ([9, 1, 9], 5, [[0], [1], [2]]), ([2], -4, [[0]])],
)
def test_parts(sizes: list[int], budget: int, parts: list[list[int]]) -> None:
    assert list(_parts(sizes, budget)) == parts


def test_the_reference_itself_gains_nothing_and_has_no_direction(world: ww.Watching) -> None:
    watch = watch_of(world)
    observation, lam, best = watch._observe(watch.ref_N.copy(), 3)
    assert observation.values["estimate.gain.calm"] == pytest.approx(0.0, abs=1e-12)
    assert "estimate.direction" not in observation.values, "what does not exist is no number of a tracker"
    assert all(math.isfinite(value) for value in observation.values.values())
    assert observation.line.startswith("calm +0.00 ± 0.00 of +0.60, short +0.00 ± 0.00 of +0.30, reward +0.00, KL 0.00")
    assert lam == watch.lam, "λ does not move after step 3"
    assert best is None, "nothing ends this training"


def test_lambda_moves_where_it_is_due_and_is_said(world: ww.Watching) -> None:
    watch = watch_of(world)
    observation, lam, _ = watch._observe(watch.ref_N.copy(), 4)
    assert lam["calm"] != watch.lam["calm"]
    moved = f"; lambda calm {watch.lam['calm']:.3g} to {lam['calm']:.3g}, short {watch.lam['short']:.3g} to "
    assert moved in observation.line
    assert observation.values["estimate.lam.calm"] == watch.lam["calm"], "the one that the policy was trained towards"


def test_a_policy_that_stays_is_flat_and_one_that_rose_is_compared_with_itself(world: ww.Watching) -> None:
    spec = TrainSpec.model_validate_json(world.spec("spec", 8, stop="flat", batch_size=1))
    assert spec.watch is not None
    every = spec.watch.stop_every
    assert every is not None
    assert every > 1
    watch = Watch.of(spec, world.preferences, open_formatter(Model(model=str(world.reference))))
    assert watch is not None
    score_N = np.array([r["reward"] + sum(v * r[k] for k, v in world.lam.items()) for r in world.validation_rows])
    courses = {"stays": [0.0, 0.0], "rises, then stays": [0.05, 0.05, 0.05], "falls": [-0.02, -0.05]}
    for name, strengths in courses.items():
        watch.best, steps = None, [every * number for number in range(1, len(strengths) + 1)]
        for step, strength in zip(steps, strengths, strict=True):
            assert not watch.is_flat
            assert not watch.compares_after(step + 1)
            assert watch.compares_after(step)
            _, _, watch.best = watch._observe(watch.ref_N + strength * (score_N - score_N.max()), step)
        assert watch.is_flat, name
        best_step = steps[0] if name.startswith("rises") else 0
        assert watch.course(80) == {"stopped": {"of_steps": 80, "best_step": best_step}}, name


def test_a_policy_that_diverged_is_a_numerical_error(world: ww.Watching) -> None:
    watch = watch_of(world)
    logp_N = watch.ref_N.copy()
    logp_N[5] = np.nan
    with pytest.raises(NumericalError, match=r"step 4: the policy's log-probabilities of 1 of 60 validation responses"):
        watch._observe(logp_N, 4)


def test_quarantined_responses_are_left_out(world: ww.Watching, tmp_path: Path) -> None:
    _, scores = ww.scored(tmp_path, "validation", world.validation_rows, left_out=["2-0/1", "2-3/0"])
    spec = TrainSpec.model_validate_json(world.spec("spec", 8, feedback="validation"))
    assert spec.watch is not None
    spec = spec.model_copy(update={"watch": spec.watch.model_copy(update={"scores": scores.path})})
    watch = Watch.of(spec, world.preferences, open_formatter(Model(model=str(world.reference))))
    assert watch is not None
    assert watch.table.num_rows == len(watch.ref_N) == len(world.validation_rows) - 2
