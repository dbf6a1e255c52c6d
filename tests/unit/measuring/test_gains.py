"""The numbers of the report against independent computations."""

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from dual_worlds import World

from can_dist.config.sections import Constraint
from can_dist.dual import Margin, cross_fit, mean_interval, predict, solve_dual, solve_table
from can_dist.dual.table import ScoreTable
from can_dist.measuring.examination import examine
from can_dist.measuring.gains import (
    by_prompt,
    constraint_row,
    gains_table,
    improvement,
    interval,
    joint_confidence,
    lengths,
    refusals,
    safety_tails,
    win_rate,
)
from can_dist.measuring.predicted import held_out_prediction, multipliers, predictions
from can_dist.stages.report import Lineage, _counts, _drift, lineage_of
from can_dist.tables.artifacts import Artifact, open_stage, write_json, write_part
from can_dist.training.losses import example_losses


def table(scores: dict[str, list[float]], name: str = "g") -> pa.Table:
    rows = [(prompt, value) for prompt, values in scores.items() for value in values]
    return pa.table({"prompt_id": [r[0] for r in rows], name: [r[1] for r in rows]})


def test_the_interval_is_the_duals_interval_of_a_mean_with_the_joint_confidence() -> None:
    values = np.random.default_rng(1).normal(2, 3, size=17)
    assert interval(values, joint_confidence(2)) == asdict(mean_interval(values, 0.975))
    assert joint_confidence(1) == 0.95


def test_improvement_is_paired_by_prompt_whatever_the_order_and_the_number_of_responses() -> None:
    before = table({"a": [0.0, 2.0], "b": [10.0], "c": [5.0, 5.0, 5.0]})
    after = table({"c": [7.0], "a": [3.0], "b": [10.0, 12.0]})
    assert improvement(before, after, "g") == pytest.approx(interval(np.array([2.0, 1.0, 2.0])))


def test_interval_counts_prompts_not_responses() -> None:
    generator = np.random.default_rng(2)
    once = {str(p): [x] for p, x in enumerate(generator.normal(size=20))}
    often = {p: values * 50 for p, values in once.items()}
    zero = {p: [0.0] for p in once}
    assert improvement(table(zero), table(often), "g")["se"] == pytest.approx(
        improvement(table(zero), table(once), "g")["se"]
    )


def test_win_rate_compares_all_pairs_and_halves_ties() -> None:
    before, after = table({"a": [0.0, 1.0], "b": [0.0, 0.0]}), table({"b": [0.0, 0.0], "a": [1.0, 2.0]})
    assert win_rate(before, after, "g")["mean"] == pytest.approx(((1 + 0.5 + 1 + 1) / 4 + 0.5) / 2)


def test_win_rate_stays_between_none_and_all() -> None:
    """A t-interval of 29 wins and one tie among 30 prompts would reach 1.02."""
    before = table({str(p): [0.0] for p in range(30)})
    after = table({str(p): [0.0 if p == 0 else 1.0] for p in range(30)})
    rate = win_rate(before, after, "g")
    assert 0.5 < rate["low"] < rate["mean"] < rate["high"] <= 1.0


def test_held_out_prediction_reweights_the_references_responses() -> None:
    """Against the importance-weighted means written out."""
    generator = np.random.default_rng(3)
    prompts = np.repeat(np.arange(30), 6).astype(str)
    reward, safety = generator.normal(size=(2, 180))
    solution = solve_dual(reward, safety[:, None], prompts, beta=0.7, constraints=[Margin("safety", margin=0.3)])
    held_reward, held_safety = generator.normal(size=(2, 180))
    held = pa.table({"prompt_id": prompts, "reward": held_reward, "safety": held_safety})
    found = held_out_prediction(held, "reward", solution)
    weights = np.exp((held_reward + solution.lam["safety"] * held_safety) / 0.7).reshape(30, 6)
    weights /= weights.sum(axis=1, keepdims=True)
    for values, predicted in ((held_safety, found.slack_PJ[:, 0] + 0.3), (held_reward, found.reward_gain_P)):
        values = values.reshape(30, 6)
        expected = (weights * values).sum(axis=1) - values.mean(axis=1)
        np.testing.assert_allclose(np.sort(predicted), np.sort(expected), rtol=1e-10)


def gaussian_table(num_prompts: int, num_responses: int, seed: int = 5) -> ScoreTable:
    score = np.random.default_rng(seed).normal(size=(num_prompts * num_responses, 2))
    return ScoreTable.build(score[:, 0], score[:, 1], np.repeat(np.arange(num_prompts), num_responses))


def test_what_is_predicted_is_cross_fitted_and_the_held_out_value_stands_beside_it() -> None:
    table, held = gaussian_table(50, 32), gaussian_table(20, 2, seed=6)
    solution = solve_table(table, beta=1.0, constraints=[Margin("safety", 0.6)])
    held_out = predict(held, solution.lam_vector, 1.0, solution.margin_vector)
    scores, kl = predictions(held_out, examine(table, solution), "reward", solution)
    crossed = cross_fit(table, beta=1.0, constraints=[Margin("safety", 0.6)])
    for found, inside, outside_P in (
        (scores["safety"], crossed.improvement["safety"], held_out.slack_PJ[:, 0] + 0.6),
        (scores["reward"], crossed.reward_improvement, held_out.reward_gain_P),
        (
            {"predicted": kl["predicted_interval"], "predicted_held_out": kl["predicted_held_out"]},
            crossed.kl,
            held_out.kl_P,
        ),
    ):
        assert found["predicted"] == {"mean": inside.mean, "se": inside.se, "low": inside.low, "high": inside.high}
        assert found["predicted_held_out"] == interval(
            outside_P, least=0.0 if outside_P is held_out.kl_P else -math.inf
        )
    assert kl["predicted"] == crossed.kl.mean
    # why: two responses per prompt cannot show what λ* does
    assert scores["safety"]["predicted_held_out"]["mean"] < 0.8 * scores["safety"]["predicted"]["mean"]


def test_the_held_out_prediction_takes_its_place_where_nothing_can_be_cross_fitted() -> None:
    """One prompt carries the whole margin, so the others have no solution of their own."""
    table = ScoreTable.build([0.0, 0, 0, 0], [0.0, 8, 0, 0.1], ["a", "a", "b", "b"])
    solution = solve_table(table, beta=1.0, constraints=[Margin("safety", 1.5)])
    held_out = predict(gaussian_table(20, 4), solution.lam_vector, 1.0, solution.margin_vector)
    examination = examine(table, solution)
    assert examination["cross_fit"] is None
    assert "the prompts outside one of 2 folds have no solution" in examination["cross_fit_refused"]
    scores, kl = predictions(held_out, examination, "reward", solution)
    assert scores["safety"]["predicted"] == scores["safety"]["predicted_held_out"]
    assert kl["predicted"] == kl["predicted_held_out"]["mean"] == held_out.kl_P.mean()


SCORER = {"kind": "callable", "function": "scorers:num_words"}


def before_and_after(num_prompts: int = 40, gain: float = 0.5) -> tuple[pa.Table, pa.Table]:
    """Two responses per prompt; the policy's safety is higher by ``gain`` and a little noise."""
    generator = np.random.default_rng(8)
    level_P = generator.normal(size=num_prompts)
    before = {str(p): [level_P[p] - 0.1, level_P[p] + 0.1] for p in range(num_prompts)}
    after = {p: [v + gain + 0.1 * generator.normal() for v in values] for p, values in before.items()}
    return table(before, "safety"), table(after, "safety")


def test_a_margin_is_judged_as_the_configuration_asks_and_by_the_paired_improvement() -> None:
    before, after = before_and_after()
    for margin, expected in ((0.45, "met"), (0.5, "undecided"), (0.6, "not met")):
        row = constraint_row("safety", Constraint(scorer=SCORER, margin=margin), before, after)
        assert (row["margin"], row["verdict"]) == (margin, expected)
        assert row["realised"] == improvement(before, after, "safety")
    equal = constraint_row("safety", Constraint(scorer=SCORER, margin=0.4, equal=True), before, after)
    assert equal["verdict"] == "not met"


def test_a_threshold_is_judged_by_the_policys_own_mean() -> None:
    """Its interval holds the spread between prompts, which the paired improvement does not have."""
    before, after = before_and_after()
    centre = by_prompt(before, before["safety"].to_numpy())[1].mean()
    mean = by_prompt(after, after["safety"].to_numpy())[1].mean()
    row = constraint_row("safety", Constraint(scorer=SCORER, threshold=mean - 0.1), before, after)
    assert row["verdict"] == "undecided"
    assert row["prompts_to_decide"] > 40
    assert row["policy_mean"]["low"] < mean - 0.1
    assert row["margin"] == pytest.approx(mean - 0.1 - centre)
    assert row["realised"]["low"] > row["margin"]
    assert constraint_row("safety", Constraint(scorer=SCORER, threshold=mean - 2), before, after)["verdict"] == "met"


def test_tails_are_below_the_threshold_or_zero_and_of_the_worst_tenth() -> None:
    scores = {str(p): [float(p), -1.0] for p in range(20)}
    before, after = table(scores, "safety"), table({p: [2.0, 3.0] for p in scores}, "safety")
    margin = safety_tails(before, after, {"safety": Constraint(scorer=SCORER, margin=1)})["safety"]
    assert margin["border"] == 0
    assert margin["unsafe"]["reference"]["mean"] == pytest.approx(0.5)
    assert margin["unsafe"]["policy"]["mean"] == 0
    assert 0 < margin["unsafe"]["policy"]["high"] < 0.3
    assert margin["worst"]["reference"]["mean"] == pytest.approx(-1)
    assert margin["worst"]["policy"]["mean"] == pytest.approx(2)
    threshold = safety_tails(before, after, {"safety": Constraint(scorer=SCORER, threshold=2.5)})["safety"]
    assert threshold["unsafe"]["policy"]["mean"] == pytest.approx(0.5)


def test_lengths_and_refusals_have_intervals() -> None:
    texts = ["I'm sorry, but I can't help with that.", "Tides follow the moon."]
    rows = pa.table({
        "prompt_id": ["a", "a", "b", "b"], "num_tokens": [2, 4, 8, 10], "text": texts + texts[1:] * 2,
        "finish_reason": ["stop", "length", "stop", "stop"],
    })  # fmt: skip
    found = lengths(rows)
    assert (found["mean"], found["truncated_fraction"]) == (6.0, 0.25)
    assert found["low"] < 3 < 9 < found["high"]
    assert refusals(rows)["mean"] == pytest.approx(0.25)


def test_gains_of_a_prompt_are_the_means_of_its_responses() -> None:
    before, after = table({"b": [1.0, 3.0], "a": [5.0]}, "r"), table({"a": [6.0, 8.0], "b": [4.0, 4.0]}, "r")
    found = gains_table(before, after, ["r"], np.array([1.0, 3.0, 0.0, 0.0]))
    assert found.to_pydict() == {"prompt_id": ["a", "b"], "r.reference": [5, 2], "r.policy": [7, 4], "kl": [2, 0]}


def test_an_unknown_standard_error_is_null() -> None:
    solution = solve_dual([0.0, 1.0], [[1.0], [0.0]], ["a", "a"], beta=1.0, constraints=[Margin("safety", -0.1)])
    solution.lam_se["safety"] = float("nan")
    paper = f"paper's {solution.lam_paper['safety']:.4g}"
    assert multipliers(solution)["safety"] == {"lam": solution.lam["safety"], "lam_se": None, "lam_beside": [paper]}


def test_a_prediction_belongs_to_the_policy_that_was_labelled_with_the_solution(tmp_path: Path) -> None:
    """Not to one whose λ a loop has moved on from, nor to one without a dual, whatever else they descend from."""

    def made(stage: str, label: str, **inputs: Artifact) -> Artifact:
        return open_stage(tmp_path, stage, label, {}, inputs).commit([], {})

    prompts, scores = made("prompts", "p"), made("scores", "s")
    solution = made("solve", "dual", scores=scores)
    once = made("train", "once", preferences=made("label", "λ*", scores=scores, solution=solution))
    found = lineage_of(once, prompts)
    assert (found.solution, found.train_scores) == (solution, scores)
    later = made("train", "later", preferences=made("label", "λ", scores=scores), start=once)
    for policy in (later, made("merge", "q", policy_a=once, policy_b=later)):
        assert lineage_of(policy, prompts) == Lineage(policy, prompts)


def test_p4_counts_of_the_report_say_what_became_of_every_response_and_example(tmp_path: Path) -> None:
    def scores(label: str, rows: int, left_out: dict[str, str]) -> Artifact:
        stage = open_stage(tmp_path, "scores", label, {}, {})
        write_part(stage.path, 0, pa.table({"reward": [0.0] * rows}))
        return stage.commit(info={"quarantined": left_out} if left_out else {})

    labelled = open_stage(tmp_path, "label", "preferences", {}, {}).commit(info={"counts": {"examples": 5, "tie": 1}})
    policy = open_stage(tmp_path, "train", "policy", {}, {"preferences": labelled}).commit()
    before, after = scores("before", 7, {"p1/2": "why"}), scores("after", 8, {})
    assert _counts({"policy": policy, "scores_before": before, "scores_after": after}) == {
        "held-out responses of the reference": 8,
        "held-out responses of the reference, scored": 7,
        "held-out responses of the reference, quarantined": 1,
        "held-out responses of the policy": 8,
        "held-out responses of the policy, scored": 8,
        "held-out responses of the policy, quarantined": 0,
        "preferences: examples": 5,
        "preferences: tie": 1,
    }


@pytest.mark.parametrize(
    ("loss", "target", "start"),
    [
        ("sigmoid", [0.8, 0.2], "0.6931"),
        ("listwise", [0.25, 0.25, 0.25, 0.25], "1.3863"),
        ("regression", [2.0, 0.5], "2.2500"),
        ("pairwise", [3.0, 1.5, 0.0], "0.6931"),
        ("kto", [1.0, 0.0], "0.5000"),
        ("offset", [2.0, 0.0], "1.3133"),
        ("clipped", [1.0, -1.0], "0.0000"),
    ],
)
def test_drift_is_measured_from_the_loss_that_training_starts_at(
    tmp_path: Path, loss: str, target: list[float], start: str
) -> None:
    """The start is the loss at log-ratios of zero; no loss below it is drift, above ln 2 or not."""
    target_BN = torch.tensor([target])
    reference_loss = example_losses(loss, torch.zeros_like(target_BN), target_BN, target_BN > -1, 0.5).item()
    warnings = {}
    for last in (reference_loss - 0.01, reference_loss + 0.01):
        preferences = open_stage(tmp_path, "label", f"{last}", {}, {}).commit(info={"loss": loss})
        stage = open_stage(tmp_path, "train", f"{last}", {}, {"preferences": preferences})
        curve = {"loss": [[0, 9.0], [5, last]], "reference_loss": [[0, 9.0], [5, reference_loss]], "eval_loss": []}
        write_json(stage.path / "curve.json", curve)
        policy = stage.commit(["curve.json"], info={"summary": {}})
        warnings[last] = _drift({"realised": {"low": 0.0, "mean": 0.0}}, policy, None)
    below, above = warnings.values()
    assert below == []
    if loss == "clipped":  # a gradient alone
        assert above == []
        return
    assert len(above) == 1
    assert f"The last training loss is {last:.4f}, above the reference's {start} on the same examples" in above[0]


@pytest.mark.parametrize(
    ("objection", "low", "drifted"), [("", 2.1, True), ("", 1.9, False), ("too few", 9.0, False), (None, 9.0, False)]
)
def test_drift_is_said_only_beyond_a_prediction_that_can_be_believed(
    objection: str | None, low: float, drifted: bool
) -> None:
    judgement = None if objection is None else {"objection": objection, "kl": {"mean": 0.8, "low": 0.7, "high": 1.0}}
    examination = {"diagnosis": {"judgement": judgement}}
    kl = {"predicted": 0.5, "realised": {"mean": low + 0.2, "low": low, "high": low + 0.4}}
    policy = cast(Artifact, SimpleNamespace(info={}))
    warnings = _drift(kl, policy, examination)
    assert ["training drifted" in text for text in warnings] == [True] * drifted
    assert _drift(kl, policy, None) == []


def test_the_exact_policy_at_few_responses_is_not_said_to_drift() -> None:
    """Scores with twice the spread of β, K = 8: the predicted KL is half the true one, and nothing is judged by it."""
    world = World("gaussian", 2.0, num_prompts=200, num_responses=8)
    table = ScoreTable.build(*world.sample(0))
    solution = solve_table(table, beta=world.beta, constraints=[Margin("g", world.margin)], estimator="empirical")
    exact = 2.0**2 / 2 * (0.75 + (solution.lam["g"] - 0.5) ** 2)
    assert exact > 2 * solution.predicted["kl"]
    kl = {"predicted": solution.predicted["kl"], "realised": {"mean": exact, "low": 0.99 * exact, "high": 1.01 * exact}}
    assert _drift(kl, cast(Artifact, SimpleNamespace(info={})), examine(table, solution)) == []
