"""Methods as one picture: helpfulness against safety, the margin, and what the dual predicts along its frontier.

Names are written beside their ellipses instead of in a legend, in the place where they cover least; a name that had to
move away is tied to its ellipse by a thin line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.errors import DataError
from can_dist.reporting.compare import (
    CONFIDENCE,
    Ellipse,
    FloatArray,
    MethodResult,
    check_comparable,
    confidence_ellipse,
)
from can_dist.reporting.plots import INK, MARGIN, MUTED, POLICY, REFERENCE, few_ticks, label_above, panel, svg_text

HEIGHT_IN = 4.4
MARKERS = "osD^vPX*<>"
GLYPHS = "●□◇△▽✚✖☆◁▷"
"""The markers as text: a name carries its own, for ellipses may lie on each other."""
COLOURS = (POLICY, REFERENCE, INK)
NUM_EDGE = 96
NUM_DIRECTIONS = 24
GAPS_PT = (5.0, 14.0, 26.0, 40.0)
AIR_PX, MARKER_PX = 3.0, 8.0
COST_LABEL, COST_OUTSIDE, COST_CENTRE = 1000.0, 1000.0, 60.0
COST_EDGE, COST_LINE, COST_RULE, COST_GAP = 4.0, 12.0, 2.0, 4.0
"""What a name costs for covering another name, for leaving the axes, for covering a mean; for every point of an edge,
of a line and of a zero line under it; and for each gap further out."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Name:
    """A text to be written beside one of its shapes (points in data units)."""

    text: str
    colour: str
    shapes: Sequence[FloatArray]


@dataclass
class Scene:
    """What names should not cover, in pixels: ellipses, lines, zero lines, and the names written so far."""

    frame: Any
    shapes: Sequence[FloatArray]
    strong: FloatArray
    thin: FloatArray
    boxes: list[Box]


def comparison_svg(
    results: Sequence[MethodResult],
    frontier: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    label: str,
    prefix: str,
    confidence: float = CONFIDENCE,
) -> str:
    """Draw every method's gains with their joint confidence ellipse; the first method is the one that stands out.

    Args:
        results: the methods, on the same prompts; every margin among them is a line.
        frontier: (safety gains, reward gains) that the dual predicts, in the order of the curve; may be empty.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of others on the page.
        confidence: of the ellipses.

    Raises:
        DataError: methods that cannot be compared, or a frontier of different or non-finite lengths.
    """
    check_comparable(results)
    margins = sorted({result.margin for result in results})
    curve_2 = [np.asarray(values, dtype=np.float64) for values in frontier]
    if curve_2[0].shape != curve_2[1].shape or curve_2[0].ndim != 1 or not np.isfinite(curve_2).all():
        raise DataError(
            f"frontier: {curve_2[0].shape} safety and {curve_2[1].shape} reward gains; expected as many finite ones."
        )
    ellipses = [confidence_ellipse(result, confidence) for result in results]
    with panel(HEIGHT_IN) as (figure, ax):
        ax.axhline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        ax.axvline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        for margin in margins:
            ax.axvline(margin, color=MARGIN, linewidth=1.6, linestyle=(0, (5, 2)), zorder=1)
        if curve_2[0].size:
            ax.plot(*curve_2, color=MUTED, linewidth=1.6, linestyle=(0, (1, 1.5)), zorder=1)
        ax.plot([0.0], [0.0], "+", color=MUTED, markersize=11, markeredgewidth=1.8, zorder=2)
        for place, ellipse in enumerate(ellipses):
            _draw_method(ax, ellipse, place)
        ax.margins(0.14)
        few_ticks(ax)
        ax.set_xlabel("safety gain against the reference")
        ax.set_ylabel("helpfulness gain against the reference")
        for level, margin in enumerate(margins):
            label_above(ax, margin, f"margin {margin:.3g}", MARGIN, level=level)
        names = [
            Name(
                f"{GLYPHS[place % len(GLYPHS)]} {result.name}",
                COLOURS[min(place, len(COLOURS) - 1)],
                [ellipse_points(ellipse)],
            )
            for place, (result, ellipse) in enumerate(zip(results, ellipses, strict=True))
        ]
        names.append(Name("reference", MUTED, [np.zeros((1, 2))]))
        curve = np.column_stack(curve_2)
        if curve.size:
            names.append(Name("predicted frontier", MUTED, list(curve[:: max(1, len(curve) // 8), None])))
        _write_names(ax, names, curve, margins)
        return svg_text(figure, label, prefix)


def ellipse_points(ellipse: Ellipse, num_points: int = NUM_EDGE) -> FloatArray:
    """Return points of an ellipse's edge, (num_points, 2): safety, reward."""
    turn, angle = math.radians(ellipse.angle), np.linspace(0.0, 2.0 * np.pi, num_points, endpoint=False)
    along, across = 0.5 * ellipse.width * np.cos(angle), 0.5 * ellipse.height * np.sin(angle)
    safety = ellipse.safety + along * math.cos(turn) - across * math.sin(turn)
    reward = ellipse.reward + along * math.sin(turn) + across * math.cos(turn)
    return np.column_stack([safety, reward])


def _draw_method(ax: Any, ellipse: Ellipse, place: int) -> None:
    colour, first = COLOURS[min(place, len(COLOURS) - 1)], place == 0
    edge = ellipse_points(ellipse)
    ax.fill(*edge.T, color=colour, alpha=0.22 if first else 0.10, linewidth=0, zorder=2)
    closed = np.vstack([edge, edge[:1]])
    ax.plot(*closed.T, color=colour, linewidth=1.8 if first else 1.1, zorder=3)
    ax.plot(
        [ellipse.safety], [ellipse.reward], MARKERS[place % len(MARKERS)], color=colour,
        markerfacecolor=colour if first else "none", markersize=7, markeredgewidth=1.4, zorder=4,
    )  # fmt: skip


def _write_names(ax: Any, names: Sequence[Name], curve: FloatArray, margins: Sequence[float]) -> None:
    """Write each name near its shape, greedily in order; everything is measured in pixels."""
    figure = ax.figure
    texts = [ax.text(0.0, 0.0, n.text, color=n.colour, ha="center", va="center", zorder=5) for n in names]
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()  # the layout is final from here on
    frame, to_pixels = ax.get_window_extent(), ax.transData.transform
    zero_x, zero_y = to_pixels((0.0, 0.0))
    margin_x = [to_pixels((margin, 0.0))[0] for margin in margins]
    thin = [[(zero_x, frame.y0), (zero_x, frame.y1)], [(frame.x0, zero_y), (frame.x1, zero_y)]]
    strong = [np.array([(x, frame.y0), (x, frame.y1)]) for x in margin_x] + [to_pixels(curve)] * bool(curve.size)
    anchors = [[to_pixels(shape) for shape in name.shapes] for name in names]
    scene = Scene(
        frame=frame,
        shapes=[shapes[0] for name, shapes in zip(names, anchors, strict=True) if len(name.shapes) == 1],
        strong=np.vstack([_dense(line) for line in strong]),
        thin=np.vstack([_dense(np.array(line)) for line in thin]),
        boxes=[],
    )
    for text, name, shapes in zip(texts, names, anchors, strict=True):
        extent = text.get_window_extent()
        half = (extent.width / 2 + AIR_PX, extent.height / 2 + AIR_PX)
        found = [
            (_cost(box, gap, shape, scene), gap, box, place)
            for place, shape in enumerate(shapes)
            for gap, box in _candidates(shape, half, figure.dpi / 72.0)
        ]
        _, gap, box, place = min(found)
        text.set_position(ax.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        scene.boxes.append(box)
        if gap > 0:
            tie = _tie(box, shapes[place])
            scene.strong = np.vstack([scene.strong, _dense(tie)])
            ax.plot(*ax.transData.inverted().transform(tie).T, color=name.colour, linewidth=0.7, zorder=3)


def _candidates(shape: FloatArray, half: tuple[float, float], scale: float) -> list[tuple[int, Box]]:
    """Return (number of the gap, box) of places around a shape: the box touches it from outside in each direction."""
    centre, found = shape.mean(axis=0), []
    for gap, distance in enumerate(GAPS_PT):
        for direction in range(NUM_DIRECTIONS):
            angle = 2.0 * math.pi * direction / NUM_DIRECTIONS
            unit = np.array([math.cos(angle), math.sin(angle)])
            reach = float(((shape - centre) @ unit).max()) + half[0] * abs(unit[0]) + half[1] * abs(unit[1])
            x, y = centre + unit * (reach + distance * scale)
            found.append((gap, (float(x - half[0]), float(y - half[1]), float(x + half[0]), float(y + half[1]))))
    return found


def _cost(box: Box, gap: int, shape: FloatArray, scene: Scene) -> float:
    """Add up what a name in this box would cover, and what its line to the shape would."""
    x0, y0, x1, y1 = box
    tie = _dense(_tie(box, shape)) if gap > 0 else np.empty((0, 2))
    cost = COST_GAP * gap
    cost += COST_OUTSIDE * (x0 < scene.frame.x0 or y0 < scene.frame.y0 or x1 > scene.frame.x1 or y1 > scene.frame.y1)
    cost += COST_LABEL * sum(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in scene.boxes)
    cost += COST_CENTRE * sum(_inside(tie, other) for other in scene.boxes)
    cost += COST_LINE * _inside(scene.strong, box) + COST_RULE * _inside(scene.thin, box)
    for other in scene.shapes:
        middle = other.mean(axis=0)
        cost += COST_EDGE * _inside(other, box) + COST_CENTRE * _inside(middle[None], box)
        if other is not shape:  # inside another's ellipse a name, or what it names, seems to be that one's
            cost += COST_CENTRE * _covers(other, (0.5 * (x0 + x1), 0.5 * (y0 + y1)))
            cost += COST_CENTRE * _covers(other, shape.mean(axis=0))
            cost += COST_CENTRE * bool(tie.size and (np.hypot(*(tie - middle).T) < MARKER_PX).any())
    return cost


def _inside(points: FloatArray, box: Box) -> int:
    x, y = points.T
    return int(np.sum((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])))


def _covers(shape: FloatArray, point: npt.ArrayLike) -> bool:
    from matplotlib.path import Path as Outline

    return len(shape) > 2 and bool(Outline(shape).contains_points(np.asarray(point)[None])[0])


def _dense(points: FloatArray) -> FloatArray:
    """The curve at even spacing, so that its cost does not depend on how it was sampled."""
    length = np.append(0.0, np.cumsum(np.hypot(*np.diff(points, axis=0).T)))
    at = np.arange(0.0, length[-1] + 1e-9, 6.0)
    return np.column_stack([np.interp(at, length, points[:, 0]), np.interp(at, length, points[:, 1])])


def _tie(box: Box, shape: FloatArray) -> FloatArray:
    """A line from a name's box to the middle of its shape: the edges of several may lie on each other."""
    end = shape.mean(axis=0)
    return np.array([(np.clip(end[0], box[0], box[2]), np.clip(end[1], box[1], box[3])), end])
