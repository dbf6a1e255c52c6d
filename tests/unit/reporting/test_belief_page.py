"""The diagnostics page: its numbers against the dual, what it says where nothing can be examined, and its form."""

from __future__ import annotations

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dual_worlds import World

from can_dist.dual import (
    DualSolution,
    Margin,
    ScoreTable,
    cross_fit,
    diagnose,
    dual_curve,
    predict,
    solve_table,
)
from can_dist.measuring.examination import as_solved, examine
from can_dist.reporting.belief_page import write_diagnostics
from can_dist.reporting.figures.belief import LINE, _label_places

HOSTILE = "<script>alert(1)</script>"


def gaussian(num_prompts: int = 60, num_responses: int = 24, num_constraints: int = 1, seed: int = 0) -> ScoreTable:
    score = np.random.default_rng(seed).normal(size=(num_prompts * num_responses, num_constraints + 1))
    prompts = np.repeat([f"p{i:03d}" for i in range(num_prompts)], num_responses)
    return ScoreTable.build(score[:, 0], score[:, 1:], prompts)


def solved(table: ScoreTable, *margins: float, beta: float = 1.0, **options: Any) -> DualSolution:
    """The paper's solution unless another estimator is named: what is drawn of the dual is the paper's."""
    constraints = [Margin(f"g{j}", margin) for j, margin in enumerate(margins)]
    return solve_table(table, beta=beta, constraints=constraints, **{"estimator": "empirical", **options})


def weighted_table() -> ScoreTable:
    score = np.random.default_rng(4).normal(size=(60, 2))
    return ScoreTable.build(score[:, 0], score[:, 1], np.repeat(range(10), 6), np.log(np.tile([1, 2, 3, 1, 2, 1], 10)))


@functools.cache
def case(name: str) -> tuple[ScoreTable, DualSolution]:
    """A table and a solution of each kind that the page must show."""
    if name == "two constraints":
        table = gaussian(num_constraints=2)
        return table, solved(table, 0.5, 0.3)
    if name == "gaussian estimator":
        table = gaussian()
        return table, solved(table, 0.5, beta=0.05, estimator="gaussian")
    if name == "jackknife":
        table = gaussian()
        return table, solved(table, 0.5, estimator="jackknife")
    if name == "price of nothing":
        table = gaussian(num_prompts=200)
        return table, solved(table, -0.5)
    if name == "weighted":
        table = weighted_table()
        return table, solved(table, 0.4)
    if name == "infeasible":
        table = gaussian()
        return table, solved(table, 9.0, throw=False)
    if name == "equality":
        table = gaussian()
        constraint = Margin("g0", -0.5, equal=True)
        return table, solve_table(table, beta=1.0, constraints=[constraint])
    if name == "one response":
        table = ScoreTable.build([0.0, 1.0, 2.0], [1.0, 0.0, 2.0], ["a", "b", "c"])
        return table, solved(table, -0.5)
    if name == "some single responses":
        table = ScoreTable.build(np.arange(9.0), [0.0, 1, 0, 3, 1, 0, 2, 2, 7], list("abbbcccde"))
        return table, solved(table, 0.5)
    if name == "one prompt":
        table = gaussian(num_prompts=1, num_responses=100)
        return table, solved(table, 0.5)
    if name == "constant utility":
        table = ScoreTable.build(np.arange(12.0), np.zeros(12), np.repeat(range(3), 4))
        return table, solved(table, -0.1)
    if name == "no constraint":
        table = ScoreTable.build(np.arange(12.0), np.zeros((12, 0)), np.repeat(range(3), 4))
        return table, solved(table)
    assert name == "one constraint"
    table = gaussian()
    return table, solved(table, 0.5)


CASES = [
    "one constraint", "two constraints", "gaussian estimator", "jackknife", "price of nothing", "weighted",
    "infeasible", "equality", "one response", "some single responses", "one prompt", "constant utility",
    "no constraint",
]  # fmt: skip


class Page(HTMLParser):
    """The visible text, the figures' labels, and where the verdict, the first table and the first figure begin."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        if tag in ("td", "th", "dd"):
            self.words.append(" ")
        self.labels += [value or "" for key, value in attrs if key == "aria-label"]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)


@functools.cache
def html_of(name: str, folder: Path) -> str:
    path = folder / f"{name}.html"
    table, solution = case(name)
    write_diagnostics(table, solution, path, reward_name="helpfulness")
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


class TestPage:
    @pytest.mark.parametrize("name", CASES)
    def test_every_case_gives_a_whole_page_of_known_numbers(self, name: str, folder: Path) -> None:
        html = html_of(name, folder)
        page = Page(html)
        assert "Can the prediction be believed?" in page.text
        assert html.endswith("</html>\n")
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b|Undefined", page.text + " ".join(page.labels))
        assert not re.search(r"https?:|//\w|@import|url\((?!#)", html)
        ids = re.findall(r'\bid="([^"]*)"', html)
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize(
        ("name", "figures"),
        [
            ("one constraint", 2 + 1 + 1 + 2),  # weights, λ̂, dual, frontier
            ("two constraints", 2 + 2 + 2 + 4),
            ("weighted", 1 + 2),
            ("infeasible", 2),
            ("equality", 2 + 1),
            ("one response", 0),
            ("no constraint", 0),
        ],
    )
    def test_figures(self, name: str, figures: int, folder: Path) -> None:
        assert Page(html_of(name, folder)).tags.count("svg") == figures

    def test_verdict_then_tables_then_figures(self, folder: Path) -> None:
        html = html_of("one constraint", folder)
        section = html[html.index('<section id="belief">') :]
        places = [section.index(mark) for mark in ('<p class="verdict', '<p class="trust', "<table", "<svg")]
        assert places == sorted(places)
        assert section.rindex("<table", 0, section.index("<details>")) < places[3]

    def test_numbers_of_the_diagnosis_stand_in_the_tables(self, folder: Path) -> None:
        table, solution = case("two constraints")
        found, text = (
            diagnose(table, solution, reward_name="helpfulness"),
            Page(html_of("two constraints", folder)).text,
        )
        assert found.verdict in text
        ess = solution.diagnostics["ess"]
        assert " ".join(f"{ess[key]:.1f}" for key in ("min", "p10", "median", "p90", "max")) in text
        assert f"KL from the reference, nats {solution.predicted['kl']:.3g} at most ln K = 3.18" in text
        assert f"KL / ln K {solution.diagnostics['kl_over_log_k']:.2f}" in text
        assert f"Pareto k̂, all prompts {found.pareto_k['pooled']:.2f}".replace("-", "−") in text
        assert "past √(2 ln K) = 2.52 the weights collapse" in text
        for estimator in ("empirical", "jackknife", "gaussian"):
            assert f"{found.lam[estimator]['g1']:.2f} [" in text or f"{found.lam[estimator]['g1']:.3f} [" in text
        assert f"they differ by up to {100 * found.disagreement:.1f}%" in text
        for row in found.influence[:5]:
            assert row.prompt in text
        assert found.influence[5].prompt not in text
        assert f"sd within a prompt {found.scorers['helpfulness'].within_sd:.3g}" in text

    @pytest.mark.parametrize(
        ("name", "why"),
        [("jackknife", "the bias of few responses, which the jackknife removes"), ("gaussian estimator", "Gaussian")],
    )
    def test_a_lambda_beside_the_papers_dual_says_why_it_is_not_at_its_least(
        self, name: str, why: str, folder: Path
    ) -> None:
        table, solution = case(name)
        paper = solve_table(
            table, beta=solution.beta, constraints=[Margin("g0", 0.5)], estimator="empirical", throw=False
        )
        text = Page(html_of(name, folder)).text
        assert (
            f"Drawn is the paper’s dual, which is least at λ = {paper.lam['g0']:.3g}; λ̂ = {solution.lam['g0']:.3g}"
            in text
        )
        assert why in text[text.index("Drawn is the paper’s dual") :]
        assert "Drawn is the paper’s dual" not in Page(html_of("one constraint", folder)).text

    def test_same_input_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            table = gaussian(num_constraints=2)
            write_diagnostics(table, solved(table, 0.5, 0.3), tmp_path / f"{name}.html")
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()

    def test_hostile_names_stay_text(self, tmp_path: Path) -> None:
        score = np.random.default_rng(2).normal(size=(120, 2))
        table = ScoreTable.build(score[:, 0], score[:, 1], np.repeat([HOSTILE, "b", "c", "d", "e"], 24))
        solution = solve_table(table, beta=1.0, constraints=[Margin('"><img onerror=x>', 0.4)])
        write_diagnostics(table, solution, tmp_path / "page.html", reward_name=HOSTILE)
        page = Page((tmp_path / "page.html").read_text("utf-8"))
        assert not {"script", "img"} & set(page.tags)
        assert page.text.count(HOSTILE) >= 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("infeasible", "Not examined further: no finite λ was reached (infeasible"),
        ("equality", "Not examined further: a constraint met exactly has a negative multiplier (g0)"),
        ("one response", "Not examined further: every prompt has one response"),
        ("no constraint", "Not examined further: there is no constraint"),
        ("weighted", "Exact if the weighted table enumerates all that the reference can say"),
        ("weighted", "nothing was sampled, the other estimators do not apply"),
        ("one prompt", "No cross-fitted prediction: one prompt cannot be held out from itself."),
        ("price of nothing", "Lambda is 0: the margin costs nothing."),
    ],
)
def test_what_cannot_be_examined_is_said(name: str, words: str, folder: Path) -> None:
    assert words in Page(html_of(name, folder)).text


def test_nothing_sampled_is_compared_on_a_weighted_table(folder: Path) -> None:
    text = Page(html_of("weighted", folder)).text
    assert "Estimators side by side" not in text
    assert "K/4" not in text
    assert "effective sample size is below 10" not in text


class TestHeadline:
    @pytest.mark.parametrize(
        ("world", "estimator", "kind", "start"),
        [
            (World("gaussian", 0.5, num_prompts=300), "jackknife", "met", "May be trusted. On new prompts "),
            (
                World("gaussian", 10.0, num_prompts=200),
                "empirical",
                "unmet",
                "Do not trust the prediction or lambda: 1.4 of 128 ",
            ),
            (
                World("uniform", 1.0, -0.5, -0.4, 200, 16),
                "jackknife",
                "within",
                "May be trusted roughly: for what the policy ",
            ),
        ],
    )
    def test_kinds(self, world: World, estimator: str, kind: str, start: str) -> None:
        table = ScoreTable.build(*world.sample(0))
        margins = [Margin("g", world.margin)]
        solution = solve_table(table, beta=world.beta, constraints=margins, estimator=estimator)
        headline = examine(table, solution)["headline"]
        assert (headline["kind"], headline["text"][: len(start)]) == (kind, start)


class TestExamination:
    def test_it_is_json_and_says_the_same_twice(self) -> None:
        for name in CASES:
            table, solution = case(name)
            first = examine(table, solution)
            assert json.loads(json.dumps(first, allow_nan=False)) == first
            assert examine(table, solution) == first

    @pytest.mark.parametrize(("name", "axis"), [("one constraint", 0), ("two constraints", 1)])
    def test_curves_of_neighbouring_margins_are_the_duals_of_those_margins(self, name: str, axis: int) -> None:
        table, solution = case(name)
        curve = examine(table, solution)["dual_curves"][f"g{axis}"]
        asked = solution.margin[f"g{axis}"]
        grid, margins = np.array(curve["lam"]), np.array(curve["margins"])
        assert margins.size == 5
        assert margins[2] == asked
        np.testing.assert_allclose(np.diff(margins), margins[1] - margins[0])
        for margin, least in zip(margins, curve["minima"], strict=True):
            margin_J = solution.margin_vector
            margin_J[axis] = margin
            exact = dual_curve(table, beta=1.0, margin_J=margin_J, lam_J=solution.lam_vector, axis=axis, lam_grid=grid)
            np.testing.assert_allclose(np.array(curve["value"]) - grid * (margin - asked), exact, rtol=1e-10)
            assert abs(grid[np.argmin(exact)] - least) <= grid[1] - grid[0]
        assert curve["minima"][2] == pytest.approx(solution.lam[f"g{axis}"], abs=1e-3)
        assert np.all(np.diff(curve["minima"]) > 0)

    def test_neighbours_of_a_margin_that_costs_nothing_lie_above_it(self) -> None:
        curve = examine(*case("price of nothing"))["dual_curves"]["g0"]
        assert curve["margins"][0] == -0.5
        assert curve["minima"][0] == 0.0
        assert len(curve["margins"]) == 5
        assert 0.0 < curve["minima"][1] < curve["minima"][4] < curve["lam"][-1]

    def test_weights(self) -> None:
        table, solution = case("one constraint")
        found = examine(table, solution)["weights"]
        score = (table.reward_N + solution.lam["g0"] * table.utility_JN[0]).reshape(60, 24)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        count, _ = np.histogram(1 / (weight**2).sum(axis=1), found["ess_edges"])
        assert found["ess_count"] == count.tolist()
        assert sum(count) == 60
        largest = np.quantile(weight.max(axis=1), [0.0, 0.5, 1.0])
        assert [found["largest_weight"][i] for i in (0, 50, 100)] == pytest.approx(largest)
        assert found["even_weight"] == pytest.approx(1 / 24)
        assert found["share_one_response"] == pytest.approx(np.mean(weight.max(axis=1) > 0.5))

    def test_prompts_with_one_response_have_no_weights_to_show(self) -> None:
        table, solution = case("some single responses")
        assert sum(examine(table, solution)["weights"]["ess_count"]) == 2

    @pytest.mark.parametrize("name", ["one constraint", "two constraints"])
    def test_the_frontier_runs_through_the_solution_and_other_solves(self, name: str) -> None:
        table, solution = case(name)
        curve = examine(table, solution)["frontier"]["g0"]
        at = curve["margin"].index(0.5)
        assert curve["reward_improvement"][at] == pytest.approx(solution.predicted["reward_improvement"], abs=1e-6)
        assert curve["kl"][at] == pytest.approx(solution.predicted["kl"], abs=1e-6)
        assert curve["kl_low"][at] < curve["kl"][at] < curve["kl_high"][at]
        assert curve["attainable"] == solution.feasibility["attainable"]["g0"]
        other = solved(table, curve["margin"][12], *solution.margin_vector[1:])
        assert curve["lam"][12] == pytest.approx(other.lam["g0"], rel=1e-5)
        assert curve["kl"][12] == pytest.approx(other.predicted["kl"], rel=1e-5)
        others = predict(table, other.lam_vector, 1.0, other.margin_vector)
        assert curve["ess"][12] == pytest.approx(np.median(others.ess_P), rel=1e-5)

    def test_an_infeasible_margin_still_has_a_frontier(self) -> None:
        curve = examine(*case("infeasible"))["frontier"]["g0"]
        assert curve["asked"] == 9.0 > curve["attainable"] > max(curve["margin"])

    def test_cross_fit_is_that_of_the_dual(self) -> None:
        table, solution = case("gaussian estimator")
        margins = [Margin("g0", 0.5)]
        expected = cross_fit(table, beta=0.05, constraints=margins, estimator="gaussian")
        found = examine(table, solution)["cross_fit"]
        assert found["improvement"]["g0"]["mean"] == expected.improvement["g0"].mean
        assert found["kl"]["high"] == expected.kl.high
        assert found["lam"]["g0"] == expected.lam_FJ[:, 0].tolist()
        assert found["num_folds"] == 5

    def test_folds_are_asked_what_the_solve_was_asked(self) -> None:
        table = gaussian(num_constraints=2)
        constraints = [Margin("level", threshold=0.4), Margin("gain", margin=0.2)]
        raised = solve_table(table, beta=1.0, constraints=constraints, confidence=0.9)
        level, gain = as_solved(raised)
        assert level.threshold == pytest.approx(0.4 + raised.safety_margin["level"])
        assert gain.margin == pytest.approx(0.2 + raised.safety_margin["gain"])
        assert raised.safety_margin["level"] > 0
        again = solve_table(table, beta=1.0, constraints=[level, gain])
        assert again.lam_vector == pytest.approx(raised.lam_vector, rel=1e-4)
        (equal,) = as_solved(case("equality")[1])
        assert equal == Margin("g0", -0.5, equal=True)


def test_labels_of_curves_that_end_together_are_spread() -> None:
    base = np.linspace(0.0, 1.0, 5)
    near = _label_places([base - 0.001 * i for i in range(3)])
    assert np.diff(near) == pytest.approx([-LINE * 1.002] * 2)
    assert near[1] == pytest.approx(0.999)
    apart = [base - 0.5 * i for i in range(3)]
    assert _label_places(apart) == pytest.approx([1.0, 0.5, 0.0])
    assert _label_places([base]) == [1.0]
