"""Inputs that cannot be solved, and what the user is told."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from can_dist.dual import DualSolution, Margin, ScoreTable, Status, predict, solve_dual, solve_table
from can_dist.dual.messages import misread_hints
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint, NumericalError

REWARD = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 1.0])
UTILITY = np.array([1.0, 0.0, -1.0, 0.0, 2.0, 1.0])
PROMPT = np.array(["a", "a", "a", "b", "b", "b"])


def solve(**change: Any) -> DualSolution:
    arguments: dict[str, Any] = {
        "reward_N": REWARD,
        "utility_NJ": UTILITY,
        "prompt_N": PROMPT,
        "beta": 0.5,
        "constraints": [Margin("safety", 0.4)],
    } | change
    table = arguments.pop("reward_N"), arguments.pop("utility_NJ"), arguments.pop("prompt_N")
    return solve_dual(*table, **arguments)


MET = "it holds without any change, so lambda is 0."


class TestInfeasible:
    def test_message_of_one_constraint(self) -> None:
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(constraints=[Margin("safety", 3.0)])
        assert str(caught.value) == (
            "no policy supported on this table meets the constraints.\n"
            "  safety: margin 3.00 requested, at most 1.00 attainable (mean over prompts of the best of K = 3, "
            "minus the reference mean).\n"
            "  Do one of: lower constraints.safety.margin; raise generate.num_responses; "
            "add prompts with safer responses."
        )
        assert caught.value.exit_code == 4

    def test_message_of_a_threshold_and_ragged_k(self) -> None:
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(
                reward_N=REWARD[:5],
                utility_NJ=UTILITY[:5] + 1,
                prompt_N=PROMPT[:5],
                constraints=[Margin("safety", threshold=4.0)],
            )
        line = str(caught.value).splitlines()[1]
        assert line == (
            "  safety: threshold 4 requested, margin 2.50 over the reference mean 1.5, at most 1.00 attainable "
            "(mean over prompts of the best of K = 2-3, minus the reference mean)."
        )
        assert "lower constraints.safety.threshold;" in str(caught.value)

    def test_only_the_impossible_constraint_is_named(self) -> None:
        utility = np.stack([UTILITY, REWARD], axis=1)
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(utility_NJ=utility, constraints=[Margin("safety", 1.2), Margin("honesty", -1.0)])
        assert "safety: margin 1.20 requested, at most 1.00" in str(caught.value)
        assert "honesty" not in str(caught.value)

    def test_f26_jointly_infeasible(self) -> None:
        """g and −g cannot both improve: each alone can."""
        utility = np.stack([UTILITY, -UTILITY], axis=1)
        both = [Margin("safety", 0.4), Margin("bluntness", 0.2)]
        for column, constraint in zip(utility.T, both, strict=True):
            assert solve(utility_NJ=column, constraints=[constraint]).status is Status.OPTIMAL
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(utility_NJ=utility, constraints=both)
        lines = str(caught.value).splitlines()
        assert lines[1].startswith("  safety: margin 0.40 requested, at most 1.00 attainable")
        assert lines[2].startswith("  bluntness: margin 0.20 requested, at most 1.00 attainable")
        assert lines[3] == (
            "  Each margin is attainable alone, not all together: t* = -0.3, weighting the constraints by "
            "v = (safety 0.50, bluntness 0.50) every policy misses by at least 0.3."
        )
        assert "lower constraints.safety.margin or constraints.bluntness.margin;" in lines[4]
        solution = solve(utility_NJ=utility, constraints=both, throw=False)
        assert solution.status is Status.INFEASIBLE
        assert solution.feasibility["t_star"] == pytest.approx(-0.3)
        assert math.isnan(solution.lam["safety"])
        assert math.isnan(solution.predicted["kl"])
        assert solution.diagnostics["verdict"].startswith("There is no prediction")

    def test_close_numbers_are_told_apart(self) -> None:
        with pytest.raises(InfeasibleConstraint, match=r"margin 1\.00001 requested, at most 1\.00000 attainable"):
            solve(constraints=[Margin("safety", 1.00001)])

    def test_f27_boundary(self) -> None:
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(constraints=[Margin("safety", 1.0)])
        assert str(caught.value).startswith("the constraints are met only by the best responses alone")
        assert "safety: margin 1.00 requested, at most 1.00 attainable" in str(caught.value)
        assert solve(constraints=[Margin("safety", 1.0)], throw=False).status is Status.BOUNDARY

    def test_one_response_per_prompt(self) -> None:
        with pytest.raises(InfeasibleConstraint, match=r"at most 0\.00 attainable .* best of K = 1"):
            solve(prompt_N=np.arange(6))
        solution = solve(prompt_N=np.arange(6), constraints=[Margin("safety", 0.0)])
        assert solution.diagnostics["num_single_response_prompts"] == 6
        assert "every prompt has one response" in solution.diagnostics["verdict"]


def test_a_margin_raised_for_a_confidence_is_told_apart_from_the_one_asked() -> None:
    generator = np.random.default_rng(0)
    reward, utility = generator.normal(size=(2, 40))
    prompt = np.repeat(np.arange(5), 8)
    asked = round(float((utility.reshape(5, 8).max(axis=1) - utility.reshape(5, 8).mean(axis=1)).mean()) - 0.05, 2)
    solve_dual(reward, utility, prompt, beta=1.0, constraints=[Margin("g", asked)])
    with pytest.raises(InfeasibleConstraint) as caught:
        solve_dual(reward, utility, prompt, beta=1.0, constraints=[Margin("g", asked)], confidence=0.99)
    assert f"requested ({asked:g} and " in str(caught.value)
    assert " for the confidence), at most " in str(caught.value)
    assert "Do one of: lower confidence; lower constraints.g.margin" in str(caught.value)


class TestBothReadings:
    """A number given as a margin where a level was meant, or the other way round: ḡ = −4.5 or 5.5, at most +1."""

    def refusal(self, shift: float, constraint: Margin) -> list[str]:
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(utility_NJ=UTILITY + shift, constraints=[constraint])
        return str(caught.value).splitlines()

    def test_a_margin_that_could_be_a_level(self) -> None:
        lines = self.refusal(5.0, Margin("safety", 6.0))
        assert lines[1].startswith("  safety: margin 6.00 requested, at most 1.00 attainable")
        assert lines[2] == (
            "  safety: read as an improvement over the reference mean 5.5 it needs +6, at most +1 attainable; if you "
            "meant the absolute level 6, write threshold=6, which is a margin of +0.5."
        )
        meant = solve(utility_NJ=UTILITY + 5.0, constraints=[Margin("safety", threshold=6.0)])
        assert meant.margin["safety"] == pytest.approx(0.5)

    def test_a_threshold_that_could_be_a_margin(self) -> None:
        lines = self.refusal(-5.0, Margin("safety", threshold=0.4))
        assert lines[1].startswith("  safety: threshold 0.4 requested, margin 4.90 over the reference mean -4.5")
        assert lines[2] == (
            "  safety: read as an absolute level, compared with the reference mean -4.5 it needs +4.9, at most +1 "
            "attainable; if you meant an improvement of 0.4, write margin=0.4."
        )

    def test_at_the_boundary(self) -> None:
        lines = self.refusal(0.25, Margin("safety", 1.0))
        assert "if you meant the absolute level 1, write threshold=1, which is a margin of +0.25." in lines[2]

    @pytest.mark.parametrize("constraint", [Margin("safety", 3.0), Margin("safety", threshold=3.0)])
    def test_a_number_impossible_either_way_is_not_explained(self, constraint: Margin) -> None:
        assert len(self.refusal(0.0, constraint)) == 3

    def test_only_the_constraint_at_fault_is_explained(self) -> None:
        """Jointly infeasible margins are no misreadings: each can be met alone."""
        utility = np.stack([UTILITY + 5.0, -UTILITY - 5.0], axis=1)
        with pytest.raises(InfeasibleConstraint) as caught:
            solve(utility_NJ=utility, constraints=[Margin("safety", 0.4), Margin("bluntness", 0.2)])
        assert "if you meant" not in str(caught.value)

    @pytest.mark.parametrize(
        ("shift", "constraint", "hint"),
        [
            (
                -3.0,
                Margin("safety", -2.0),
                "safety: margin=-2 allows the mean to fall by 2 below the reference mean -2.5; it holds without any "
                "change, so lambda is 0. If you meant the absolute level, write threshold=-2, a margin of +0.5.",
            ),
            (
                5.0,
                Margin("safety", threshold=0.4),
                "safety: threshold=0.4 allows the mean to fall by 5.1 below the reference mean 5.5; it holds without "
                "any change, so lambda is 0. If you meant the improvement, write margin=0.4.",
            ),
        ],
    )
    def test_a_demand_met_without_any_change_is_pointed_out(self, shift: float, constraint: Margin, hint: str) -> None:
        solution = solve(utility_NJ=UTILITY + shift, constraints=[constraint])
        assert solution.lam["safety"] == 0.0
        assert misread_hints(solution) == [hint]

    @pytest.mark.parametrize(
        ("shift", "constraint", "ending"),
        [
            (5.0, Margin("safety", -0.9), "0. If safety is a cost that should fall by 0.9, write -safety:margin=0.9."),
            (-9.0, Margin("safety", -0.9), "0. If safety is a cost that should fall by 0.9, write -safety:margin=0.9."),
            (5.0, Margin("safety", threshold=3.0), "by 2.5 below the reference mean 5.5; " + MET),
            (5.0, Margin("safety", threshold=-3.0), "by 8.5 below the reference mean 5.5; " + MET),
        ],
    )  # fmt: skip
    def test_what_other_demands_below_the_reference_allow_is_said(
        self, shift: float, constraint: Margin, ending: str
    ) -> None:
        """As a level they lie far from what is attainable; a threshold asks for nothing as an improvement either."""
        solution = solve(utility_NJ=UTILITY + shift, constraints=[constraint])
        assert solution.lam["safety"] == 0.0
        (hint,) = misread_hints(solution)
        assert hint.endswith(ending)
        assert ("if you meant" in hint.lower()) is False

    def test_an_improvement_that_comes_by_itself_is_taken_as_given(self) -> None:
        """g = r improves without any λ; 0.1 is a sensible margin, though as a level it could be asked for as well."""
        solution = solve(utility_NJ=REWARD - 0.85, constraints=[Margin("kindness", 0.1)])
        assert solution.lam["kindness"] == 0.0
        assert 0 < 0.1 - solution.centre["kindness"] < solution.feasibility["attainable"]["kindness"]
        assert misread_hints(solution) == []

    @pytest.mark.parametrize("constraint", [Margin("safety", -0.3), Margin("safety", -0.3, equal=True)])
    def test_a_demand_with_a_multiplier_is_taken_as_given(self, constraint: Margin) -> None:
        """Without it the policy would lose more than 0.3, so someone asked for it, though −0.3 could be a level too."""
        solution = solve(utility_NJ=UTILITY - 1.2, constraints=[constraint])
        assert solution.lam["safety"] != 0.0
        assert 0 < -0.3 - solution.centre["safety"] < solution.feasibility["attainable"]["safety"]
        assert misread_hints(solution) == []


class TestThreshold:
    def test_threshold_is_a_margin_over_the_centre(self) -> None:
        by_margin, by_threshold = solve(), solve(constraints=[Margin("safety", threshold=0.9)])
        assert by_threshold.centre["safety"] == 0.5
        assert by_threshold.margin["safety"] == pytest.approx(0.4)
        assert by_threshold.threshold == {"safety": 0.9}
        assert by_margin.threshold == {"safety": None}
        assert by_threshold.lam["safety"] == pytest.approx(by_margin.lam["safety"], rel=1e-12)

    def test_threshold_at_a_constant_utility_is_met(self) -> None:
        solution = solve(
            utility_NJ=[0.1, 0.1, 0.1, 0.7, 0.7, 0.7], constraints=[Margin("safety", threshold=(0.1 + 0.7) / 2)]
        )
        assert solution.lam["safety"] == 0.0

    def test_a_constant_utility_forgives_one_rounding_error(self) -> None:
        """The centre of a constant utility is a rounded mean; a threshold one ulp above it asks for nothing."""
        utility = np.repeat([0.1, 0.7], 3)
        above = float(np.nextafter(utility.mean(), 1.0))
        for threshold, status in ((above, Status.OPTIMAL), (above + 1e-9, Status.INFEASIBLE)):
            solution = solve(utility_NJ=utility, constraints=[Margin("safety", threshold=threshold)], throw=False)
            assert solution.status is status

    def test_noise_of_rounding_is_not_information(self) -> None:
        utility = np.array([0.1 + 0.2, 0.3, 0.3, 0.7, 0.7, 0.7])
        assert np.ptp(utility[:3]) > 0
        solution = solve(utility_NJ=utility, constraints=[Margin("safety", 0.0)])
        assert solution.lam["safety"] == 0.0
        assert solution.feasibility["attainable"]["safety"] == 0.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"constraints\.safety: found neither, expected one of them; give margin"),
            ({"margin": 1.0, "threshold": 2.0}, r"found margin 1\.0 and threshold 2\.0"),
            ({"margin": math.nan}, r"constraints\.safety\.margin: found nan, expected a finite number"),
            ({"threshold": math.inf}, r"constraints\.safety\.threshold: found inf"),
            ({"margin": True}, r"found True"),
            ({"margin": "1"}, r"found '1'"),
        ],
    )
    def test_bad_margins(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Margin("safety", **arguments)

    def test_empty_name(self) -> None:
        with pytest.raises(ConfigError, match="name the utility column"):
            Margin("", 1.0)


class TestBadInput:
    @pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, True, "0.1", None])
    def test_beta(self, beta: Any) -> None:
        with pytest.raises(ConfigError, match=r"beta: found .*expected a positive finite number"):
            solve(beta=beta)

    def test_repeated_constraint(self) -> None:
        with pytest.raises(ConfigError, match="name 'a' is given twice"):
            solve(utility_NJ=np.stack([UTILITY, UTILITY], axis=1), constraints=[Margin("a", 0.1), Margin("a", 0.2)])

    @pytest.mark.parametrize("margins", [[], [0.1, 0.2], 0.1])
    def test_margins_of_the_wrong_length(self, margins: Any) -> None:
        table = ScoreTable.build([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [0, 0, 1, 1])
        shape = np.asarray(margins, dtype=float).shape
        expected = f"margin_J: shape {shape}, expected (1,): one number per constraint of the table."
        with pytest.raises(ConfigError, match=re.escape(expected)):
            predict(table, [0.5], 1.0, margins)

    def test_wrong_number_of_constraints(self) -> None:
        with pytest.raises(ConfigError, match=r"2 columns for 1 constraints \(safety\)"):
            solve(utility_NJ=np.stack([UTILITY, UTILITY], axis=1))
        with pytest.raises(ConfigError, match=r"1 columns for 0 constraints \(none\)"):
            solve(constraints=[])
        with pytest.raises(ConfigError, match="constraints: 0 given for a table of 1 utilities"):
            solve_table(ScoreTable.build(REWARD, UTILITY, PROMPT), beta=0.5, constraints=[])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"reward_N": np.zeros((3, 2))}, r"reward_N: shape \(3, 2\), expected one dimension"),
            ({"utility_NJ": UTILITY[:5]}, r"utility_NJ: shape \(5,\), expected \(6, J\)"),
            ({"prompt_N": PROMPT[:5]}, r"prompt_N: shape \(5,\), expected \(6,\)"),
            ({"log_weight_N": np.zeros(4)}, r"log_weight_N: shape \(4,\), expected \(6,\)"),
            ({"max_steps": 0}, r"max_steps = 0"),
            ({"tolerance": 0.0}, r"tolerance = 0\.0"),
        ],
    )
    def test_shapes(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            solve(**change)

    @pytest.mark.parametrize("throw", [True, False])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite(self, bad: float, throw: bool) -> None:
        reward = np.tile(REWARD, 3)
        reward[[1, 3, 5, 7, 9, 11, 13]] = bad
        with pytest.raises(DataError) as caught:
            solve(reward_N=reward, utility_NJ=np.tile(UTILITY, 3), prompt_N=np.tile(PROMPT, 3), throw=throw)
        assert "column 'reward': 7 of 18 values are not finite, at rows 1, 3, 5, 7, 9 and 2 more" in str(caught.value)
        assert str(bad) in str(caught.value)

    def test_the_column_at_fault_is_named(self) -> None:
        utility = np.stack([UTILITY, UTILITY], axis=1)
        utility[4, 1] = np.nan
        constraints = [Margin("safety", 0.1), Margin("honesty", 0.1)]
        with pytest.raises(DataError, match="column 'honesty': 1 of 6 values are not finite, at rows 4 "):
            solve(utility_NJ=utility, constraints=constraints)

    def test_zero_weight(self) -> None:
        with pytest.raises(DataError, match="A response of weight zero is left out"):
            solve(log_weight_N=[0, 0, -math.inf, 0, 0, 0])

    def test_no_rows(self) -> None:
        with pytest.raises(DataError, match="no rows"):
            solve(reward_N=[], utility_NJ=np.zeros((0, 1)), prompt_N=[])

    def test_not_numbers(self) -> None:
        with pytest.raises(DataError, match="reward: not a column of numbers"):
            solve(reward_N=["x"] * 6)

    def test_prompt_ids(self) -> None:
        with pytest.raises(DataError, match="ids of types int, str"):
            solve(prompt_N=np.array(["a", 1, "a", "b", "b", "b"], dtype=object))
        with pytest.raises(DataError, match="ids of dtype float64"):
            solve(prompt_N=np.arange(6.0))
        assert solve(prompt_N=PROMPT.astype(object)).lam == solve().lam

    def test_prediction_on_a_table_of_other_utilities(self) -> None:
        table = ScoreTable.build(REWARD, UTILITY, PROMPT)
        with pytest.raises(ConfigError, match=r"lam_J: shape \(2,\), expected \(1,\)"):
            predict(table, [0.1, 0.2], 0.5, [0.1])


class TestNumerical:
    def test_f29_steps_run_out(self) -> None:
        with pytest.raises(NumericalError) as caught:
            solve(max_steps=1)
        assert "did not converge: after 1 of at most 1 Newton steps the KKT residual is" in str(caught.value)
        assert "raise max_steps" in str(caught.value)
        solution = solve(max_steps=1, throw=False)
        assert solution.status is Status.MAX_STEPS
        assert solution.kkt_residual > 1e-8
        assert math.isfinite(solution.lam["safety"])

    def test_steps_run_out_with_several_constraints(self) -> None:
        utility = np.stack([UTILITY, REWARD], axis=1)
        constraints = [Margin("safety", 0.3), Margin("reward", -0.3)]
        assert solve(utility_NJ=utility, constraints=constraints, max_steps=1, throw=False).status is Status.MAX_STEPS
        assert solve(utility_NJ=utility, constraints=constraints).status is Status.OPTIMAL

    @pytest.mark.parametrize("margin", [0.1, 0.2, 0.37])
    def test_scores_beyond_double_precision(self, margin: float) -> None:
        """At |score|/β = 1e13 no double holds λ* well enough; the solver stops there and does not spin."""
        table: dict[str, Any] = {"reward_N": [0.0, -0.7], "utility_NJ": [0.0, 1.0], "prompt_N": ["x", "x"]}
        change = table | {"beta": 1e-13, "constraints": [Margin("g", margin)]}
        solution = solve(**change, throw=False, max_steps=1000)
        assert solution.status is Status.MAX_STEPS
        assert solution.num_steps < 80
        assert solution.lam["g"] == pytest.approx(0.7, abs=1e-12)
        with pytest.raises(NumericalError, match="raise beta; raise tolerance; look for outlying scores"):
            solve(**change)

    def test_f30_overflow(self) -> None:
        with pytest.raises(NumericalError, match="left the finite numbers: the largest score difference"):
            solve(reward_N=(REWARD - 1) * 1.6e308)
        assert solve(reward_N=(REWARD - 1) * 1.6e308, throw=False).status is Status.NONFINITE
        assert solve(beta=5e-324, throw=False).status is Status.NONFINITE

    def test_scores_of_any_size_are_solved(self) -> None:
        plain = solve()
        for scale in (1e-150, 1e150):
            large = solve(
                reward_N=REWARD * scale,
                utility_NJ=UTILITY * scale,
                beta=0.5 * scale,
                constraints=[Margin("safety", 0.4 * scale)],
            )
            assert large.lam["safety"] == pytest.approx(plain.lam["safety"], rel=1e-10)


class TestSolution:
    @pytest.mark.parametrize("margin", [0.4, -5.0, 3.0])
    def test_json_round_trip(self, margin: float) -> None:
        solution = solve(constraints=[Margin("safety", margin)], throw=False)
        text = json.dumps(solution.to_dict(), allow_nan=False)
        record = json.loads(text)
        again = DualSolution.from_dict(record)
        assert again.to_dict() == solution.to_dict()
        assert again.status is solution.status
        assert record["message"] == solution.status.value
        if margin == 0.4:
            assert again == solution
        if margin == 3.0:
            assert record["lam"] == {"safety": None}
            assert math.isnan(again.lam["safety"])

    def test_broken_records(self) -> None:
        record = solve().to_dict()
        with pytest.raises(DataError, match="status 'FINE' is unknown, expected one of OPTIMAL"):
            DualSolution.from_dict(record | {"status": "FINE"})
        del record["lam"]
        with pytest.raises(DataError, match="fields missing: lam"):
            DualSolution.from_dict(record)

    def test_plain_python_numbers(self) -> None:
        def leaves(value: Any) -> list[Any]:
            return [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]

        assert {type(leaf) for leaf in leaves(solve().to_dict())} <= {float, int, str, bool, type(None)}

    @pytest.mark.parametrize(
        ("k", "beta", "start"),
        [
            (128, 1.5, "On new prompts the policy of this lambda changes g by +0.2"),
            (128, 0.1, "Do not trust the prediction or lambda: 1.4 of 128 responses carry a prompt's prediction"),
        ],
    )
    def test_f28_verdict(self, k: int, beta: float, start: str) -> None:
        generator = np.random.default_rng(0)
        reward, utility = generator.normal(size=(2, 200 * k))
        solution = solve_dual(reward, utility, np.repeat(np.arange(200), k), beta=beta, constraints=[Margin("g", 0.3)])
        diagnostics = solution.diagnostics
        assert diagnostics["verdict"].startswith(start)
        sd = np.std(reward + solution.lam["g"] * utility) / beta
        assert diagnostics["sd_over_beta"] == pytest.approx(sd, rel=0.1)

    def test_diagnostics_count_prompts(self) -> None:
        solution = solve(prompt_N=["a", "a", "a", "b", "b", "c"])
        assert solution.diagnostics["responses_per_prompt"] == {"min": 1.0, "median": 2.0, "max": 3.0}
        assert solution.diagnostics["num_single_response_prompts"] == 1
        assert solution.diagnostics["num_prompts"] == 3
        assert 1.0 < solution.diagnostics["ess"]["min"] <= solution.diagnostics["ess"]["max"] <= 3.0
        assert 0.0 < solution.diagnostics["kl_over_log_k"] < 1.0

    def test_sd_over_beta_is_unbiased_for_a_sample(self) -> None:
        solution = solve(constraints=[Margin("safety", -5.0)])
        variance = np.mean([np.var(REWARD[:3], ddof=1), np.var(REWARD[3:], ddof=1)])
        assert solution.lam["safety"] == 0.0
        assert solution.diagnostics["sd_over_beta"] == pytest.approx(math.sqrt(variance) / 0.5, rel=1e-12)
        weighted = solve(constraints=[Margin("safety", -5.0)], log_weight_N=np.zeros(6))
        assert weighted.diagnostics["sd_over_beta"] == pytest.approx(math.sqrt(variance * 2 / 3) / 0.5, rel=1e-12)

    def test_weighted_table_says_so(self) -> None:
        assert solve(log_weight_N=np.zeros(6)).diagnostics["verdict"].startswith("Exact if the weighted table")
        assert solve(log_weight_N=np.full(6, 3.0)).lam["safety"] == pytest.approx(
            solve(estimator="empirical").lam["safety"], rel=1e-12
        )
