"""Figures without colours: what shares a figure differs in marker, line or filling, and is dark enough to be seen.

docs/observability.md says how the colours were checked with a simulation of colour blindness.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from can_dist.reporting import page
from can_dist.reporting.figures import report as plots
from can_dist.reporting.figures import style
from can_dist.reporting.figures import trajectory as trajectory_plot

BASE = (Path(page.__file__).parent / "templates" / "base.html.j2").read_text(encoding="utf-8")
SCHEMES = dict(zip(("light", "dark"), BASE.split("prefers-color-scheme: dark", 1), strict=True))


def palette(scheme: str) -> dict[str, str]:
    """The colours of a page by their names."""
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", SCHEMES[scheme]))


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["ink", "muted", "reference", "policy", "margin", "met", "within", "unmet"])
def test_colour_of_a_page_reads_as_text_on_its_paper(scheme: str, name: str) -> None:
    colours = palette(scheme)
    assert contrast(colours[name], colours["paper"]) >= 4.5


def test_picture_of_a_comparison_has_the_colours_of_the_light_page() -> None:
    colours = palette("light")
    assert {name: colours[name] for name in style.LIGHT} == style.LIGHT


@pytest.mark.parametrize("colour", [*style.SERIES, style.GREY])
def test_colour_of_a_paper_figure_is_seen_on_white(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 2


@pytest.mark.parametrize("number", [6, 24])
def test_constraints_of_a_trajectory_differ_without_colour(number: int) -> None:
    looks = [trajectory_plot.look_of(index) for index in range(number)]
    cues = [(look["marker"], look["linestyle"]) for look in looks]
    assert len(set(cues)) == number


def test_methods_of_a_comparison_differ_without_colour() -> None:
    number = len(style.MARKERS)
    assert len(set(style.MARKERS)) == number >= 8, "there are eight methods"
    neighbours = [style.LINES[place % len(style.LINES)] for place in range(number)]
    assert all(a != b for a, b in itertools.pairwise(neighbours))


def outlines(svg: str, colour: str) -> list[str]:
    """The style of every line that is drawn in a colour of the page."""
    return re.findall(rf'style="([^"]*stroke: var\(--{colour}\)[^"]*)"', svg)


def test_distributions_of_reference_and_policy_differ_by_dashes_and_filling() -> None:
    svg, _ = plots.density_svg([0.0, 1.0, 1.5, 2.0], [1.0, 2.0, 2.5, 3.0], label="scores", prefix="p")
    dashed = [["stroke-dasharray" in style for style in outlines(svg, colour)] for colour in ("reference", "policy")]
    assert any(dashed[0])
    assert not any(dashed[1])
    assert "<pattern" in svg, "the reference is hatched"


def test_predicted_and_realised_differ_by_the_filling_of_their_marker() -> None:
    svg = plots.forest_svg((1.0, 0.5, 1.5), (0.8, 0.3, 1.3), ("1", "0.8"), margin=(0.6, "0.6"), label="s", prefix="p")
    markers = re.findall(r'<use [^>]*style="([^"]*)"', svg)
    open_ones = [style for style in markers if "fill: none" in style or "fill-opacity: 0" in style]
    assert any("stroke: var(--reference)" in style for style in open_ones)
    assert not any("stroke: var(--policy)" in style for style in open_ones)
    assert all("stroke-dasharray" in style for style in outlines(svg, "margin"))


def test_losses_differ_by_dashes() -> None:
    svg = plots.training_svg([[1, 0.7], [2, 0.6]], [[1, 0.7], [2, 0.65]], label="loss", prefix="p")
    dashes = {
        colour: {
            re.search(r"stroke-dasharray: ([\d. ,]+)", style)[1] for style in outlines(svg, colour) if "dash" in style
        }
        for colour in ("reference", "policy", "margin")
    }
    assert not dashes["reference"]
    assert dashes["policy"]
    assert dashes["margin"]
    assert dashes["policy"].isdisjoint(dashes["margin"])
