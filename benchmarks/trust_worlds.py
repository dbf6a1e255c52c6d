"""Measure every sentence of trust: in worlds whose truth is known, how often it is printed and how often it is true.

A world is a law of prompts and responses whose true improvement E_{π_λ} g − E_{π_ref} g over new prompts is known at
every λ.

python benchmarks/trust_worlds.py --quick             # about a minute
python benchmarks/trust_worlds.py --write             # about four; writes the tables of docs/estimators.md
python benchmarks/trust_worlds.py --prompts 100       # all cells of 100 prompts, one a line; also --only, --tables
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers" / "worlds"))

import numpy as np
import numpy.typing as npt
from dual_worlds import LAWS, Law
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtri

from can_dist.dual import Margin, ScoreTable, Status, solve_table
from can_dist.dual.belief.trust import judge
from can_dist.dual.estimators import estimate
from can_dist.dual.jackknife import jackknife_moments
from can_dist.dual.moments import PromptMoments, prompt_moments

FloatArray = npt.NDArray[np.float64]
DATA = Path(os.environ.get("CAN_DIST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SCORES = DATA / "scores" / "amo_pku_test_821x9.npz"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "estimators.md"
BEGIN, END = "<!-- trust: begin -->", "<!-- trust: end -->"
NAMES = ("empirical", "jackknife", "gaussian")
RESPONSES = (4, 8, 16, 32, 128)
SIZES = (200, 1000)
"""Numbers of prompts of the tables: fewer than 200 say nothing."""
SEED = 70_000_000
"""Of the first table of a cell: none of the tables by which the conditions were chosen."""
GRID = np.linspace(-1.0, 4.0, 401)
"""λ + ρ at which the truth is tabulated; it is interpolated between."""

MORE_LAWS = {
    law.name: law
    for law in (
        Law("rare losers", lambda u: np.where(u < 0.02, -10.0, ndtri(np.clip((u - 0.02) / 0.98, 1e-300, 1 - 1e-16)))),
        Law("−lognormal(1)", lambda u: -np.exp(np.clip(ndtri(1 - u), -12, 5.0))),
    )
}


@dataclass(frozen=True)
class TrustWorld:
    """A world with a known truth.

    Attributes:
        name: for the table.
        beta: KL weight.
        margin: asked for.
        sample: draw reward, utility and prompt ids of P prompts with K responses each.
        gain: true improvement of π_λ over new prompts.
        kl: true KL(π_λ‖π_ref) over new prompts, nats.
    """

    name: str
    beta: float
    margin: float
    sample: Callable[[np.random.Generator, int, int], tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]]
    gain: Callable[[float], float]
    kl: Callable[[float], float]

    def lam(self) -> float:
        """Return the population's λ*."""
        return 0.0 if self.gain(0.0) >= self.margin else float(brentq(lambda lam: self.gain(lam) - self.margin, 0, 30))


@dataclass(frozen=True)
class Scales:
    """The prompts of a world of one law: their scales with probabilities, and how many responses they have.

    ``draw`` gives one scale per prompt; ``nodes`` the same law as points and weights; ``single`` the share of prompts
    with one response.
    """

    draw: Callable[[np.random.Generator, int], FloatArray] = lambda generator, count: np.ones(count)  # noqa: ARG005
    nodes: tuple[FloatArray, FloatArray] = field(default=(np.ones(1), np.ones(1)))
    single: float = 0.0


def mixture(values: tuple[float, ...], shares: tuple[float, ...], single: float = 0.0) -> Scales:
    """Return scales that take a few values."""
    points, weight = np.array(values), np.array(shares)
    return Scales(lambda generator, count: generator.choice(points, count, p=weight), (points, weight), single)


def lognormal_scales(median: float, sigma: float) -> Scales:
    """Return lognormal scales, cut at four standard deviations."""
    score = np.linspace(-4, 4, 161)
    weight = np.exp(-(score**2) / 2)
    points = median * np.exp(sigma * score)
    return Scales(
        lambda generator, count: median * np.exp(sigma * np.clip(generator.standard_normal(count), -4, 4)),
        (points, weight / weight.sum()),
    )


def law_world(name: str, law: Law, beta: float, margin: float, scales: Scales, rho: float = -0.5) -> TrustWorld:
    """Return a world of g = s z₁, r = s (ρ z₁ + √(1−ρ²) z₂), z₁ and z₂ of one law, s the prompt's scale."""
    point, log_weight = (value[::40] for value in law.nodes())
    log_weight = log_weight - logsumexp(log_weight)
    across = np.sqrt(1 - rho**2)

    def cumulants(theta: float) -> tuple[float, float]:
        joint = log_weight + theta * point
        norm = float(logsumexp(joint))
        return norm, float(np.exp(joint - norm) @ point)

    def tabulate(offset_G: FloatArray) -> tuple[FloatArray, FloatArray]:
        gain_G, kl_G = np.zeros(offset_G.size), np.zeros(offset_G.size)
        for scale, share in zip(*scales.nodes, strict=True):
            theta = scale * across / beta
            norm, mean = cumulants(theta)
            fixed = theta * mean - norm
            for index, offset in enumerate(offset_G):
                theta = scale * offset / beta
                norm, mean = cumulants(theta)
                gain_G[index] += share * scale * mean
                kl_G[index] += share * (theta * mean - norm + fixed)
        return gain_G, kl_G

    grid = GRID if scales.nodes[0].size < 10 else GRID[::8]
    gain_G, kl_G = tabulate(grid)

    def sample(
        generator: np.random.Generator, num_prompts: int, num_responses: int
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
        count_P = np.where(generator.random(num_prompts) < scales.single, 1, num_responses)
        scale_N = np.repeat(scales.draw(generator, num_prompts), count_P)
        first, second = (law.standard(generator.uniform(1e-16, 1, scale_N.size)) for _ in range(2))
        prompt_N = np.repeat(np.arange(num_prompts), count_P)
        return scale_N * (rho * first + across * second), scale_N * first, prompt_N

    return TrustWorld(
        name,
        beta,
        margin,
        sample,
        lambda lam: float(np.interp(lam + rho, grid, gain_G)),
        lambda lam: float(np.interp(lam + rho, grid, kl_G)),
    )


def table_world(name: str, reward_QM: FloatArray, utility_QM: FloatArray, beta: float, margin: float) -> TrustWorld:
    """Return the world whose prompts are the Q rows and whose responses are the M columns, all equally likely."""

    def tilted(lam: float) -> tuple[FloatArray, FloatArray]:
        score = (reward_QM + lam * utility_QM) / beta
        norm = logsumexp(score, axis=1, keepdims=True)
        return np.exp(score - norm), score - norm + np.log(score.shape[1])

    def sample(
        generator: np.random.Generator, num_prompts: int, num_responses: int
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
        row = np.repeat(generator.integers(reward_QM.shape[0], size=num_prompts), num_responses)
        column = generator.integers(reward_QM.shape[1], size=row.size)
        return reward_QM[row, column], utility_QM[row, column], np.repeat(np.arange(num_prompts), num_responses)

    centre_Q = utility_QM.mean(axis=1)
    return TrustWorld(
        name,
        beta,
        margin,
        sample,
        lambda lam: float(((tilted(lam)[0] * utility_QM).sum(axis=1) - centre_Q).mean()),
        lambda lam: float(np.prod(np.array(tilted(lam)), axis=0).sum(axis=1).mean()),
    )


def real_worlds() -> list[TrustWorld]:
    """Return the worlds of the 821 × 9 real scores: prompt by prompt, and all deviations pooled into one law."""
    if not SCORES.exists():
        return []
    score = np.load(SCORES)
    reward, utility = (score[name].astype(np.float64) for name in ("helpful", "harmless"))
    pooled = [(value - value.mean(axis=1, keepdims=True)).reshape(1, -1) for value in (reward, utility)]
    return [
        table_world("real scores", reward, utility, 1.0, 0.27),
        table_world("real scores, pooled", pooled[0], pooled[1], 1.0, 0.7),
    ]


def worlds() -> list[TrustWorld]:
    """Return the worlds of the table."""
    normal, one = LAWS["gaussian"], Scales()
    return [
        law_world("gaussian", normal, 1.0, 0.5, one),
        law_world("gaussian, β = ½", normal, 0.5, 0.5, one),
        law_world("gaussian, lognormal scales", normal, 1.0, 0.5, lognormal_scales(0.6, 0.7)),
        law_world("7 % with 20 times the spread", normal, 1.0, 0.26, mixture((0.25, 5.0), (0.93, 0.07))),
        law_world("70 % without spread", normal, 1.0, 0.3, mixture((0.0, 1.2), (0.7, 0.3))),
        law_world("half with one response", normal, 3.0, 0.2, Scales(single=0.5)),
        law_world("2 % with one response", normal, 1.0, 0.5, Scales(single=0.02)),
        law_world("t3", LAWS["t3"], 1.0, 0.5, one),
        law_world("lognormal", LAWS["lognormal"], 1.0, 0.5, one),
        law_world("−lognormal(1)", MORE_LAWS["−lognormal(1)"], 1.0, 0.3, one),
        law_world("skewed down", LAWS["skewed_down"], 1.0, 0.5, one),
        law_world("rare losers", MORE_LAWS["rare losers"], 1.0, 0.15, one),
        law_world("rare winners", LAWS["rare"], 1.0, 0.5, one),
        law_world("binary", LAWS["binary"], 1.0, 0.5, one),
        law_world("bimodal", LAWS["bimodal"], 1.0, 0.5, one),
        law_world("uniform", LAWS["uniform"], 1.0, 0.5, one),
        *real_worlds(),
    ]


@dataclass(frozen=True)
class Row:
    """One table of a world.

    Attributes:
        delivered: true improvement at λ̂ over the margin asked, by estimator; NaN where it has no λ̂.
        printed: whether both statements' conditions hold.
        true: whether the true improvement lies inside the printed interval.
        lam_printed: whether λ is said to be known.
        lam_true: whether λ* lies inside its interval.
        old_printed: whether the weights are those once called trusted (median ESS 10, tenth percentile 5).
        old_true: whether the truth lies inside margin ± 1.96 SE at the paper's λ̂.
        kl: KL of π_λ̂ predicted by the jackknife and by the paper's estimator, over the truth.
    """

    delivered: dict[str, float]
    printed: bool
    true: bool
    lam_printed: bool
    lam_true: bool
    old_printed: bool
    old_true: bool
    kl: tuple[float, float]


def measure(world: TrustWorld, num_prompts: int, num_responses: int, seed: int, lam: float) -> Row | None:
    """Solve one table with every estimator and judge the default's λ̂; None where the table cannot meet the margin."""
    table = ScoreTable.build(*world.sample(np.random.default_rng(seed), num_prompts, num_responses))
    solution = solve_table(
        table, beta=world.beta, constraints=[Margin("g", world.margin)], estimator="empirical", throw=False
    )
    if solution.status is not Status.OPTIMAL:
        return None
    margin_J, start_J = solution.margin_vector, solution.lam_vector
    found = {name: estimate(table, world.beta, margin_J, name, start_J) for name in NAMES}
    used = found["jackknife"] if found["jackknife"].converged else found["empirical"]
    trust = judge(table, world.beta, margin_J, used)
    value, truth = float(used.lam_J[0]), world.gain(float(used.lam_J[0]))
    paper, ess_P = found["empirical"], found["empirical"].moments.ess_P
    low_ess, typical_ess = np.quantile(ess_P[table.num_responses_P > 1], [0.1, 0.5])
    mean_interval_P = paper.moments.gain_PJ[:, 0]
    reach = 1.96 * mean_interval_P.std(ddof=1) / np.sqrt(num_prompts)
    kl = [float(moments.kl_P.mean()) for moments in _kl_moments(table, used.lam_J, world.beta)]
    return Row(
        {name: world.gain(float(item.lam_J[0])) / world.margin for name, item in found.items()}
        | {"default": truth / world.margin},
        not trust.objection,
        trust.delivered[0].low <= truth <= trust.delivered[0].high,
        trust.lam_known,
        abs(value - lam) <= trust.lam_error_J[0] * value if value > 0 else lam == 0,
        bool(typical_ess >= 10 and low_ess >= 5),
        abs(world.gain(float(paper.lam_J[0])) - mean_interval_P.mean()) <= reach,
        (kl[0] / world.kl(value), kl[1] / world.kl(value)),
    )


def _kl_moments(table: ScoreTable, lam_J: FloatArray, beta: float) -> tuple[PromptMoments, PromptMoments]:
    moments = prompt_moments(table, lam_J, beta)
    return jackknife_moments(table, lam_J, beta, moments), moments


def cell(world: TrustWorld, num_prompts: int, num_responses: int, num_tables: int) -> list[Row | None]:
    """Return the tables of one world, one P and one K."""
    lam = world.lam()
    return [measure(world, num_prompts, num_responses, SEED + seed, lam) for seed in range(num_tables)]


def counts(quick: bool) -> dict[int, int]:
    """Return the tables by number of prompts."""
    return dict(zip(SIZES, (40, 8) if quick else (120, 24), strict=True))


def estimator_lines(cells: Mapping[tuple[str, int, int], list[Row | None]]) -> list[str]:
    """Return the table of what each estimator's λ̂ delivers of the margin asked: medians at P = 200 and 1,000."""
    lines = ["| world | " + " | ".join(f"K = {count}" for count in RESPONSES) + " |", "|---" * 6 + "|"]
    for name in dict.fromkeys(key[0] for key in cells):
        texts = []
        for count in RESPONSES:
            rows = [row for size in SIZES for row in cells[name, count, size] if row is not None]
            shares = [np.nanmedian([row.delivered[one] for row in rows]) if rows else np.nan for one in NAMES]
            texts.append(" / ".join("–" if np.isnan(share) else f"{share:.2f}" for share in shares))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def sentence_lines(
    cells: Mapping[tuple[str, int, int], list[Row | None]], printed: str, true: str, sizes: Sequence[int]
) -> list[str]:
    """Return how often a statement is printed and then true, by world and K, over tables of ``sizes`` prompts."""
    lines = ["| world | " + " | ".join(f"K = {count}" for count in RESPONSES) + " |", "|---" * 6 + "|"]
    for name in dict.fromkeys(key[0] for key in cells):
        texts = []
        for count in RESPONSES:
            tables = [row for size in sizes for row in cells[name, count, size]]
            said = [getattr(row, true) for row in tables if row is not None and getattr(row, printed)]
            texts.append(f"{len(said)}/{len(tables)}" + (f": {np.mean(said):.1%}" if said else ""))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def below(
    cells: Mapping[tuple[str, int, int], list[Row | None]], printed: str, true: str, least: int = 10
) -> list[str]:
    """Name every cell whose statement is true less often than 95 % minus two standard errors.

    Cells with fewer than ``least`` statements decide nothing by themselves and are counted over all of them.
    """
    named, few = [], []
    for (name, count, size), tables in cells.items():
        said = [getattr(row, true) for row in tables if row is not None and getattr(row, printed)]
        if not said:
            continue
        if len(said) < least:
            few += said
        elif np.mean(said) < 0.95 - 2 * np.sqrt(0.95 * 0.05 / len(said)):
            named.append(f"{name}, K = {count}, P = {size}: {np.mean(said):.1%} of {len(said)}")
    rest = f"{np.mean(few):.1%} of {len(few)} in cells with fewer than {least}" if few else "no cell with few"
    return [*(named or ["none"]), rest]


def kl_lines(cells: Mapping[tuple[str, int, int], list[Row | None]]) -> list[str]:
    """Return the predicted KL over the true one at λ̂: the jackknife's and the paper's, medians at P ≥ 200."""
    lines = ["| world | " + " | ".join(f"K = {count}" for count in RESPONSES) + " |", "|---" * 6 + "|"]
    for name in dict.fromkeys(key[0] for key in cells):
        texts = []
        for count in RESPONSES:
            rows = [row for size in SIZES for row in cells[name, count, size] if row is not None]
            pair = np.nanmedian([row.kl for row in rows], axis=0) if rows else (np.nan, np.nan)
            texts.append(f"{pair[0]:.2f} / {pair[1]:.2f}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def report(cells: Mapping[tuple[str, int, int], list[Row | None]]) -> str:
    """Return the block of docs/estimators.md."""
    parts = [
        "Improvement that π_λ̂ truly delivers over the margin asked, median over tables of 200 and 1,000 prompts: "
        "paper's (empirical) / jackknife / gaussian.",
        *("", *estimator_lines(cells), ""),
        "How often the interval of what π_λ̂ delivers is printed, and how often the truth then lies inside.",
        *("", *sentence_lines(cells, "printed", "true", SIZES), ""),
        "Cells in which it is true less often than 95 % minus two standard errors: "
        + "; ".join(below(cells, "printed", "true")) + ".",
        *("", "How often λ is said to be known to within its bound, and how often λ* then lies inside."),
        *("", *sentence_lines(cells, "lam_printed", "lam_true", SIZES), ""),
        "Cells below: " + "; ".join(below(cells, "lam_printed", "lam_true")) + ".",
        *("", "The sentence that this replaced, \"may be trusted to within its standard errors\":"),
        *("", *sentence_lines(cells, "old_printed", "old_true", SIZES), ""),
        "Predicted over true KL at λ̂: jackknife / paper's.",
        *("", *kl_lines(cells)),
    ]  # fmt: skip
    return "\n".join(parts)


def few_cells(num_prompts: int, num_tables: int, only: str | None, responses: Sequence[int]) -> None:
    """Measure cells of one number of prompts alone and print how often each sentence is printed, and then true."""
    cells = {}
    for world in worlds():
        if only is not None and world.name != only:
            continue
        for count in responses:
            cells[world.name, count, num_prompts] = cell(world, num_prompts, count, num_tables)
            rows = [row for row in cells[world.name, count, num_prompts] if row is not None]
            said, lam = ([r.true for r in rows if r.printed], [r.lam_true for r in rows if r.lam_printed])
            print(f"{world.name}, K = {count}: {sum(said)} of {len(said)}; λ {sum(lam)} of {len(lam)}", flush=True)
    for printed, true in (("printed", "true"), ("lam_printed", "lam_true")):
        print(f"below ({printed}): {'; '.join(below(cells, printed, true))}")


def main() -> None:
    """Measure, print, and with --write replace the block of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--prompts", type=int, help="only cells of so many prompts, printed one by one")
    parser.add_argument("--tables", type=int, default=100, help="with --prompts: tables of each cell")
    parser.add_argument("--only", help="with --prompts: the world of this name alone")
    parser.add_argument("--responses", type=int, nargs="+", default=RESPONSES, help="with --prompts: K")
    arguments = parser.parse_args()
    if arguments.prompts is not None:
        few_cells(arguments.prompts, arguments.tables, arguments.only, arguments.responses)
        return
    tables = counts(arguments.quick)
    cells = {}
    for world in worlds():
        for count, size in product(RESPONSES, tables):
            large = size * count >= 100_000
            cells[world.name, count, size] = cell(world, size, count, max(tables[size] // (2 if large else 1), 4))
        print(f"{world.name}: done", file=sys.stderr, flush=True)
    block = report(cells)
    print(block)
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        DOCUMENT.write_text(f"{head}{BEGIN}\n{block}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
