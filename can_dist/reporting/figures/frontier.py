"""A frontier as a figure for a paper: curves with bands for one constraint, a map for two.

Margins are improvements over the reference mean, in the units of the scores. Where the median effective sample size is
low the line is dashed: there the weights fall on few responses, and what is drawn describes the best of K rather than
the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from can_dist.dual import Frontier
from can_dist.dual.table import FloatArray
from can_dist.dual.weights import TRUSTED_ESS
from can_dist.errors import ConfigError
from can_dist.reporting.figures.style import BLUE, DASHED, DOTTED, GREY, ORANGE, paper_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
CURVE_SIZE_IN = (7.2, 2.6)
MAP_SIZE_IN = (4.6, 3.6)


def check_format(path: Path) -> None:
    """Refuse a path whose suffix is not one of the formats drawn: ``ConfigError``."""
    if path.suffix[1:] not in FORMATS:
        raise ConfigError(f"--plot {path}: unknown kind of picture {path.suffix!r}. Expected .svg, .pdf or .png.")


def frontier_figure(curve: Frontier) -> Figure:
    """Return a frontier of one or two constraints as a figure.

    Raises:
        ConfigError: more than two constraints, or a map of two of which one never varies within a prompt.
    """
    if len(curve.names) > 2:
        raise ConfigError(f"frontier of {', '.join(curve.names)}: a picture has one or two constraints; choose two.")
    size_in, draw = (CURVE_SIZE_IN, _curves) if len(curve.names) == 1 else (MAP_SIZE_IN, _map)
    with paper_figure(size_in) as figure:
        draw(figure, curve)
    drawn: Figure = figure
    return drawn


def draw_frontier(curve: Frontier, path: Path, kind: str) -> None:
    """Draw a frontier of one or two constraints into ``path``; ``kind`` is one of ``FORMATS``.

    Raises:
        ConfigError: as :func:`frontier_figure`.
    """
    save_figure(frontier_figure(curve), path, kind)


def _curves(figure: Any, curve: Frontier) -> None:
    """Reward gain, λ* and KL over the margin, each with its band and the most attainable margin."""
    name = curve.names[0]
    rows = [row for row in curve.rows() if row["feasible"]]
    margin = np.array([row[f"margin.{name}"] for row in rows])
    trusted = np.array([row["ess"] >= TRUSTED_ESS for row in rows])
    panels = (
        ("reward_improvement", "reward gain (reward units)"),
        (f"lam.{name}", "λ* (reward units per score unit)"),
        ("kl", "KL from the reference (nats)"),
    )
    attainable = curve.attainable[name]
    for ax, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        value, low, high = (np.array([row[key + end] for row in rows]) for end in ("", "_low", "_high"))
        if key != "reward_improvement":
            low = np.maximum(low, 0.0)  # as λ and KL are
        ax.fill_between(margin, low, high, color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(margin, value, color=BLUE, linewidth=1.4, linestyle=DASHED)
        ax.plot(margin, np.where(trusted, value, np.nan), color=BLUE, linewidth=1.6)
        ax.axvline(attainable, color=ORANGE, linewidth=1.1, linestyle=DOTTED)
        ax.set_ylim(*_limits(value, low, high))
        ax.set_ylabel(label)
        ax.margins(x=0.03)
    figure.supxlabel(f"margin of {name}: improvement of its mean over the reference (score units)", fontsize=8.5)
    _legend(figure, f"{100 * curve.confidence:g} % band over the prompts", bool(trusted.all()), attainable)


def _limits(value_N: FloatArray, low_N: FloatArray, high_N: FloatArray) -> tuple[float, float]:
    """Show the whole line, and its band as far as it does not dwarf the line, which it does near the attainable."""
    bottom, top = float(value_N.min()), float(value_N.max())
    room = 0.3 * (top - bottom) or 1.0
    ends = max(float(np.nanmin([bottom, *low_N])), bottom - room), min(float(np.nanmax([top, *high_N])), top + room)
    pad = 0.04 * (ends[1] - ends[0]) or 1.0
    return ends[0] - pad, ends[1] + pad


def _legend(figure: Any, band: str, all_trusted: bool, attainable: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = [(Patch(color=BLUE, alpha=0.2, linewidth=0), band)]
    if not all_trusted:
        dashed = Line2D([], [], color=BLUE, linewidth=1.4, linestyle=DASHED)
        entries.append((dashed, f"median ESS below {TRUSTED_ESS:g}: biased by finite K"))
    most = Line2D([], [], color=ORANGE, linewidth=1.1, linestyle=DOTTED)
    entries.append((most, f"most attainable, {attainable:.3g}"))
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=2.2, columnspacing=1.6)


def _map(figure: Any, curve: Frontier) -> None:
    """Reward gain over both margins as filled contours, KL as lines, and the most attainable margins."""
    first, second = curve.names
    if min(curve.shape) < 2:
        flat = first if curve.shape[0] < 2 else second
        raise ConfigError(f"--plot: {flat} never varies within a prompt, so there is no map. Draw the other one alone.")
    from matplotlib.tri import Triangulation

    rows = curve.rows()
    x, y, reward, kl = (
        np.array([row[key] for row in rows], dtype=np.float64)
        for key in (f"improvement.{first}", f"improvement.{second}", "reward_improvement", "kl")
    )
    mesh = Triangulation(x, y, _triangles(x, y, curve.shape))
    ax = figure.subplots()
    filled = ax.tricontourf(mesh, reward, levels=14, cmap="viridis")
    lines = ax.tricontour(mesh, kl, levels=6, colors="white", linewidths=0.8)
    ax.clabel(lines, fmt="%.3g", fontsize=6.5)
    ax.plot(x[0], y[0], "o", color="black", markersize=4.5)
    ax.annotate("λ = 0", (x[0], y[0]), xytext=(0, -5), textcoords="offset points", ha="center", va="top")
    line = {"color": ORANGE, "linewidth": 1.1, "linestyle": DOTTED}
    ax.axvline(curve.attainable[first], **line)
    ax.axhline(curve.attainable[second], **line)
    ax.set_xlim(*_padded(x, curve.attainable[first]))
    ax.set_ylim(*_padded(y, curve.attainable[second]))
    ax.set_xlabel(f"margin of {first} over the reference mean (score units)")
    ax.set_ylabel(f"margin of {second} over the reference mean (score units)")
    ess = np.array([row["ess"] for row in rows], dtype=np.float64)
    note = f"median ESS {ess.min():.1f} to {ess.max():.1f}; biased by finite K below {TRUSTED_ESS:g}"
    ax.set_title(f"lines: KL from the reference (nats)\ndotted: most attainable alone\n{note}", color=GREY, loc="left")
    bar = figure.colorbar(filled, ax=ax)
    bar.set_label("reward gain (reward units)")
    bar.outline.set_linewidth(0.5)


def _triangles(x_N: FloatArray, y_N: FloatArray, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Split each cell of the λ grid along its shorter diagonal; Delaunay would bridge the bays of the region."""
    index = np.arange(x_N.size).reshape(shape)
    around = (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:])
    a, b, c, d = (corner.ravel() for corner in around)
    along = np.hypot(x_N[a] - x_N[c], y_N[a] - y_N[c]) <= np.hypot(x_N[b] - x_N[d], y_N[b] - y_N[d])
    first = np.where(along, np.stack([a, b, c]), np.stack([a, b, d]))
    second = np.where(along, np.stack([a, c, d]), np.stack([b, c, d]))
    return np.concatenate([first, second], axis=1).T


def _padded(value_N: FloatArray, attainable: float) -> tuple[float, float]:
    low = float(value_N.min())
    pad = 0.09 * (attainable - low)
    return low - pad, attainable + pad
