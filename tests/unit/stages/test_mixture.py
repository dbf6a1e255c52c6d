"""The stage mixture on real weights and real log-probabilities: what it mixes, measures, writes and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from basis_run import BasisRun, make_basis_run
from safetensors.torch import load_file
from tiny import make_tiny_lm

from can_dist.dual import basis
from can_dist.dual.table import ScoreTable
from can_dist.errors import DataError, InfeasibleConstraint, NumericalError
from can_dist.outcomes.export import facts_of, find_policy
from can_dist.stages.estimate import MIXTURE, lam_of, trained_policy
from can_dist.stages.mixture import MAIN, check_validation
from can_dist.stages.report import as_trained, lineage_of
from can_dist.stages.solve import demands
from can_dist.tables.artifacts import Artifact
from can_dist.training import POLICY

pytestmark = pytest.mark.slow  # forward and backward passes of real models
NEAR = {"calm": 0.04, "short": 0.02}
FAR = {"calm": 0.5, "short": 0.02}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasisRun]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield make_basis_run(tmp_path_factory.mktemp("basis"), monkeypatch, ("calm", "short"))


@pytest.fixture(scope="module")
def mixed(run: BasisRun) -> Artifact:
    return run.mixture(**NEAR)


def covariance(first_PK: np.ndarray, second_PK: np.ndarray) -> float:
    """Mean over prompts of the unbiased covariance of their responses."""
    pairs = zip(first_PK, second_PK, strict=True)
    return float(np.mean([np.cov(first_K, second_K)[0, 1] for first_K, second_K in pairs]))


def test_coefficients_are_the_closed_form_of_exact_log_ratios(run: BasisRun, mixed: Artifact) -> None:
    """Log-ratios of one response at a time in double precision, and the constrained optimum's own conditions."""
    record, beta = mixed.read_json(MIXTURE), run.world.config.beta
    assert list(record["coefficient"]) == [MAIN, "calm", "short"]
    ratios = [run.log_ratio(policy.path / POLICY) for policy in run.policies.values()]
    a_I = np.array(list(record["coefficient"].values()))
    sigma = np.array([[covariance(first, second) for second in ratios] for first in ratios])
    reward_I = np.array([covariance(ratio, run.column("reward")) for ratio in ratios])
    utility_IJ = np.array([[covariance(ratio, run.column(name)) for name in NEAR] for ratio in ratios])
    mu_J = np.array([record["mu"][name] for name in NEAR])
    # float32 log-probabilities of responses that hardly moved are known to five digits
    np.testing.assert_allclose(beta * sigma @ a_I, reward_I + utility_IJ @ mu_J, rtol=2e-3, atol=1e-5)
    gains = a_I @ utility_IJ
    assert all(gain >= margin * (1 - 2e-3) for gain, margin in zip(gains, NEAR.values(), strict=True))
    np.testing.assert_allclose(mu_J * (gains - list(NEAR.values())), 0.0, atol=1e-4)
    assert (mu_J >= 0).all()


def test_mixed_weights_mix_log_ratios_as_was_measured(run: BasisRun, mixed: Artifact) -> None:
    record = mixed.read_json(MIXTURE)
    start = load_file(run.world.reference / "model.safetensors")
    ends = [load_file(policy.path / POLICY / "model.safetensors") for policy in run.policies.values()]
    written = load_file(mixed.path / POLICY / "model.safetensors")
    for name, tensor in written.items():
        moves = zip(record["coefficient"].values(), ends, strict=True)
        expected = start[name].double() + sum(a * (end[name].double() - start[name].double()) for a, end in moves)
        np.testing.assert_allclose(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    policies = zip(record["coefficient"].values(), run.policies.values(), strict=True)
    mixture_PK = sum(a * run.log_ratio(policy.path / POLICY) for a, policy in policies)
    actual_PK = run.log_ratio(mixed.path / POLICY)
    expected = covariance(mixture_PK, actual_PK) / np.sqrt(
        covariance(mixture_PK, mixture_PK) * covariance(actual_PK, actual_PK)
    )
    assert record["correlation"] == pytest.approx(expected, abs=1e-4)
    assert record["correlation"] > 0.99
    mixed.check()


def test_finished_mixture_is_reused(run: BasisRun, mixed: Artifact) -> None:
    assert run.mixture(**NEAR).digest == mixed.digest


def test_margin_outside_of_the_range_is_refused_with_the_range(run: BasisRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "MIXING", 0.99)  # in this world nothing attainable has less than 0.98
    before = sorted(run.work.directory.glob("mixture-*"))
    with pytest.raises(InfeasibleConstraint, match="lies outside the range where mixing weights mixes") as caught:
        run.mixture(**FAR)
    message = str(caught.value)
    assert "nearer to those trained for: at most about calm +" in message
    assert message.endswith(
        f"The policy as trained is whole ({run.policies[''].path}); --set basis=false goes on with it."
    )
    assert sorted(run.work.directory.glob("mixture-*")) == before, "nothing that was written stays"
    largest = float(message.partition("at most about calm ")[2].split()[0].rstrip("."))
    edge = run.mixture(calm=0.9 * largest, short=FAR["short"]).info["correlation"]
    assert 0.99 <= edge <= 0.993, "told from one mixture that lies outside of it"


def test_who_follows_the_policy_through_the_mixture(run: BasisRun, mixed: Artifact) -> None:
    assert trained_policy(mixed).digest == as_trained(mixed).digest == run.policies[""].digest
    lineage = lineage_of(mixed, mixed)
    assert lineage.solution is not None
    assert [demand.margin for demand in demands(lineage.solution)] == list(NEAR.values())
    assert lam_of(mixed, lineage.solution) == mixed.read_json(MIXTURE)["mu"]
    facts = dict(facts_of(mixed, None)["made_from"])
    assert facts["mixture"].startswith(f"{mixed.info['coefficient'][MAIN]:.3g} of {MAIN}, ")
    assert find_policy(mixed.path)[0].digest == mixed.digest


def test_labels_of_a_constraint_have_the_spread_of_the_reward(run: BasisRun) -> None:
    """c in the identity is that of two columns by plain NumPy; the reward is in none of the labels."""
    for name in NEAR:
        preferences = run.policies[name].input("preferences")
        given = preferences.manifest["identity"]
        table = run.world.scores.table
        scores = ScoreTable.build(
            table.column("reward").to_numpy(), table.column(name).to_numpy(), table.column("prompt_id").to_pylist()
        )
        shape = (scores.num_prompts, -1)
        spread = [
            np.sqrt(np.var(column_N.reshape(shape), axis=1, ddof=1).mean())
            for column_N in (scores.reward_N, scores.utility_JN[0])
        ]
        assert given["reward"] is None
        assert given["lam"] == {name: pytest.approx(spread[0] / spread[1], rel=1e-3)}
        label = preferences.table.to_pylist()[0]
        by_id = dict(zip(table.column("response_id").to_pylist(), table.column(name).to_pylist(), strict=True))
        expected = [given["lam"][name] * by_id[key] for key in label["response_ids"]]
        assert label["scores"] == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------- bad input


def test_two_policies_that_say_the_same_are_named(run: BasisRun) -> None:
    policies = run.policies | {"short": run.policies["calm"]}
    turned = BasisRun(run.world, run.work, policies)
    with pytest.raises(NumericalError, match=r"basis: calm and short say the same \(correlation 1\.0") as caught:
        turned.mixture(**NEAR)
    assert "--set basis=false goes on with it" in str(caught.value)


def test_policy_of_another_reference_is_refused(run: BasisRun, tmp_path: Path) -> None:
    other = make_tiny_lm(tmp_path / "other", [f"w{i}" for i in range(20)], seed=5)
    reference = run.world.config.reference.model_copy(update={"model": str(other)})
    world = replace(run.world, config=run.world.config.model_copy(update={"reference": reference}))
    with pytest.raises(DataError, match=r"train-\w+ \(policy\) was not trained from the weights of"):
        BasisRun(world, run.work, run.policies).mixture(**NEAR)


def test_too_few_validation_prompts_are_counted(run: BasisRun) -> None:
    policy = run.policies[""]
    with pytest.raises(DataError, match=r"basis: 0 validation prompts, .* by fewer than 32; 128 are advised"):
        check_validation(None, policy)
    assert check_validation(run.world.validation, policy) is run.world.validation
