"""Measure how often a certificate would be false: in worlds whose true mean is the margin, every "met" is an error.

Two kinds of world: laws of one prompt's difference (``trust_intervals.py``; those of rare losers count the tables that
hold one), and responses of a reference and of its π_λ* to the prompts of ``trust_worlds.py``, K each, from a finite
population in which the true improvement is a sum.

python benchmarks/certificate_worlds.py               # about five minutes; prints the table of docs/estimators.md
python benchmarks/certificate_worlds.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import trust_intervals
import trust_worlds

from can_dist.dual import lower_bound, mean_interval

FloatArray = npt.NDArray[np.float64]
NUM_PROMPTS = (64, 200)
ERRORS = (0.05, 0.0304, 0.0101, 0.0025)
"""Of one bound: plain; first look at δ = 5 %; the same shared by three constraints; a later look shared by three."""
NUM_RESPONSES = 4
POLICY = "policy: "
POPULATION = (2000, 512)
"""Prompts and responses of a finite population."""


@dataclass(frozen=True)
class CertificateWorld:
    """A law of one prompt's value minus the margin, with mean zero.

    Attributes:
        name: for the table.
        tables: draw so many tables of so many prompts, shape (R, P); fewer where the world asks for a loser in each.
    """

    name: str
    tables: Callable[[np.random.Generator, int, int], FloatArray]


def difference_world(law: trust_intervals.Differences) -> CertificateWorld:
    """Return the world of a law of differences; a table of a world with rare events must hold a prompt that loses."""

    def tables(generator: np.random.Generator, count: int, num_prompts: int) -> FloatArray:
        value_RP = law.sample(generator, (count, num_prompts))
        if law.rare is None:
            return value_RP
        typical = np.median(value_RP)
        return value_RP[(law.rare(value_RP) & (value_RP < typical)).any(axis=1)]

    return CertificateWorld(law.name, tables)


def policy_world(world: trust_worlds.TrustWorld) -> CertificateWorld:
    """Return the world of the improvement of π_λ* over its reference, by ``NUM_RESPONSES`` responses of each."""
    num_prompts, num_responses = POPULATION
    reward_N, utility_N, prompt_N = world.sample(np.random.default_rng(7), num_prompts, num_responses)
    assert np.array_equal(prompt_N, np.repeat(np.arange(num_prompts), num_responses)), "every prompt has K responses"
    utility_QM = utility_N.reshape(POPULATION)
    score_QM = (reward_N.reshape(POPULATION) + world.lam() * utility_QM) / world.beta
    weight_QM = np.exp(score_QM - score_QM.max(axis=1, keepdims=True))
    weight_QM /= weight_QM.sum(axis=1, keepdims=True)
    truth = float((weight_QM * utility_QM).sum(axis=1).mean() - utility_QM.mean())
    cumulative_QM = np.cumsum(weight_QM, axis=1)

    def means(
        draw: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]], row_P: npt.NDArray[np.int64]
    ) -> FloatArray:
        total_P = np.zeros(row_P.size)
        for _ in range(NUM_RESPONSES):
            total_P += utility_QM[row_P, draw(row_P)]
        return total_P / NUM_RESPONSES

    def tables(generator: np.random.Generator, count: int, size: int) -> FloatArray:
        def tilted(row_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            below_PM = cumulative_QM[row_P] < generator.random(row_P.size)[:, None]
            return np.minimum(below_PM.sum(axis=1), num_responses - 1)

        def plain(row_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return generator.integers(num_responses, size=row_P.size)

        rows_RP = generator.integers(num_prompts, size=(count, size))
        return np.array([means(tilted, row_P) - means(plain, row_P) - truth for row_P in rows_RP])

    return CertificateWorld(f"{POLICY}{world.name}", tables)


def worlds() -> Iterator[CertificateWorld]:
    """Yield every world; those of prompts with one response are left out, since a certificate samples K of each."""
    for law in trust_intervals.worlds():
        yield difference_world(law)
    for world in trust_worlds.worlds():
        if "one response" not in world.name:
            yield policy_world(world)


def certified(low: Callable[[FloatArray, float], float], value_RP: FloatArray) -> list[float]:
    """Return the share of tables whose bound lies above the true mean, 0, by error; a smaller error has a lower one."""
    counts = np.zeros(len(ERRORS))
    for row_P in value_RP:
        for index, error in enumerate(ERRORS):
            if low(row_P, error) <= 0:
                break
            counts[index] += 1
    return list(counts / len(value_RP))


def interval_low(value_P: FloatArray, error: float) -> float:
    """Return the lower end of the interval of every other mean, one-sided."""
    return mean_interval(value_P, 1 - 2 * error).low


def bound_low(value_P: FloatArray, error: float) -> float:
    """Return the bound of a certificate."""
    return lower_bound(value_P, error).low


LOWS = {"interval": interval_low, "bound": bound_low}


def allowed(error: float, tables: int) -> float:
    """Return an error plus two standard errors of its measurement."""
    return float(error + 2 * np.sqrt(error * (1 - error) / tables))


def power(num_prompts: int, tables: int) -> dict[str, float]:
    """Return how often a Gaussian improvement three standard errors above its margin is certified at a first look."""
    generator = np.random.default_rng(11)
    value_RP = generator.standard_normal((tables, num_prompts)) + 3 / np.sqrt(num_prompts)
    return {name: certified(low, value_RP)[1] for name, low in LOWS.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    names = " / ".join(f"{100 * error:g} %" for error in ERRORS)
    print(f"| false certificates, % of tables, at {names} | P | interval's end | bound |\n|---|---|---|---|")
    for world in worlds():
        tables = 300 if is_quick else 2000 if world.name.startswith(POLICY) else 4000
        for num_prompts in NUM_PROMPTS:
            value_RP = world.tables(np.random.default_rng(5), tables, num_prompts)
            cells = []
            for low in LOWS.values():
                shares = zip(certified(low, value_RP), ERRORS, strict=True)
                texts = [
                    f"{100 * share:.2f}" + ("!" if share > allowed(error, len(value_RP)) else "")
                    for share, error in shares
                ]
                cells.append(" / ".join(texts))
            print(f"| {world.name} | {num_prompts} | " + " | ".join(cells) + " |", flush=True)
    for num_prompts in (64, 256):
        print(f"power, P = {num_prompts}: {power(num_prompts, 300 if is_quick else 2000)}")


if __name__ == "__main__":
    main()
