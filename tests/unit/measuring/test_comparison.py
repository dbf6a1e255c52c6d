"""Methods beside each other: ellipses that cover, known strengths recovered, tables, ratios, and the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Ellipse
from scipy.special import expit

from can_dist.errors import ConfigError, DataError, NumericalError
from can_dist.measuring.comparison import (
    Cost,
    MethodResult,
    comparison_table,
    confidence_ellipse,
    cost_table,
    method_result,
    one_shot_ratio,
    short_count,
    short_time,
)
from can_dist.measuring.ranking import bradley_terry, rank_methods
from can_dist.reporting.figures.comparison import GAINS, PRICE, REACH, Plane, comparison_svg

COST = Cost(1_200_000, 3_400_000, 12_345_678, 4000.0, 1)
COVARIANCE_33 = np.array([[1.0, -0.9, 0.2], [-0.9, 2.0, 0.3], [0.2, 0.3, 0.4]])  # reward, safety, KL


def method(name: str, reward: float, safety: float, num_prompts: int = 60, seed: int = 0, margin: float = 1.0) -> Any:
    value_P3 = np.random.default_rng(seed).multivariate_normal([reward, safety, 0.5], COVARIANCE_33, size=num_prompts)
    return method_result(name, *value_P3.T, margin=margin, verdict="met", cost=COST)


def inside(result: MethodResult, reward: float, safety: float) -> bool:
    """Whether a point lies in the ellipse, by the ellipse's own axes."""
    ellipse = confidence_ellipse(result.safety_P, result.reward_P)
    turn = np.radians(ellipse.angle)
    x, y = safety - ellipse.x, reward - ellipse.y
    along, across = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    return bool((2 * along / ellipse.width) ** 2 + (2 * across / ellipse.height) ** 2 <= 1)


# ---------------------------------------------------------------------------------------------------------- ellipses


@pytest.mark.parametrize("num_prompts", [6, 50])
def test_ellipse_covers_95_percent(num_prompts: int) -> None:
    covered = np.mean([inside(method("m", 0.3, 0.7, num_prompts, seed), 0.3, 0.7) for seed in range(2000)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_ellipse_edge_is_where_hotellings_t2_says() -> None:
    result = method("m", 0.3, 0.7, num_prompts=20)
    ellipse = confidence_ellipse(result.safety_P, result.reward_P)
    region = Ellipse((ellipse.x, ellipse.y), ellipse.width, ellipse.height, angle=ellipse.angle)
    edge = region.get_patch_transform().transform(np.eye(2)) - [result.safety_gain, result.reward_gain]
    covariance_22 = np.cov(result.safety_P, result.reward_P) / 20
    distance = np.einsum("ni,ij,nj->n", edge, np.linalg.inv(covariance_22), edge)
    np.testing.assert_allclose(distance, 2 * 19 / 18 * 3.554557, rtol=1e-6)  # F_{2,18}(0.95)


def test_means_are_over_prompts() -> None:
    result = method("m", 0.3, 0.7)
    means = (result.reward_gain, result.safety_gain, result.kl)
    assert means == pytest.approx([result.reward_P.mean(), result.safety_P.mean(), result.kl_P.mean()])


# ------------------------------------------------------------------------------------------------------------- table


def test_table_reads_well() -> None:
    table = comparison_table([method("MoCAN", 0.5, 1.0), method("DPO-H", 1.0, -1.0), method("DPO-S", -0.5, 3.0)])
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert all(re.fullmatch(r"[+-]\d\.\d\d \[[+-]\d\.\d\d, [+-]\d\.\d\d\]", row["safety gain"]) for row in rows)
    assert rows[0] | {"helpfulness gain": "", "safety gain": ""} == {
        "method": "MoCAN", "helpfulness gain": "", "safety gain": "", "margin": "1", "verdict": "met",
        "KL (nats)": f"{method('MoCAN', 0.5, 1.0).kl:.3g}",
    }  # fmt: skip


def test_cost_reads_well() -> None:
    table = cost_table({"MoCAN": COST, "old": Cost(0, 0, 5, None, 2)})
    assert table.rows == (("MoCAN", "1", "12.3M", "1.2M", "3.4M", "1 h 6 min"), ("old", "2", "5", "0", "0", "–"))
    assert len(table.header) == 6


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (940, "940"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (999_600, "1M"), (7 * 10**12, "7e+03G")],
)
def test_counts_are_short(count: int, text: str) -> None:
    assert short_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (42.0, "42 s"), (59.7, "1 min 0 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


# ----------------------------------------------------------------------------------------------------------- ranking


def test_bradley_terry_recovers_known_strengths() -> None:
    strength_M = np.array([1.2, 0.3, -0.4, -1.1])
    wins_MM = 1e6 * expit(strength_M[:, None] - strength_M[None, :])
    np.testing.assert_allclose(bradley_terry(wins_MM[None])[0], strength_M, atol=1e-9)


def test_bradley_terry_of_two_is_the_log_odds() -> None:
    strength_M = bradley_terry(np.array([[[0.0, 30.0], [10.0, 0.0]]]))[0]
    assert strength_M[0] - strength_M[1] == pytest.approx(np.log(3.0))


def test_bradley_terry_maximises_the_likelihood() -> None:
    wins_MM = np.random.default_rng(0).integers(1, 50, (5, 5)).astype(float)
    np.fill_diagonal(wins_MM, 0)
    strength_M = bradley_terry(wins_MM[None])[0]
    chance_MM = expit(strength_M[:, None] - strength_M[None, :])
    np.testing.assert_allclose(((wins_MM + wins_MM.T) * chance_MM).sum(1), wins_MM.sum(1), rtol=1e-9)  # expected = won
    assert strength_M.sum() == pytest.approx(0.0, abs=1e-9)


def test_wins_on_one_side_only_have_no_finite_strength() -> None:
    with pytest.raises(DataError, match=r"a pair has wins on one side only\. Give every pair a tie, ½ on both sides\."):
        bradley_terry(np.array([[[0.0, 10.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("wins", [1e-3, 1.0, 1e6])
def test_strengths_converge_from_anywhere(wins: float) -> None:
    beats_MM = np.triu(np.full((6, 6), wins), 1) + np.tril(np.full((6, 6), wins * 1e-5), -1)
    strength_M = bradley_terry(beats_MM[None])[0]
    assert (np.diff(strength_M) < 0).all()
    assert strength_M[0] - strength_M[-1] > 11


def test_a_search_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("can_dist.measuring.ranking.MAX_STEPS", 1)
    with pytest.raises(NumericalError, match=r"no convergence in 1 Newton steps\."):
        bradley_terry(np.array([[[0.0, 30.0], [10.0, 0.0]]]))


def test_win_rates_are_paired_and_ties_count_half() -> None:
    ranking = rank_methods({"a": [1.0, 2.0, 3.0, 4.0], "b": [0.0, 2.0, 5.0, 1.0]}, num_replicates=2)
    np.testing.assert_array_equal(ranking.win_MM, [[np.nan, 0.625], [0.375, np.nan]])
    assert ranking.names == ("a", "b")


def test_method_that_never_loses_has_a_finite_strength() -> None:
    ranking = rank_methods({"best": np.ones(100), "worst": np.zeros(100)}, num_replicates=10)
    assert ranking.strength_M[0] - ranking.strength_M[1] == pytest.approx(np.log(201.0))
    assert np.isfinite([ranking.low_M, ranking.high_M]).all()


def test_strength_intervals_cover() -> None:
    rng, covered = np.random.default_rng(1), 0
    strength_M = np.array([0.6, 0.0, -0.6])  # Gumbel scores win with the logistic probability of their difference
    for seed in range(200):
        scores = {str(m): s + rng.gumbel(size=150) for m, s in enumerate(strength_M)}
        ranking = rank_methods(scores, num_replicates=200, seed=seed)
        covered += (ranking.low_M <= strength_M) & (strength_M <= ranking.high_M)
    assert ((covered / 200 > 0.88) & (covered / 200 < 0.99)).all()


def test_ranking_is_the_same_every_time() -> None:
    scores = {name: np.random.default_rng(seed).random(40) for seed, name in enumerate("abc")}
    np.testing.assert_array_equal(rank_methods(scores).low_M, rank_methods(scores).low_M)


# ------------------------------------------------------------------------------------------------------------- ratio


def test_one_shot_ratio_counts_to_the_first_round_that_meets_the_margin() -> None:
    ratio = one_shot_ratio(100, [100, 100, 100, 100], [0.2, 0.9, 1.0, 0.8], margin=1.0)
    assert (ratio.ratio, ratio.reached, ratio.rounds, ratio.baseline_tokens) == (3.0, True, 3, 300)


def test_one_shot_ratio_of_a_loop_that_never_arrives_is_a_bound() -> None:
    ratio = one_shot_ratio(100, [150, 150], [0.2, 0.9], margin=1.0)
    assert (ratio.ratio, ratio.reached, ratio.rounds) == (3.0, False, 2)


# ----------------------------------------------------------------------------------------------------------- picture

METHODS = [
    method("MoCAN", 0.62, 1.02, 400, 1),
    method("C-DPO", 0.55, 1.1, 400, 2),
    method("SACPO (DPO → DPO)", 0.4, 1.3, 400, 3),
    method("DPO-H", 1.1, -0.4, 400, 4),
    method("DPO-S", -0.4, 1.8, 400, 5),
]
LAM = np.linspace(0, 3, 40)
FRONTIER = np.stack([-0.3 + 2.1 * (1 - np.exp(-LAM)), 1.15 - 0.17 * LAM**2])


RAY = np.stack([np.linspace(0, 1.5, 9), np.linspace(0, 0.6, 9)])


def draw(methods: list[MethodResult] = METHODS, frontier: Any = FRONTIER, ray: Any = RAY, plane: Plane = GAINS) -> str:
    curves = [("predicted frontier", frontier), ("MoCAN, any strength", ray)]
    return comparison_svg(plane, methods, curves, label="methods", prefix="cmp")


@pytest.mark.parametrize("plane", [GAINS, PRICE])
def test_picture_is_well_formed_and_the_same_every_time(plane: Plane) -> None:
    svg = draw(plane=plane)
    assert svg == draw(plane=plane)
    root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in (
        *(result.name for result in METHODS),
        "reference",
        "predicted frontier",
        "MoCAN, any strength",
        "margin 1",
    ):
        assert texts.count(name) == 1
    assert "var(--policy)" in svg
    assert "#0" not in re.sub(r'"#cmp-[^"]*"|\(#cmp-[^)]*\)', "", svg)  # every colour is the page's


@pytest.mark.parametrize("plane", [GAINS, PRICE])
def test_every_margin_is_a_line(plane: Plane) -> None:
    svg = draw([METHODS[0], method("other", 0, 0, 400, margin=2.0)], plane=plane)
    assert svg.count("margin 1<") == svg.count("margin 2<") == 1
    assert svg.count("var(--margin)") == 2 * draw([METHODS[0]], plane=plane).count("var(--margin)")


def paths(plane: Plane, ray: Any) -> tuple[list[Any], tuple[float, float]]:
    """The curve of the ray as it is drawn, in data units, and the limits of the horizontal axis."""
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    plot = Axes.plot

    def kept(self: Any, *points: Any, **options: Any) -> Any:
        if options.get("label") == "MoCAN, any strength":
            drawn.append((self, np.array(points)))
        return plot(self, *points, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", kept)
        draw(ray=ray, plane=plane)
    ((ax, points),) = drawn
    return points, ax.get_xlim()


def test_curves_against_kl_end_at_the_furthest_method() -> None:
    """A frontier goes on to the best of all responses, at a KL that would leave the methods in a corner."""
    far = np.stack([np.linspace(0, 30, 601), np.linspace(0, 3, 601)])
    ellipses = [confidence_ellipse(result.kl_P, result.safety_P) for result in METHODS]
    furthest = REACH * max(ellipse.x + ellipse.width / 2 for ellipse in ellipses)
    points, (_, right) = paths(PRICE, far)
    assert 0.5 < points[0].max() <= furthest < right < 2.0
    assert points[0].size == (far[0] <= furthest).sum()
    points, _ = paths(GAINS, far)
    assert points[0].max() == 30


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Name in the legend → (left, top, right, bottom) of its text, widths by the font's metrics."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    found = {}
    for x, y, text in re.findall(r'text-anchor: start[^>]* x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)</text>', svg):
        width = TextPath((0, 0), text, size=11, prop=FontProperties(family="DejaVu Sans")).get_extents().width
        found[text] = (float(x), float(y) - 8, float(x) + width, float(y) + 2)
    return found


@pytest.mark.parametrize("spread", [0.0, 0.8])
@pytest.mark.parametrize("stem", ["P-SACPO (q=0.", 'MoCAN, labels "regression", pairs '])
def test_names_do_not_overlap_even_where_policies_do(spread: float, stem: str) -> None:
    rng = np.random.default_rng(0)
    methods = [method(f"{stem}{i}", *(spread * rng.random(2)), 300, i) for i in range(12)]
    svg = draw(methods)
    found = boxes(svg)
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    names = [found[m.name] for m in methods] + [found["reference"], found["predicted frontier"]]
    names.append(found["MoCAN, any strength"])
    for i, a in enumerate(names):
        assert a[0] >= 0
        assert a[2] <= width
        assert a[3] <= height
        for b in names[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_methods_differ_without_colours() -> None:
    from can_dist.reporting.figures.style import LINES, MARKERS

    looks = [(MARKERS[place % len(MARKERS)], str(LINES[place % len(LINES)])) for place in range(12)]
    assert len(set(looks)) == 12
    assert len({marker for marker, _ in looks}) == 12


def test_hostile_name_stays_text() -> None:
    svg = draw([method("<script>alert(1)</script> & $x^2$", 0.1, 0.2), method("b", 0.3, 0.4)], *[np.empty((2, 0))] * 2)
    assert "<script>" not in svg
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x^2$" in svg


def test_one_method_without_spread_can_be_drawn() -> None:
    constant = method_result("m", *[np.ones(5)] * 3, margin=0.5, verdict="met", cost=COST)
    assert "<svg" in draw([constant], *[np.empty((2, 0))] * 2)


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_gains_are_named() -> None:
    with pytest.raises(
        DataError, match=r"method 'm': reward gains of shape \(2,\), safety gains of shape \(3,\), KL of shape \(3,\)"
    ):
        method_result("m", [1, 2], [1, 2, 3], [0, 0, 0], margin=1, verdict="met", cost=COST)
    with pytest.raises(DataError, match=r"method 'm': a gain or a KL is not finite\. Evaluate it again\."):
        method_result("m", [1, 2, 3], [1, 2, 3], [0, 0, np.nan], margin=1, verdict="met", cost=COST)


def test_methods_that_cannot_be_compared_are_named() -> None:
    for methods in ([], [METHODS[0], METHODS[0]], [METHODS[0], method("short", 0, 0, 10)]):
        with pytest.raises(DataError, match=r"expected methods of different names, evaluated on the same prompts\."):
            comparison_table(methods)


def test_bad_scores_are_named() -> None:
    with pytest.raises(
        DataError, match=r"scores: a \[2\], b \[3\]; expected at least 2 methods, scored on the same 2 or"
    ):
        rank_methods({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(DataError, match=r"scores of 'b': nan at prompt 1; expected finite numbers\."):
        rank_methods({"a": [1, 2], "b": [1, np.nan]})
    with pytest.raises(ConfigError, match=r"num_replicates = 1: expected at least 2\."):
        rank_methods({"a": [1, 2], "b": [1, 2]}, num_replicates=1)


def test_bad_rounds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"100 tokens against 2 rounds of training with 1 measured gains; expected"):
        one_shot_ratio(100, [1, 2], [0.5], margin=1.0)
