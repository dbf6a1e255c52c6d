"""The frontier of a table or of arrays, ready to be plotted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy.typing as npt

from can_dist.dual import Frontier, frontier_table
from can_dist.dual.frame import Frame, score_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PlottedFrontier(Frontier):
    """A :class:`~can_dist.dual.Frontier` that draws itself."""

    def plot(self) -> Figure:
        """Return a matplotlib figure: curves with bands for one constraint, a map for two.

        Raises:
            ConfigError: more than two constraints, or a map of two of which one never varies within a prompt.
        """
        from can_dist.reporting.figures.frontier import frontier_figure

        return frontier_figure(self)


def frontier(
    reward_N: npt.ArrayLike | Frame,
    utility_NJ: npt.ArrayLike | None = None,
    prompt_N: npt.ArrayLike | None = None,
    *,
    beta: float,
    names: Sequence[str],
    reward: str = "reward",
    prompt: str = "prompt_id",
    margins: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    num_points: int = 50,
    log_weight_N: npt.ArrayLike | None = None,
    confidence: float = 0.95,
) -> PlottedFrontier:
    """Compute margin ↦ (λ*, helpfulness, KL, ESS) for one constraint, or a grid for several.

    Takes a table with named columns, or the three arrays, as :func:`~can_dist.solve_dual` does.

    Args:
        reward_N: r(x,y), higher is better; or the table (pandas, polars, pyarrow, a dict of arrays).
        utility_NJ: g_j(x,y), one column per name.
        prompt_N: prompt id of each row.
        beta: KL weight β > 0.
        names: names of the constraints: columns of the table.
        reward: column of the table that holds r.
        prompt: column of the table that holds the prompt ids.
        margins: margins to solve for: a vector for one constraint, one vector per constraint for several (their
            product is solved). Without them the points are exact for a grid of λ chosen to spread the margins evenly.
        num_points: points of the curve; of the whole grid for several constraints.
        log_weight_N: ln of the reference weight of each row within its prompt; uniform if absent.
        confidence: of the bands.

    Raises:
        ConfigError: arguments that cannot mean anything.
        DataError: no rows, or scores that are not finite.

    Examples:
        >>> scores = {
        ...     "prompt_id": ["a", "a", "b", "b"],
        ...     "reward": [1.0, 0.0, 0.5, 0.0],
        ...     "safety": [0.0, 1.0, 1.0, 0.0],
        ... }
        >>> curve = frontier(scores, beta=1.0, names=["safety"], margins=[0.0, 0.2])
        >>> [round(row["lam.safety"], 4) for row in curve.rows()]
        [0.25, 1.2123]
        >>> figure = curve.plot()
        >>> [axes.get_ylabel() for axes in figure.axes][-1]
        'KL from the reference (nats)'
    """
    table = score_table(reward_N, utility_NJ, prompt_N, log_weight_N, names=names, reward=reward, prompt=prompt)
    curve = frontier_table(table, beta=beta, names=names, margins=margins, num_points=num_points, confidence=confidence)
    return PlottedFrontier(curve.names, curve.points, curve.shape, curve.attainable, curve.beta, curve.confidence)
