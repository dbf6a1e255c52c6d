"""The whole chain where the answer is known: score, solve, label and train reach π* (docs/dual.md, the mathematics)."""

from pathlib import Path

import enumerable_world as world
import numpy as np
import pytest
from enumerated_run import BETA, LISTS, ValidatedRun, align, configure

from can_dist.algorithms.mocan import mocan
from can_dist.config import StrengthChoice
from can_dist.stages.estimate import load_estimate
from can_dist.tables.artifacts import load_artifact


@pytest.mark.parametrize(
    ("labels", "margins", "train"),
    [
        pytest.param("soft", {"harmless": 0.6}, LISTS, marks=pytest.mark.slow),
        ("soft", {"harmless": 0.45, "honest": 0.45}, LISTS),
        pytest.param("regression", {"harmless": 0.6}, LISTS, marks=pytest.mark.slow),
        pytest.param("listwise", {"harmless": 0.6}, LISTS, marks=pytest.mark.slow),
    ],
    ids=["one constraint", "two constraints", "regression", "listwise"],
)
def test_trained_policy_is_the_closed_form(
    tmp_path: Path, labels: str, margins: dict[str, float], train: dict[str, int]
) -> None:
    reference = world.make_reference(tmp_path / "reference")
    config = configure(reference, margins, {"learning_rate": 5e-3, "max_steps": 400, **train}, labels)
    trained_PK, found = align(tmp_path / "run", config, mocan)
    ref_PK = world.probabilities(reference)
    tables = {"harmless": world.HARMLESS_PK, "honest": world.HONEST_PK}
    utilities = [tables[name] for name in margins]
    lam, optimum_PK = world.optimal_policy(ref_PK, utilities, list(margins.values()), BETA)
    assert (lam > 0.05).all(), "the world must make every constraint bind"
    # π_ref of the scoring stage is float32
    np.testing.assert_allclose([found[name] for name in margins], lam, rtol=1e-4)
    assert world.kl(trained_PK, optimum_PK) <= 0.005
    for name, margin in margins.items():
        assert world.gain(trained_PK, ref_PK, tables[name]) == pytest.approx(margin, rel=0.02)


@pytest.mark.slow  # a training of its own
def test_a_training_that_arrives_needs_no_strength(tmp_path: Path) -> None:
    """Length and direction are 1 and so is the strength: nothing that is right already is stretched."""
    reference = world.make_reference(tmp_path / "reference")
    margins = {"harmless": 0.45, "honest": 0.45}
    config = configure(reference, margins, {"learning_rate": 5e-3, "max_steps": 400, **LISTS})
    config = config.model_copy(update={"strength": StrengthChoice()})
    trained_PK, _ = align(tmp_path / "run", config, mocan, ValidatedRun)
    ref_PK = world.probabilities(reference)
    (policy,) = (load_artifact(path) for path in (tmp_path / "run").glob("strength-*"))
    assert 0.98 <= policy.info["alpha"] <= 1.02
    estimate = load_estimate(policy.input("estimate"))
    assert estimate.estimator == "exact"
    assert (estimate.length.mean, estimate.direction.mean) == pytest.approx((1.0, 1.0), abs=0.02)
    gains = [world.gain(trained_PK, ref_PK, table) for table in (world.HARMLESS_PK, world.HONEST_PK)]
    assert min(gains) >= 0.45 * (1 - 1e-3), "the strength's own law is off by less"
    assert max(gains) <= 0.45 * 1.03
