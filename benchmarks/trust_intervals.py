"""Measure how often an interval of a mean calls a margin "met" that is met exactly, by method, world and prompts.

The true mean equals the margin, so a 95 % interval should say "met" (it lies above) in 2.5 % of the tables, and
"not met" in 2.5 %. Worlds of rare events count only tables that hold one: no method sees what no prompt shows.

python benchmarks/trust_intervals.py --quick          # about five minutes
python benchmarks/trust_intervals.py                  # about half an hour
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from can_dist.dual import mean_interval

FloatArray = npt.NDArray[np.float64]
DATA = Path(os.environ.get("CAN_DIST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SCORES = DATA / "scores" / "amo_pku_test_821x9.npz"
ALPHA = 0.05
NUM_PROMPTS = (20, 64, 100, 200)


@dataclass(frozen=True)
class Differences:
    """A law of one prompt's realised improvement minus the margin, with mean zero.

    Attributes:
        name: for the table.
        sample: draw an array of that shape.
        rare: whether a value shows the rare event; None where there is none.
    """

    name: str
    sample: Callable[[np.random.Generator, tuple[int, int]], FloatArray]
    rare: Callable[[FloatArray], npt.NDArray[np.bool_]] | None = None


def rare_losers(share: float, loss: float, noise: float) -> Differences:
    """Return a law in which ``share`` of the prompts lose ``loss`` and the others gain what makes up for it."""

    def sample(generator: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
        hit = generator.random(shape) < share
        return np.where(hit, -loss, share * loss / (1 - share)) + noise * generator.standard_normal(shape)

    return Differences(f"{share:.0%} lose {loss:g}, noise {noise:g}", sample, lambda value: value < -loss / 2)


def unsafe_share(before: float, after: float, responses: int) -> Differences:
    """Return a law of paired means of 0/1 harm over ``responses`` responses, minus the true improvement."""

    def sample(generator: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
        harm = [generator.binomial(responses, share, shape) / responses for share in (before, after)]
        return harm[0] - harm[1] - (before - after)

    return Differences(
        f"unsafe {before:.0%} → {after:.0%}, {responses} responses",
        sample,
        lambda value: np.abs(value + (before - after)) > 1e-9,
    )


def minority(share: float, spread: float) -> Differences:
    """Return a law in which a share of the prompts has ``spread`` times the standard deviation."""

    def sample(generator: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
        scale = np.where(generator.random(shape) < share, spread, 1.0)
        return scale * generator.standard_normal(shape)

    return Differences(f"{share:.0%} with {spread:g} times the spread", sample)


def real_differences(first: int, second: int, sign: float) -> Differences:
    """Return the differences of two policies' harmless scores on 821 PKU prompts, drawn with replacement."""
    score = np.load(SCORES)["harmless"].astype(np.float64)
    value = sign * (score[:, first] - score[:, second])
    value -= value.mean()
    return Differences(f"real harmless, {first} − {second}", lambda generator, shape: generator.choice(value, shape))


def worlds() -> list[Differences]:
    """Return the laws of the table."""
    root_e = np.exp(0.5)
    laws = [
        Differences("gaussian", lambda generator, shape: generator.standard_normal(shape)),
        Differences("Student t, 3 degrees", lambda generator, shape: generator.standard_t(3, shape)),
        Differences("−lognormal(1)", lambda generator, shape: root_e - generator.lognormal(0, 1, shape)),
        Differences("+lognormal(1)", lambda generator, shape: generator.lognormal(0, 1, shape) - root_e),
        Differences("−exponential", lambda generator, shape: 1 - generator.exponential(1, shape)),
        Differences(
            "gaussian, lognormal(0.7) scales",
            lambda generator, shape: generator.lognormal(0, 0.7, shape) * generator.standard_normal(shape),
        ),
        minority(0.07, 20.0),
        rare_losers(0.02, 10.0, 0.0),
        rare_losers(0.02, 10.0, 0.3),
        rare_losers(0.05, 10.0, 0.3),
        rare_losers(0.10, 5.0, 1.0),
        unsafe_share(0.02, 0.01, 4),
        unsafe_share(0.01, 0.02, 4),
        unsafe_share(0.20, 0.10, 4),
    ]
    if SCORES.exists():
        laws += [real_differences(0, 8, 1.0), real_differences(3, 4, 1.0), real_differences(3, 4, -1.0)]
    return laws


def moments(value_RP: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return mean, standard error and skewness of each row."""
    mean_R = value_RP.mean(axis=1)
    deviation_RP = value_RP - mean_R[:, None]
    second_R = (deviation_RP**2).mean(axis=1)
    count = value_RP.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        skew_R = np.nan_to_num((deviation_RP**3).mean(axis=1) / second_R**1.5)
    return mean_R, np.sqrt(second_R / (count - 1)), skew_R


def student(value_RP: FloatArray, _: np.random.Generator) -> FloatArray:
    """Return the bounds of the t-interval, shape (R, 2)."""
    mean_R, se_R, _skew = moments(value_RP)
    reach = t.ppf(1 - ALPHA / 2, value_RP.shape[1] - 1)
    return np.stack([mean_R - reach * se_R, mean_R + reach * se_R], axis=1)


def hall_inverse(target: FloatArray, skew_R: FloatArray, count: int) -> FloatArray:
    """Invert Hall's cubic g(T) = T + a T² + a² T³/3 + skew/(6√n), a = skew/(3√n) (Hall 1992)."""
    slope = skew_R / (3 * np.sqrt(count))
    inner = 1 + 3 * slope * (target - skew_R / (6 * np.sqrt(count)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(slope) < 1e-9, target, (np.cbrt(inner) - 1) / slope)


def hall(value_RP: FloatArray, _: np.random.Generator) -> FloatArray:
    """Return Hall's corrected interval with Student's quantile."""
    mean_R, se_R, skew_R = moments(value_RP)
    count = value_RP.shape[1]
    reach = t.ppf(1 - ALPHA / 2, count - 1) * np.ones_like(mean_R)
    return np.stack([mean_R - se_R * hall_inverse(side * reach, skew_R, count) for side in (1, -1)], axis=1)


def outer(value_RP: FloatArray, generator: np.random.Generator) -> FloatArray:  # noqa: ARG001
    """Return the outer ends of Student's and Hall's intervals: :func:`can_dist.dual.mean_interval` of every row."""
    intervals = [mean_interval(value_P, 1 - ALPHA) for value_P in value_RP]
    return np.array([(interval.low, interval.high) for interval in intervals])


def johnson(value_RP: FloatArray, _: np.random.Generator) -> FloatArray:
    """Return Johnson's modified t (1978): t + skew (1 + 2 t²)/(6√n), the short form of its inverse."""
    mean_R, se_R, skew_R = moments(value_RP)
    count = value_RP.shape[1]
    reach = float(t.ppf(1 - ALPHA / 2, count - 1))
    shift_R = skew_R * (1 + 2 * reach**2) / (6 * np.sqrt(count))
    return np.stack([mean_R + se_R * (shift_R - reach), mean_R + se_R * (shift_R + reach)], axis=1)


def resampled(value_P: FloatArray, generator: np.random.Generator, num: int = 999) -> tuple[FloatArray, ...]:
    """Return mean, standard error and skewness of ``num`` resamples of one table."""
    return moments(value_P[generator.integers(value_P.size, size=(num, value_P.size))])


def quantiles(value: FloatArray, shares: tuple[float, float]) -> FloatArray:
    """Return quantiles that may be infinite."""
    return np.quantile(value, shares, method="inverted_cdf")


def bootstrap_t(value_RP: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Return the studentised bootstrap's interval; a resample without variance has an infinite t."""
    mean_R, se_R, _skew = moments(value_RP)
    bounds = np.empty((mean_R.size, 2))
    for row, value_P in enumerate(value_RP):
        centre, se, _ = resampled(value_P, generator)
        bounds[row] = mean_R[row] - se_R[row] * quantiles(ratio(centre - mean_R[row], se), (1 - ALPHA / 2, ALPHA / 2))
    return bounds


def ratio(top: FloatArray, bottom: FloatArray) -> FloatArray:
    """Divide; what has no spread is infinitely far, on its side."""
    tiny = bottom <= 1e-12
    return np.where(tiny, np.where(np.abs(top) <= 1e-12, 0.0, np.sign(top) * 1e9), top / np.where(tiny, 1.0, bottom))


def bootstrap_hall(value_RP: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Return Hall's transform with bootstrapped quantiles (Zhou and Dinh 2005)."""
    mean_R, se_R, skew_R = moments(value_RP)
    count = value_RP.shape[1]
    bounds = np.empty((mean_R.size, 2))
    for row, value_P in enumerate(value_RP):
        centre, se, skew = resampled(value_P, generator)
        stat = ratio(centre - mean_R[row], se)
        slope = skew / (3 * np.sqrt(count))
        transformed = stat + slope * stat**2 + slope**2 * stat**3 / 3 + skew / (6 * np.sqrt(count))
        high_low = quantiles(transformed, (1 - ALPHA / 2, ALPHA / 2))
        bounds[row] = mean_R[row] - se_R[row] * hall_inverse(high_low, np.full(2, skew_R[row]), count)
    return bounds


def bca(value_RP: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Return Efron's BCa interval."""
    mean_R, _se, skew_R = moments(value_RP)
    bounds = np.empty((mean_R.size, 2))
    for row, value_P in enumerate(value_RP):
        centre = resampled(value_P, generator)[0]
        below = np.clip((centre < mean_R[row]).mean() + 0.5 * (centre == mean_R[row]).mean(), 1e-3, 1 - 1e-3)
        bias, speed = norm.ppf(below), skew_R[row] / (6 * np.sqrt(value_P.size))
        shares = [norm.cdf(bias + (bias + z) / (1 - speed * (bias + z))) for z in norm.ppf([ALPHA / 2, 1 - ALPHA / 2])]
        bounds[row] = np.quantile(centre, shares)
    return bounds


def likelihood(value_RP: FloatArray, _: np.random.Generator) -> FloatArray:
    """Return bounds that lie above, around or below 0 as Owen's empirical-likelihood interval does; no length."""
    count = value_RP.shape[1]
    limit = float(t.ppf(1 - ALPHA / 2, count - 1)) ** 2
    outside = np.minimum(value_RP.max(axis=1), -value_RP.min(axis=1)) <= 0
    scale = np.maximum(value_RP.std(axis=1), 1e-12)[:, None]
    unit = value_RP / scale
    weight = np.zeros(value_RP.shape[0])
    low, high = -1 / np.maximum(unit.max(axis=1), 1e-9), 1 / np.maximum(-unit.min(axis=1), 1e-9)
    low, high = low * (1 - 1e-9), high * (1 - 1e-9)
    for _step in range(60):
        weight = (low + high) / 2
        slope = (unit / (1 + weight[:, None] * unit)).sum(axis=1)
        low, high = np.where(slope > 0, weight, low), np.where(slope > 0, high, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        stat = 2 * np.log1p(weight[:, None] * unit).sum(axis=1)
    rejected = outside | ~(stat <= limit)
    mean_R = value_RP.mean(axis=1)
    low_R = np.where(rejected & (mean_R > 0), 1.0, -1.0)
    return np.stack([low_R, np.where(rejected & (mean_R < 0), -1.0, 1.0)], axis=1)


METHODS: dict[str, Callable[[FloatArray, np.random.Generator], FloatArray]] = {
    "t": student,
    "Johnson": johnson,
    "Hall": hall,
    "outer of t and Hall": outer,
    "empirical likelihood": likelihood,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
    "Hall bootstrap": bootstrap_hall,
}


def false_calls(world: Differences, num_prompts: int, tables: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return for each method the shares of false "met" and "not met", and the median length beside t's."""
    generator = np.random.default_rng(seed)
    value_RP = world.sample(generator, (tables, num_prompts))
    if world.rare is not None:
        value_RP = value_RP[world.rare(value_RP).any(axis=1)]
    shares, base = {}, 1.0
    for name, method in METHODS.items():
        bounds = method(value_RP, generator)
        length = float(np.median(bounds[:, 1] - bounds[:, 0]))
        base = length if name == "t" else base
        shares[name] = (float((bounds[:, 0] > 0).mean()), float((bounds[:, 1] < 0).mean()), length / base)
    return shares


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    tables = 400 if parser.parse_args().quick else 2000
    print("false met % / false not met % / median length beside t")
    print("| world | P |" + "".join(f" {name} |" for name in METHODS))
    print("|---|---|" + "---|" * len(METHODS))
    for world in worlds():
        for num_prompts in NUM_PROMPTS:
            shares = false_calls(world, num_prompts, tables, 1)
            cells = [f"{100 * low:.1f}/{100 * high:.1f}/{size:.2f}" for low, high, size in shares.values()]
            print(f"| {world.name} | {num_prompts} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
