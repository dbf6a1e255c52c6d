"""Worlds whose population λ* is known: for what the dual estimates from a table, and how surely.

Within every prompt g = σ z₁ and r = σ(ρ z₁ + √(1−ρ²) z₂) with z₁, z₂ independent of a law F of mean 0, variance 1.
The cumulant function is additive, so the population dual needs only F: E_{π_λ} g = σ κ′(σ(ρ + λ)/β) with
κ = ln E exp(θz), and λ* is a one-dimensional root, found by quadrature over F. Laws without an exponential moment
(Student's t, lognormal) are clipped far out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import t as student

NODES = 400_001


@dataclass(frozen=True)
class Law:
    """A law of mean 0 and variance 1, as the quantile function of an unstandardised one."""

    name: str
    quantile: Callable[[np.ndarray], np.ndarray]

    def standard(self, uniform: np.ndarray) -> np.ndarray:
        mean, sd = _moments(self)
        return (self.quantile(uniform) - mean) / sd

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points and log weights: equal steps in the normal quantile reach far into both tails."""
        score = np.linspace(-12, 12, NODES)
        log_weight = -(score**2) / 2
        log_weight -= logsumexp(log_weight)
        return self.standard(np.clip(ndtr(score), 1e-300, 1 - 1e-16)), log_weight


_CACHE: dict[str, tuple[float, float]] = {}
_NODES: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def _moments(law: Law) -> tuple[float, float]:
    if law.name not in _CACHE:
        score = np.linspace(-8.2, 8.2, NODES)
        weight = np.exp(-(score**2) / 2)
        weight /= weight.sum()
        value = law.quantile(np.clip(ndtr(score), 1e-300, 1 - 1e-16))
        mean = float(weight @ value)
        _CACHE[law.name] = mean, float(np.sqrt(weight @ (value - mean) ** 2))
    return _CACHE[law.name]


def _mixture(points: np.ndarray, probabilities: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    edges = np.cumsum(probabilities)[:-1]
    return lambda u: points[np.searchsorted(edges, u, side="right")]


def _bimodal(u: np.ndarray) -> np.ndarray:
    """Two normals of sd 0.5 at ±1, weights .7 and .3, by the split of one uniform."""
    low = u < 0.7
    inner = np.where(low, u / 0.7, (u - 0.7) / 0.3)
    return np.where(low, -1.0, 1.0) + 0.5 * ndtri(np.clip(inner, 1e-300, 1 - 1e-16))


def _rare(u: np.ndarray) -> np.ndarray:
    """A normal body and one response in two hundred that is six better."""
    body = ndtri(np.clip(u / 0.995, 1e-300, 1 - 1e-16))
    return np.where(u < 0.995, body, 6.0)


LAWS = {
    law.name: law
    for law in [
        Law("gaussian", ndtri),
        Law("t3", lambda u: np.clip(student.ppf(u, 3), -15, 15)),
        Law("bimodal", _bimodal),
        Law("lognormal", lambda u: np.minimum(np.exp(0.7 * ndtri(u)), 12.0)),
        Law("skewed_down", lambda u: -np.minimum(np.exp(0.7 * ndtri(1 - u)), 12.0)),
        Law("discrete", _mixture(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.2, 0.3, 0.25, 0.15]))),
        Law("binary", _mixture(np.array([0.0, 1.0]), np.array([0.8, 0.2]))),
        Law("uniform", lambda u: u),
        Law("clipped", lambda u: np.clip(ndtri(u), -2.5, 2.5)),
        Law("rare", _rare),
    ]
}


@dataclass(frozen=True)
class World:
    """One law, the scale of the scores against β, and the correlation of r with g."""

    law: str
    sd_over_beta: float
    correlation: float = -0.5
    margin: float = 0.5
    num_prompts: int = 1000
    num_responses: int = 128

    @property
    def beta(self) -> float:
        return 1.0 / self.sd_over_beta

    def population_lam(self) -> float:
        """Return λ* of infinitely many responses."""
        if self.law not in _NODES:
            _NODES[self.law] = LAWS[self.law].nodes()
        point, log_weight = _NODES[self.law]

        def slack(theta: float) -> float:
            joint = log_weight + theta * point
            return float(np.exp(joint - logsumexp(joint)) @ point) - self.margin

        start = self.correlation / self.beta
        if slack(start) >= 0:
            return 0.0
        high = 1.0
        while slack(high) < 0:
            high *= 2
        theta = brentq(slack, min(start, -50.0), high, xtol=1e-12)
        return float(theta * self.beta - self.correlation)

    def sample(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return reward, utility and prompt ids."""
        generator = np.random.default_rng(seed)
        law = LAWS[self.law]
        size = self.num_prompts * self.num_responses
        first, second = (law.standard(generator.uniform(1e-16, 1, size)) for _ in range(2))
        reward = self.correlation * first + np.sqrt(1 - self.correlation**2) * second
        return reward, first, np.repeat(np.arange(self.num_prompts), self.num_responses)
