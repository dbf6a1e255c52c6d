"""The HTML report: what it says, that hostile text stays text, that it is whole or absent, and how it renders."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from can_dist.dual import Margin, ScoreTable, solve_table
from can_dist.measuring.examination import examine
from can_dist.reporting.run_page import page_values, render_report, write_report
from can_dist.tables import artifacts

SECTIONS = [
    "verdict", "comparison", "price", "beside", "scores", "belief", "training", "diagnostics", "samples", "provenance",
    "reading",
]  # fmt: skip
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def interval(mean: float, half: float, se: bool = False) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half} | ({"se": half / 1.96} if se else {})


def constraint(name: str, mean: float, verdict: str, margin: float = 1.0, half: float = 0.21) -> dict[str, Any]:
    return {
        "name": name, "margin": margin, "threshold": None, "centre": -0.41, "lam": 0.5312, "lam_se": 0.0821,
        "predicted": interval(1.04, 0.15), "predicted_held_out": interval(0.97, 0.31),
        "realised": interval(mean, half, se=True), "verdict": verdict,
    }  # fmt: skip


def make_solution(names: list[str]) -> dict[str, Any]:
    return {
        "status": "converged", "lam": dict.fromkeys(names, 0.5312), "lam_se": dict.fromkeys(names, 0.0821),
        "value": -0.336627, "slack": dict.fromkeys(names, 3.1e-10), "centre": dict.fromkeys(names, -0.41),
        "margin": dict.fromkeys(names, 1.0), "threshold": dict.fromkeys(names, None), "beta": 0.5,
        "kkt_residual": 2.2e-11,
        "predicted": {"reward": 0.82, "reward_improvement": 0.41, "kl": 0.512,
                      "improvement": {name: {"mean": 1.04, "se": 0.08} for name in names}},
        "feasibility": {"t_star": 0.92, "certificate": None, "attainable": dict.fromkeys(names, 1.92)},
        "diagnostics": {"ess": {"min": 1.8, "p10": 4.1, "median": 9.6, "p90": 14.2, "max": 15.7},
                        "kl_over_log_k": 0.185,
                        "sd_over_beta": 1.31, "pareto_k": 0.44, "lam_by_responses": {"4": 0.61, "8": 0.56, "16": 0.53},
                        "verdict": "The weights are well spread: the prediction may be trusted."},
    }  # fmt: skip


@functools.cache
def examination(names: tuple[str, ...]) -> dict[str, Any]:
    """What the evaluate stage finds on a table of 40 prompts × 16 responses."""
    score = np.random.default_rng(3).normal(size=(640, len(names) + 1))
    table = ScoreTable.build(score[:, 0], score[:, 1:], np.repeat(np.arange(40), 16))
    solution = solve_table(table, beta=1.0, constraints=[Margin(name, 0.3) for name in names])
    return examine(table, solution, reward_name="helpfulness")


def make_report(constraints: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    constraints = constraints or [constraint("safety", 1.23, "met")]
    names = [c["name"] for c in constraints]
    scorers = ["helpfulness", *names]
    steps = np.arange(1, 241)
    loss = math.log(2) * np.exp(-steps / 300) + 0.04 * rng.standard_normal(steps.size)
    prompts = ["How do I pick a lock?\nI forgot my key.", "Tell me about tides. " * 12, "שלום, מה שלומך?", ""]
    return {
        "format_version": 1, "title": "Safety of a tiny model: MoCAN", "method": "mocan", "beta": 0.5,
        "num_train_prompts": 1000, "num_test_prompts": 64, "num_responses": 16,
        "models": {m: {"model": f"runs/demo/{m}", "digest": "sha256:" + "0123456789abcdef" * 4}
                   for m in ["reference", "policy", *scorers]},
        "solution": make_solution(names), "constraints": constraints,
        "reward": {"name": "helpfulness", "predicted": interval(0.41, 0.12),
                   "realised": interval(-0.337, 0.14, se=True)},
        "kl": {"predicted": 0.512, "predicted_interval": interval(0.512, 0.02),
               "predicted_held_out": interval(0.31, 0.04), "realised": interval(0.634, 0.055, se=True)},
        "win_rate": {name: interval(0.64, 0.06) for name in scorers},
        "lengths": {"reference": {"mean": 41.26, "truncated_fraction": 0.031},
                    "policy": {"mean": 46.9, "truncated_fraction": 0.004}},
        "scores": {name: {"reference": rng.normal(0, 1, 512).tolist(), "policy": rng.normal(1, 0.9, 512).tolist()}
                   for name in scorers},
        "examination": examination(tuple(names)),
        "prediction": {"source": "cross-fitted", "reason": None, "num_folds": 5, "num_prompts": 1000,
                       "num_responses": "16", "held_out_responses": 2},
        "training": {"num_steps": 240, "loss": np.stack([steps, loss], 1).tolist(), "tokens": 1_234_567,
                     "eval_loss": [[s, 0.69 - 0.0012 * s] for s in (40, 80, 120, 160, 200, 240)]},
        "tails": {name: {"border": 0.0, "worst_share": 0.1,
                         "unsafe": {"reference": interval(0.31, 0.06), "policy": interval(0.12, 0.04)},
                         "worst": {"reference": interval(-2.1, 0.3), "policy": interval(-1.2, 0.3)}} for name in names},
        "refusals": {"num_prompts": 50, "reference": interval(0.02, 0.02), "policy": interval(0.09, 0.04)},
        "counts": {"prompts_train": 1000, "prompts_repeated": 3, "responses_empty": 0},
        "warnings": ["3 prompts were repeated and kept once.", "A response reached the length limit."],
        "samples": [{"prompt": prompt, "reference": "Take a pin. " * 20, "policy": "Call a locksmith. " * 12,
                     "scores": {name: [-0.52, 1.337] for name in scorers}} for prompt in prompts],
        "config": {"beta": 0.5, "constraints.safety.margin": 1.0, "train.learning_rate": 5e-06, "train.lora": None,
                   "generate.seed": 12345, "train.targets": ["q_proj", "v_proj"]},
        "versions": {"can-dist": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0"},
    }  # fmt: skip


def minimal_report() -> dict[str, Any]:
    full = make_report()
    keep = ("title", "method", "beta", "num_train_prompts", "num_test_prompts", "constraints", "reward")
    return {key: full[key] for key in keep} | {"kl": None, "training": None, "samples": None, "scores": None}


TWO = [
    constraint("safety", 1.23, "met"),
    constraint("honesty", 0.92, "undecided") | {"prompts_to_decide": 900},
]
WORLDS = {
    "one": make_report(),
    "two": make_report(TWO),
    "minimal": minimal_report(),
    "unmet": make_report([constraint("safety", 0.41, "not met")]),
}


@functools.cache
def rendered(world: str) -> str:
    return render_report(page_values(WORLDS[world]))


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_every_section_stands_in_order() -> None:
    page = Page(rendered("two"))
    assert [a["id"] for t, a in page.tags if t == "section" and "id" in a] == SECTIONS
    assert ("html", {"lang": "en"}) in page.tags
    links = {(a["href"] or "")[1:] for t, a in page.tags if t == "a"}
    assert links <= set(SECTIONS)
    levels = [t for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == "h1"
    assert levels.count("h1") == 1


def test_figures_have_labels_and_ids_of_their_own() -> None:
    page = Page(rendered("two"))
    figures = [a for t, a in page.tags if t == "svg"]
    # forest, price, densities, (weights, λ̂, duals, frontiers), training
    assert len(figures) == 3 + 3 + 3 + (2 + 2 + 2 + 4) + 1
    assert all(a["role"] == "img" and a["aria-label"] and a["viewbox"] for a in figures)
    assert figures[0]["aria-label"] == (
        "safety: predicted +1.04 [0.89, 1.19], realised +1.23 [1.02, 1.44], margin 1.00"
    )
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_verdicts_read_as_sentences() -> None:
    assert (
        "The safety constraint is met: +1.23 [1.02, 1.44] against a margin of 1.00, on 64 held-out prompts."
        in Page(rendered("one")).text
    )
    assert (
        "The honesty constraint is undecided: +0.92 [0.71, 1.13] against a margin of 1.00, on 64 "
        "held-out prompts. The margin lies inside the 95% interval: about 900 held-out prompts would decide 4 times "
        "in 5, were this the true mean."
    ) in Page(rendered("two")).text
    assert (
        "The safety constraint is not met: +0.41 [0.20, 0.62] against a margin of 1.00, on 64 held-out prompts. "
        "The whole 95% interval lies below the margin."
    ) in Page(rendered("unmet")).text


def test_numbers_are_formatted() -> None:
    text = Page(rendered("one")).text
    for words in ("0.531", "−0.34 [−0.48, −0.20]", "0.63 [0.58, 0.69]", "64%", "41.3", "3.1%", "−0.337", "1 234 567",
                  "2.2e−11", "5e-06", '["q_proj", "v_proj"]', "12345", "sha256:0123"):  # fmt: skip
        assert words in text.replace("\u202f", " "), words


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_unknown_is_printed(world: str) -> None:
    page = Page(rendered(world))
    visible = page.text + " ".join(a["aria-label"] or "" for t, a in page.tags if t == "svg")
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|Undefined", visible, re.IGNORECASE)


def test_both_predictions_are_named_for_what_they_are() -> None:
    text = Page(rendered("one")).text
    assert "cross-fitted, each of the 1 000 training prompts with a λ solved on the others (5 folds), from 16" in (
        text.replace("\u202f", " ")
    )
    assert "λ* applied to the reference’s 2 responses to each held-out prompt" in text
    assert "+1.04 [0.89, 1.19] held-out +0.97 [0.66, 1.28]" in text
    assert "0.51 [0.49, 0.53] held-out 0.31 [0.27, 0.35]" in text
    report = copy.deepcopy(WORLDS["one"])
    report["prediction"] |= {"source": "held-out", "reason": "the prompts outside a fold have no solution."}
    text = Page(render_report(page_values(report))).text
    assert "There is no cross-fitted prediction: the prompts outside a fold have no solution." in text
    assert "Predicted: cross-fitted" not in text


def test_the_price_is_drawn_with_the_predicted_and_the_realised_point() -> None:
    labels = [a["aria-label"] or "" for t, a in Page(rendered("one")).tags if t == "svg"]
    assert "gain of safety: realised +1.23 at KL 0.63, predicted +1.04 at KL 0.51" in labels
    bare = copy.deepcopy(WORLDS["one"])
    bare["examination"] = None
    bare["kl"].pop("predicted_interval")
    labels = [a["aria-label"] or "" for t, a in Page(render_report(page_values(bare))).tags if t == "svg"]
    assert "gain of safety: realised +1.23 at KL 0.63" in labels


def test_the_header_says_what_it_is_and_the_runs_own_page_when_and_at_what_cost() -> None:
    report = make_report() | {"config": {"prompts": {"source": "my.jsonl"}}}
    assert "Reference" in Page(render_report(page_values(report))).text
    assert "prompts of my.jsonl." in Page(render_report(page_values(report))).text
    cost = {"generated_tokens": 82323, "scored_tokens": 1, "trained_tokens": 2, "num_trainings": 3}
    made = {"finished": "2026-11-28 08:22", "seconds": 202.0, "measured_seconds": 11.9, **cost}
    text = Page(render_report(page_values(report), made=made)).text.replace("\u202f", " ")
    assert "Measured 2026-11-28 08:22. The policy took 3.4 min, the measurement 12 s. It cost 82 323 generated" in text
    assert "1 scored and 2 trained on in 3 trainings." in text
    unknown = {"finished": "", "seconds": None, "measured_seconds": None, **cost}
    assert "prompts of my.jsonl. It cost 82" in Page(render_report(page_values(report), made=unknown)).text


def test_samples_stand_in_groups_with_the_change_of_their_means() -> None:
    report = make_report()
    first, second = report["samples"][:2]
    told = {"constraint": "safety", "means": {"safety": [-0.52, 0.337]}}
    report["samples"] = [first | told | {"group": "most worsened"}, second | told | {"group": "safe to unsafe"}]
    counts = {"stayed safe": 3, "unsafe to safe": 40, "safe to unsafe": 2, "stayed unsafe": 19}
    report["crossings"] = {"safety": {"border": 0.0, "counts": counts}}
    text = Page(render_report(page_values(report))).text
    assert text.index("Most worsened, by safety") < text.index("Safe to unsafe, by safety")
    assert text.count("−0.52 → +0.34") == 2
    assert "safety border 0 3 40 2 19" in text


def test_an_equality_missed_from_above_says_so() -> None:
    report = make_report([constraint("safety", 1.83, "not met")])
    assert "The whole 95% interval lies above the margin." in Page(render_report(page_values(report))).text


def test_unknown_numbers_become_dashes() -> None:
    report = copy.deepcopy(WORLDS["one"])
    report["constraints"][0] |= {"lam_se": None, "predicted": {"mean": None, "low": None, "high": None}}
    report["solution"]["kkt_residual"] = None
    report["scores"]["safety"]["policy"][3] = None
    report["training"]["loss"][5][1] = math.nan
    report["lengths"]["policy"]["truncated_fraction"] = None
    page = Page(render_report(page_values(report)))
    assert not re.search(r"\bnan\b|\bNone\b", page.text, re.IGNORECASE)
    assert "–" in page.text


def test_minimal_report_leaves_sections_out() -> None:
    page = Page(render_report(page_values(minimal_report())))
    sections = [a["id"] for t, a in page.tags if t == "section" and "id" in a]
    assert sections == ["verdict", "comparison", "provenance", "reading"]
    assert not render_report(page_values(minimal_report() | {"constraints": []})).count("constraint is")


def test_hostile_text_stays_text() -> None:
    report = make_report([constraint(HOSTILE, 1.23, "met")])
    report |= {"title": HOSTILE, "warnings": [HOSTILE], "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    report["reward"]["name"] = '"><b onload=x> $\\frac$'
    report["samples"] = [{"prompt": HOSTILE, "reference": HOSTILE + "</details>\x00\x1b[31m\ud800", "policy": HOSTILE,
                          "scores": {HOSTILE: [0.1, 0.2]}}]  # fmt: skip
    html = render_report(page_values(report))
    html.encode("utf-8")
    page = Page(html)
    assert not {t for t, _ in page.tags} & {"script", "img", "link", "iframe", "image", "object"}
    assert not [a for _, a in page.tags if any(key.startswith("on") for key in a)]
    assert HOSTILE in page.text
    assert not set(html) & {"\x00", "\x1b"}


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_fetched(world: str) -> None:
    html = rendered(world)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", html)
    assert not re.search(r'(src|href)="(?!#)', html)


def test_a_bound_that_rounds_to_the_margin_gets_more_decimals() -> None:
    row = constraint("safety", 1.2096, "met within the interval", half=0.21)
    assert (
        "+1.2096 [0.9996, 1.4196] against a margin of 1.0000"
        in Page(render_report(page_values(make_report([row])))).text
    )
    row = constraint("safety", 123.4, "met", margin=100.0, half=4.2)
    assert (
        "+123.4 [119.2, 127.6] against a margin of 100.0" in Page(render_report(page_values(make_report([row])))).text
    )


def test_a_threshold_is_judged_by_the_policys_mean() -> None:
    row = constraint("safety", 2.0, "met within the interval", margin=1.25, half=0.7)  # of older code
    row |= {"threshold": 0.84, "policy_mean": interval(0.91, 0.2)}
    text = Page(render_report(page_values(make_report([row])))).text
    assert "is undecided: mean 0.91 [0.71, 1.11] against a threshold of 0.84, on 64 held-out" in text
    assert "The threshold lies inside the 95% interval." in text
    assert "mean at least 0.84" in text


def test_a_method_without_a_dual_is_measured_and_says_so_in_one_line() -> None:
    """No predicted column, no diamond, no λ, no section on belief; everything measured is there."""
    report = make_report() | {"solution": None, "examination": None, "prediction": None, "num_train_prompts": None}
    report |= {"unpredicted": "DPO-H trained this policy for no dual’s solution, so nothing predicted it."}
    for row in [*report["constraints"], report["reward"]]:
        for key in ("predicted", "predicted_held_out", "lam", "lam_se"):
            row.pop(key, None)
    report["kl"] = {"realised": report["kl"]["realised"]}
    page = Page(render_report(page_values(report)))
    assert page.text.count("DPO-H trained this policy for no dual’s solution, so nothing predicted it.") == 1
    sections = [a["id"] for t, a in page.tags if t == "section" and "id" in a]
    assert sections == [name for name in SECTIONS if name != "belief"]
    for words in ("Multiplier", "held-out +", "Predicted", "solved on"):
        assert words not in page.text.split("How to read this report")[0], words
    assert "Measured on 64 held-out prompts." in page.text
    assert "+1.23 [1.02, 1.44] against a margin of 1.00" in page.text
    assert "0.63 [0.58, 0.69]" in page.text
    labels = [a["aria-label"] for t, a in page.tags if t == "svg"]
    assert labels[0] == "safety: realised +1.23 [1.02, 1.44], margin 1.00"
    assert not re.search(r"\bnan\b|\bNone\b", page.text, re.IGNORECASE)


def test_tails_and_refusals_stand_beside_the_means() -> None:
    text = Page(rendered("one")).text
    assert "safety responses below 0 31.0% [25.0%, 37.0%] 12.0% [8.0%, 16.0%]" in text
    assert "safety mean of the worst 10% of responses −2.10 [−2.40, −1.80] −1.20 [−1.50, −0.90]" in text
    assert "over-refusal refused, of 50 benign prompts 2.0% [0.0%, 4.0%] 9.0% [5.0%, 13.0%]" in text
    assert "over-refusal was not measured" not in text
    assert (
        "so over-refusal was not measured" in Page(render_report(page_values(make_report() | {"refusals": None}))).text
    )


@pytest.mark.parametrize(
    "scores",
    [[0.0], [2.0] * 9, [], [1e9, 0.1, 0.2, 0.3, 0.15, 0.22], [None, 1.0], [1e-12, 2e-12, 3e-12]],
    ids=["single", "constant", "empty", "outlier", "null", "tiny"],
)
def test_odd_score_columns_draw(scores: list[float]) -> None:
    report = make_report() | {"scores": {"safety": {"reference": scores, "policy": scores[::-1]}}}
    html = render_report(page_values(report))
    assert ("beyond the axis not drawn" in html) == (1e9 in scores)
    assert ("share of responses" in html) == any(score is not None for score in scores)


def test_tiny_values_name_their_factor_on_the_axis() -> None:
    curve = {"lam": [0.0, 0.5, 1.0], "value": [2e-5, 1e-5, 3e-5], "margins": [1.0], "minima": [0.5]}
    assert "dual value D(λ) (×1e−5)" in render_report(page_values(minimal_report() | {
        "solution": make_solution(["safety"]), "examination": {"dual_curves": {"safety": curve}}}))  # fmt: skip


def test_same_report_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    write_report(page_values(WORLDS["two"]), first)
    write_report(page_values(json.loads(json.dumps(WORLDS["two"]))), second)
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "b.html"}


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(page_values(minimal_report()), path)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_report(page_values({"title": "incomplete"}), path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(page_values(WORLDS["unmet"]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def browse(tmp_path: Path, page: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


# The report carries a policy against scripts, so it is measured from outside, in a frame as wide as the device.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><iframe id="f" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="out"></pre><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const doc = frame.contentDocument;
  doc.querySelectorAll("details").forEach(d => d.open = true);
  const split = e => {{
    const range = doc.createRange();
    range.selectNodeContents(e);
    const ends = [...range.getClientRects()].map(r => r.bottom);
    return Math.max(...ends) - Math.min(...ends) > 10;
  }};
  const box = e => {{ const r = e.getBoundingClientRect(); return [r.width, r.height]; }};
  document.getElementById("out").textContent = JSON.stringify({{
    width: doc.documentElement.clientWidth, scroll: doc.documentElement.scrollWidth,
    headings: [...doc.querySelectorAll("h1, h2")].map(e => e.textContent),
    figures: [...doc.querySelectorAll("svg")].map(box),
    ink: getComputedStyle(doc.documentElement).color,
    small: Math.min(...[...doc.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
    wide: [...doc.querySelectorAll("body *")].filter(e => !e.closest(".scroll *") &&
      e.getBoundingClientRect().right > doc.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    broken: [...doc.querySelectorAll("table.narrow thead th, table.grid thead th")].filter(e =>
      /^[a-z]{{1,10}}$/.test(e.textContent) && split(e)).map(e => e.textContent),
    scripts: typeof frame.contentWindow.hacked,
  }});
}};
frame.srcdoc = {page};
</script>"""


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_renders_in_a_browser(tmp_path: Path, width: int) -> None:
    report = make_report([constraint("a_constraint_with_a_long_unbroken_name", 12345.6, "met", 1e4, 900.0),
                          constraint("refusals", -0.0021, "not met", 0.0004, 0.0011)])  # fmt: skip
    report["samples"][0]["policy"] = "x" * 900 + "<script>window.hacked = 1</script>"
    page = tmp_path / "harness.html"
    quoted = json.dumps(render_report(page_values(report))).replace("</", "<\\/")
    page.write_text(MEASURE.format(width=width, page=quoted), encoding="utf-8")
    dom = browse(tmp_path, page, "--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000")
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    seen = json.loads(re.sub(r"&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], found[1]))
    assert seen["width"] in range(width - 20, width + 1)
    assert seen["scroll"] <= seen["width"], seen["wide"]
    assert seen["wide"] == []
    assert seen["broken"] == [], "a word of a table's head stands in several lines"
    assert seen["headings"][0] == report["title"]
    assert len(seen["headings"]) == len(SECTIONS)  # the verdict stands under the title; h1 takes its place
    assert len(seen["figures"]) == 20
    assert all(w > 250 and h > 80 for w, h in seen["figures"])
    assert seen["small"] >= 9
    assert seen["scripts"] == "undefined"


@needs_chromium
def test_opens_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(page_values(WORLDS["one"]), path)
    dom = browse(tmp_path, path, "--dump-dom")
    assert dom.count("<svg ") == 13
    assert "Predicted beside realised" in dom
