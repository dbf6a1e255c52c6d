"""The page of a sweep: every margin is on it, with its numbers or with why it has no policy; names stay text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from can_dist.cli.sweep import margin_points
from can_dist.config import validate_config, with_margins
from can_dist.errors import ConfigError
from can_dist.reporting.sweep_page import render_sweep

HOSTILE = "<script>x</script>"


def point(margin: float, verdict: str, name: str = "safety") -> dict[str, Any]:
    realised = {"mean": margin + 0.02, "low": margin - 0.1, "high": margin + 0.14}
    row = {"name": name, "lam": 0.825, "predicted": margin, "realised": realised, "margin": margin, "verdict": verdict}
    return {
        "name": f"{name} {margin:+g}",
        "margins": {name: margin},
        "refusal": None,
        "constraints": [row],
        "reward": {"name": "helpful", "realised": {"mean": 1.5, "low": 1.25, "high": 1.75}},
        "kl": {"mean": 0.93},
        "report": "evaluate-1/report.html",
    }


def refused(name: str, message: str) -> dict[str, Any]:
    return {"name": name, "margins": {}, "refusal": {"kind": "InfeasibleConstraint", "message": message}}


def test_page_has_the_numbers_of_each_margin_and_the_reasons_of_the_others() -> None:
    points = [point(0.25, "met"), point(0.5, "undecided"), refused("safety +9", f"at most 1.2 {HOSTILE}")]
    page = render_sweep({"format_version": 1, "points": points}, {})
    text = re.sub(r"<[^>]+>", " ", page.partition("<main>")[2])
    for shown in ("+0.27", "0.15", "0.39", "0.825", "+1.50", "0.93", "met", "undecided", "safety +9", "at most 1.2"):
        assert shown in text, shown
    assert page.count('href="evaluate-1/report.html"') == 2
    assert "3 margins, 2 of them with a policy" in page
    assert "<script" not in page
    assert "Margins without a policy" not in render_sweep({"format_version": 1, "points": points[:2]}, {})


def test_names_of_constraints_stay_text() -> None:
    assert "<script" not in render_sweep({"format_version": 1, "points": [point(0.25, "met", HOSTILE)]}, {})


def test_margins_of_several_constraints_are_combined() -> None:
    assert margin_points(["safety=0.25,0.5"]) == [{"safety": 0.25}, {"safety": 0.5}]
    assert margin_points(["a=1,2", "-b=3"]) == [{"a": 1.0, "-b": 3.0}, {"a": 2.0, "-b": 3.0}]


@pytest.mark.parametrize("texts", [["safety"], ["safety="], ["=1"], ["safety=1,x"], ["a=1,1"], ["a=1", "a=2"]])
def test_what_is_no_list_of_margins_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"--margin {texts[-1]}"):
        margin_points(texts)


def test_other_margins_replace_a_threshold_and_change_nothing_else() -> None:
    scorer = {"kind": "callable", "function": "scorers:num_calm"}
    raw = {
        "prompts": {"source": "prompts.jsonl"},
        "reference": {"model": "lm"},
        "reward": scorer,
        "constraints": {"safety": {"scorer": scorer, "threshold": 0.1}, "-cost": {"scorer": scorer, "margin": 1}},
    }
    config = validate_config(raw)
    other = with_margins(config, {"safety": 0.5})
    assert (other.constraints["safety"].margin, other.constraints["safety"].threshold) == (0.5, None)
    assert other.constraints["-cost"] == config.constraints["-cost"]
    assert with_margins(other, {"safety": 0.5}) == other
    with pytest.raises(ConfigError, match=r"margin safe: no such constraint. Name one of safety, -cost"):
        with_margins(config, {"safe": 0.5})
