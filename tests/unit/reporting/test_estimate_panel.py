"""The report's section on the estimate: what it shows, and that a report without one has none."""

from __future__ import annotations

from typing import Any

import pytest
from policy_world import estimate

from can_dist.dual import Demand
from can_dist.measuring.ray import ray
from can_dist.reporting.estimate_panel import estimated
from can_dist.reporting.run_page import page_values, render_report

ASKED = [Demand("a", 0.5)]


def value(mean: float, reach: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "se": reach / 2, "low": mean - reach, "high": mean + reach}


def report(**changes: Any) -> dict[str, Any]:
    found = estimate(0.25)
    record = {
        "strength": {"alpha": 2.0, "limiting": "a", "notes": ["64 validation prompts leave <it> wide"]},
        "policy": estimate(0.48).to_dict(),
        "line": "a +0.48",
        "verdict": "Stopped short: a went 50% of the way",
        "ray": ray(found, ASKED),
    }
    row = {"name": "a", "margin": 0.5, "threshold": None, "realised": value(0.47), "verdict": "undecided"}
    return {
        "title": "MoCAN", "method": "mocan", "beta": 1.0, "num_test_prompts": 64,
        "constraints": [{**row, "predicted": value(0.5)}],
        "reward": {"name": "reward", "realised": value(0.14), "predicted": value(0.2)},
        "kl": {"realised": value(0.41), "predicted": 0.26, "predicted_interval": value(0.26)},
        "estimate": {**record, **changes},
    }  # fmt: skip


def test_estimate_stands_beside_predicted_and_realised() -> None:
    shown = estimated(report())
    assert shown is not None
    row = shown["rows"][0]
    assert row["name"] == "a"
    assert (row["asked"], row["estimated"][:6], row["predicted"][:6], row["realised"][:6]) == (
        "0.500", "+0.480", "+0.500", "+0.470",
    )  # fmt: skip
    assert [row["name"] for row in shown["rows"]] == ["a", "reward", "KL (nats)", "length", "direction"]
    assert (shown["alpha"], shown["limiting"]) == ("2", "a")
    assert len(shown["panels"]) == 2


def test_page_shows_the_section_and_escapes_what_it_is_told() -> None:
    page = render_report(page_values(report()))
    assert 'href="#estimate"' in page
    assert "Stopped short: a went 50% of the way" in page
    assert "given strength 2, which a needs" in page
    assert "leave &lt;it&gt; wide" in page


def test_policy_as_trained_shows_no_strength() -> None:
    page = render_report(page_values(report(strength=None)))
    assert "Estimated without generating" in page
    assert "was given strength" not in page


@pytest.mark.parametrize("absent", [None, {}])
def test_report_without_an_estimate_has_no_section(absent: Any) -> None:
    record = report() | {"estimate": absent}
    assert estimated(record) is None
    assert "Estimated without generating" not in render_report(page_values(record))
