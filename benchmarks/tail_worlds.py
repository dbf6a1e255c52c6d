"""How often a statement on a CVaR is false where the truth lies exactly at what is asked (docs/estimators.md).

    python benchmarks/tail_worlds.py [--tables 2000]

Policy and reference answer P prompts K times each. The margin asked is the true improvement of the CVaR, known from
two million responses of each, so every "met", every "not met" and every certificate is false. Printed in per cent: the
report's "met" / "not met" (2.5 is meant), and certificates at errors of 5 and 3.04 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from can_dist.dual import Column, lower_bound, mean_interval
from can_dist.measuring.gains import verdict
from can_dist.measuring.tails import cross_fitted_tail

FloatArray = npt.NDArray[np.float64]
NUM_RESPONSES = 4
TRUTH = 500_000
ERRORS = (0.05, 0.05 * 6 / np.pi**2)

Law = Callable[[np.random.Generator, int, int], FloatArray]


def gaussian(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """Half of the variance between prompts, half within."""
    return rng.normal(size=(num_prompts, 1)) + rng.normal(size=(num_prompts, num_responses))


def student(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """Student's t with three degrees of freedom, within and between prompts."""
    return rng.standard_t(3, size=(num_prompts, 1)) + rng.standard_t(3, size=(num_prompts, num_responses))


def lognormal(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """Losses that are lognormal(1)."""
    return -np.exp(0.5 * rng.normal(size=(num_prompts, 1)) + rng.normal(size=(num_prompts, num_responses)))


def rare_losers(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """5 % of the prompts lose 10."""
    losing = rng.random((num_prompts, 1)) < 0.05
    return rng.normal(size=(num_prompts, num_responses)) - 10.0 * losing


def seldom(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """Unsafe (0) with a probability of the prompt's own, 7 % in the mean."""
    unsafe = rng.beta(0.7, 9.3, size=(num_prompts, 1))
    return (rng.random((num_prompts, num_responses)) > unsafe).astype(np.float64)


def binary(rng: np.random.Generator, num_prompts: int, num_responses: int) -> FloatArray:
    """Unsafe (0) with a probability of the prompt's own, 10 % in the mean."""
    unsafe = rng.beta(0.5, 4.5, size=(num_prompts, 1))
    return (rng.random((num_prompts, num_responses)) > unsafe).astype(np.float64)


LAWS: dict[str, Law] = {
    "Gaussian": gaussian,
    "Student t, 3 degrees": student,
    "−lognormal": lognormal,
    "5 % lose 10": rare_losers,
    "unsafe 7 %": seldom,
    "unsafe 10 %": binary,
}


def moved(score_PK: FloatArray) -> FloatArray:
    """What the policy makes of the reference's scores: better where they are worst."""
    return score_PK + 0.4 + 0.1 * np.maximum(-score_PK, 0.0)


def tail_mean(score_N: FloatArray, alpha: float) -> float:
    """The mean of the worst share α, by sorting."""
    return float(np.sort(score_N)[: round(alpha * score_N.size)].mean())


def rates(law: Law, alpha: float, num_prompts: int, num_tables: int, seed: int) -> list[float]:
    """Return the shares of tables with a false statement: met, not met, certified at each error."""
    rng, column = np.random.default_rng(seed), Column("g", ("g",), of="cvar", alpha=alpha)
    many = law(rng, TRUTH, NUM_RESPONSES)
    margin = tail_mean(moved(many).ravel(), alpha) - tail_mean(many.ravel(), alpha)
    prompt_N, shape = np.repeat(np.arange(num_prompts), NUM_RESPONSES), (num_prompts, NUM_RESPONSES)
    false = np.zeros(2 + len(ERRORS))
    for _ in range(num_tables):
        prompts = rng.integers(2**63)  # both models answer the same prompts
        own, other = (law(np.random.default_rng([prompts, side]), *shape) for side in (0, 1))
        before, after = own.ravel(), moved(other).ravel()
        before_N = column.at_own_tau(before, prompt_N).values([before])
        after_N = column.at_own_tau(after, prompt_N).values([after])
        realised = mean_interval((after_N - before_N).reshape(shape).mean(axis=1))
        careful_N = cross_fitted_tail(column, after, prompt_N)
        value_P = (careful_N - before_N).reshape(shape).mean(axis=1)
        bounds = [lower_bound(value_P, error).low >= margin for error in ERRORS]
        words = verdict(asdict(realised), margin)
        false += [words == "met", words == "not met", *bounds]
    shares: list[float] = (100 * false / num_tables).tolist()
    return shares


def main() -> None:
    """Print one row a world."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=2000)
    num_tables = parser.parse_args().tables
    print("| scores | α | P | met / not met | certified |\n|---|---|---|---|---|")
    for number, (name, law) in enumerate(LAWS.items()):
        for alpha in (0.1, 0.05):
            for num_prompts in (64, 200):
                met, missed, *certified = rates(law, alpha, num_prompts, num_tables, 1000 * number + num_prompts)
                shown = " / ".join(f"{share:.1f}" for share in certified)
                print(f"| {name} | {alpha:g} | {num_prompts} | {met:.1f} / {missed:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
