"""The report's figures of a training's course: what is drawn of estimates, and what is said of a λ that moved."""

from __future__ import annotations

from typing import Any

from can_dist.reporting.course_panel import course
from can_dist.reporting.run_page import page_values, render_report

STEPS = (50, 100, 150)


def estimates(**lam: tuple[float, ...]) -> dict[str, Any]:
    columns = {"gain.safety": (0.3, 0.6, 0.9), "gain.safety.low": (0.1, 0.4, 0.7), "gain.safety.high": (0.5, 0.8, 1.1)}
    columns |= {f"lam.{name}": values for name, values in lam.items()}
    return {
        name: [[step, value] for step, value in zip(STEPS, values, strict=True)] for name, values in columns.items()
    }


REALISED = {"mean": 0.8, "low": 0.6, "high": 1.0, "se": 0.1}
ROW = {"name": "safety", "margin": 1.0, "threshold": None, "verdict": "undecided", "realised": REALISED}
REPORT: dict[str, Any] = {
    "title": "MoCAN: predicted and realised", "method": "mocan", "beta": 0.5, "num_train_prompts": 9,
    "num_test_prompts": 4, "constraints": [{**ROW, "predicted": None}], "kl": None, "samples": None, "scores": None,
    "reward": {"name": "reward", "predicted": None, "realised": REALISED},
}  # fmt: skip
TRAINING = {"num_steps": 150, "loss": [[5, 0.69], [150, 0.6]], "eval_loss": [], "tokens": 1000}


def report(lam: dict[str, float] | None, **columns: tuple[float, ...]) -> dict[str, Any]:
    return {**REPORT, "training": {**TRAINING, "estimates": estimates(**columns), "lam": lam}}


def test_a_training_that_was_only_watched_shows_its_gains_and_no_lambda() -> None:
    made = report(None, safety=(0.5312,) * 3)
    drawn = course(made)
    assert drawn["moved"] == ""
    assert [panel["name"] for panel in drawn["course"]] == ["safety"]
    assert "0.9 at last" in str(drawn["course"][0]["svg"])
    page = render_report(page_values(made))
    assert "Estimated gain by step (band: 95% over prompts; dotted: the margin asked)." in page
    assert "λ moved" not in page


def test_a_lambda_that_moved_is_drawn_and_the_page_says_of_which_the_prediction_is() -> None:
    made = report({"safety": 1.31}, safety=(0.5312, 0.9, 1.31))
    drawn = course(made)
    assert drawn["moved"] == "safety from 0.531 to 1.31"
    assert [panel["name"] for panel in drawn["course"]] == ["safety", "λ"]
    page = render_report(page_values(made))
    assert "λ moved by it: safety from 0.531 to 1.31. What is predicted on this page is predicted of λ*" in page


def test_reports_of_before_show_neither() -> None:
    before = {**REPORT, "training": TRAINING}
    assert course(before) == {"moved": "", "course": []}
    assert "What the policy did meanwhile" not in render_report(page_values(before))
