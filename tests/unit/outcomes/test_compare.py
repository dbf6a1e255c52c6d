"""Comparing evaluations: what is refused, how policies are named, what a method cost, and the page. No model runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from can_dist.cli.compare import compare as compare_command
from can_dist.errors import DataError
from can_dist.measuring.gains import interval
from can_dist.outcomes.compare import check_same_basis, compare, cost_of, find_evaluations, names_of
from can_dist.reporting.page import MISSING
from can_dist.tables.artifacts import Artifact, open_stage, write_json, write_part

NUM_PROMPTS = 40
HOSTILE = "<script>alert('x')</script>"
BASIS = {
    "reference": {"weights": "abc", "template": None},
    "held_out_prompts": "def",
    "sampling": {"temperature": 1.0, "stop": []},
    "scorers": {"reward": {"kind": "callable", "sign": 1}, "safety": {"kind": "callable", "sign": 1}},
}


def made(run: Path, stage: str, label: str, inputs: Mapping[str, Artifact], **info: Any) -> Artifact:
    return open_stage(run, stage, label, {"test": label}, inputs).commit([], info)


def trained(run: Path, name: str, tokens: int, inputs: Mapping[str, Artifact]) -> Artifact:
    return made(run, "train", name, inputs, summary={"num_tokens": tokens, "num_steps": 3})


def sampled(run: Path) -> tuple[Artifact, Artifact]:
    """Responses of 100 tokens, and their two scores in one table: a diamond."""
    responses = made(run, "generate", "reference on train", {}, num_tokens=100)
    parts = {name: made(run, "score", name, {"responses": responses}, num_tokens=100) for name in ("reward", "safety")}
    return responses, made(run, "scores", "train", {"responses": responses, **parts})


def evaluated(
    run: Path,
    method: str,
    policy: Artifact,
    *,
    variant: str = "",
    gain: tuple[float, float] = (0.5, 0.5),
    constraints: tuple[str, ...] = ("safety",),
    config: Mapping[str, Any] | None = None,
    basis: Mapping[str, Any] = BASIS,
    predicted: bool = False,
    seed: int = 0,
    inputs: Mapping[str, Artifact] | None = None,
    **further: Any,
) -> Artifact:
    """An evaluation as the stage leaves it, of gains around ``gain`` in reward and every constraint."""
    random = np.random.default_rng(seed)
    title = {"mocan": "MoCAN", "cdpo": "C-DPO", "dpo_h": "DPO-H"}.get(method, method.upper())
    title = f"{title} ({variant})" if variant else title
    columns: dict[str, Any] = {"prompt_id": [f"p{n:02}" for n in range(NUM_PROMPTS)]}
    scores = ("reward", *constraints)
    for index, score in enumerate(scores):
        columns[f"{score}.reference"] = np.linspace(-1, 1, NUM_PROMPTS)
        shift = gain[min(index, 1)] + 0.3 * random.normal(size=NUM_PROMPTS)
        columns[f"{score}.policy"] = columns[f"{score}.reference"] + shift
    columns["kl"] = 0.1 + 0.2 * random.random(NUM_PROMPTS)
    one = {"mean": 0.2, "low": 0.1, "high": 0.3, "se": 0.05}
    sides = {"reference": one, "policy": one}
    curve = {"margin": [-0.2, 0.5, 1.0], "reward_improvement": [1.0, None, 0.2], "kl": [0.3, None, 0.9]}
    report = {
        "method": method, "variant": variant, "name": title, "beta": 0.1, "config": dict(config or {}),
        "reward": {"name": "reward"},
        "constraints": [{"name": c, "margin": 0.3, "threshold": None, "verdict": "met"} for c in constraints],
        "kl": {"realised": one}, "refusals": None, "lengths": {"policy": one, "reference": one},
        "tails": {c: {"border": 0.0, "worst_share": 0.1, "unsafe": sides, "worst": sides} for c in constraints},
        "prediction": {"source": "held-out"} if predicted else None,
        "examination": {"frontier": dict.fromkeys(constraints, curve)} if predicted else None, **further,
    }  # fmt: skip
    stage = open_stage(run, "evaluate", title, {"config": dict(config or {})}, {"policy": policy, **(inputs or {})})
    write_json(stage.path / "report.json", report)
    write_part(stage.path, 0, pa.table(columns))
    return stage.commit(["report.json"], {"method": method, "variant": variant, "basis": basis})


def log(run: Path, *events: tuple[str, float]) -> None:
    lines = [
        json.dumps({"time": 1.0, "event": "done", "stage": "a", "label": "", "artifact": name, "seconds": s}) + "\n"
        for name, s in events
    ]
    (run / "log.jsonl").write_text("".join(lines) + '{"event": "reused"}\n')


# -------------------------------------------------------------------------------------------------------------- cost


def test_cost_counts_every_artifact_once_and_the_evaluation_not_at_all(tmp_path: Path) -> None:
    responses, scores = sampled(tmp_path)
    preferences = made(tmp_path, "label", "a", {"responses": responses, "scores": scores})
    policy = trained(tmp_path, "a", 7000, {"preferences": preferences})
    evaluation = evaluated(tmp_path, "mocan", policy)
    log(tmp_path, (responses.path.name, 2.0), (policy.path.name, 5.0), (policy.path.name, 1.5), ("evaluate-x", 99.0))
    cost = cost_of(evaluation)
    assert (cost.generated_tokens, cost.scored_tokens, cost.trained_tokens) == (100, 200, 7000)
    assert (cost.num_trainings, cost.wall_s) == (1, 8.5)


def test_cost_without_a_log_has_no_time(tmp_path: Path) -> None:
    assert cost_of(evaluated(tmp_path, "dpo_h", trained(tmp_path, "a", 1, {}))).wall_s is None


def loop(run: Path, tokens: list[int], gains: list[float], scores: Artifact) -> Artifact:
    """C-DPO's rounds: unrelated trainings, held together by their trajectory; the last policy is evaluated."""
    policies = [trained(run, f"round {n}", count, {"scores": scores}) for n, count in enumerate(tokens)]
    rounds = [
        {"policy": policy.path.name, "constraints": {"safety": {"improvement": gain}}}
        for policy, gain in zip(policies, gains, strict=True)
    ]
    inputs = {f"policy-{n}": policy for n, policy in enumerate(policies)}
    stage = open_stage(run, "trajectory", "cdpo", {}, inputs)
    write_json(stage.path / "trajectory.json", {"rounds": rounds})
    stage.commit(["trajectory.json"], {"rounds": len(rounds)})
    return evaluated(run, "cdpo", policies[-1])


def test_a_loop_costs_all_its_rounds_and_stands_against_the_one_shot_method(tmp_path: Path) -> None:
    _, scores = sampled(tmp_path)
    once = evaluated(tmp_path, "mocan", trained(tmp_path, "once", 1000, {"scores": scores}))
    rounds = loop(tmp_path, [1000, 1200, 1400], [0.1, 0.29, 0.31], scores)
    cost = cost_of(rounds)
    assert (cost.num_trainings, cost.trained_tokens, cost.generated_tokens) == (3, 3600, 100)
    page = compare([once, rounds], tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())["one_shot"]
    assert (found["ratio"], found["rounds"], found["reached"], found["constraint"]) == (3.6, 3, True, "safety")
    text = page.read_text()
    assert "C-DPO reached the margin of safety by its mean gain on the training prompts after 3 trainings, 3.6k" in text
    assert "tokens against 1k of MoCAN: 3.6 times the training of the one-shot method." in text


# ------------------------------------------------------------------------------------------------ what can be compared


def test_what_was_measured_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "mocan", trained(tmp_path, "a", 1, {}))
    scorers = {**BASIS["scorers"], "safety": {"kind": "callable", "sign": -1}}
    for change, words in (
        (
            {"reference": {"weights": "other", "template": None}},
            'same reference, so.*\\n  reference.weights: "abc" | "o',
        ),
        ({"held_out_prompts": "ghi"}, 'same held out prompts, so.*\\n  held_out_prompts: "def" | "ghi"'),
        ({"scorers": scorers}, "same scorers, so.*\\n  scorers.safety.sign: 1 | -1"),
        ({"sampling": {"temperature": 0.5, "stop": []}}, "same sampling, so.*\\n  sampling.temperature: 1.0 | 0.5"),
    ):
        run = tmp_path / str(len(words))
        run.mkdir()
        other = evaluated(run, "dpo_h", trained(run, "a", 1, {}), basis=BASIS | change)
        with pytest.raises(DataError, match=words.replace(" | ", r" \| ")):
            check_same_basis([first, first, other])
    check_same_basis([first, first])


def test_nothing_or_one_evaluation_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere: no evaluation\. Give run directories, or evaluate-\.\.\. directories"
    ):
        find_evaluations([tmp_path / "nowhere"])
    policy = trained(tmp_path, "a", 1, {})
    with pytest.raises(DataError, match=r"train-\w+ is no evaluation that can be compared\. Give run"):
        find_evaluations([policy.path])
    one = evaluated(tmp_path, "mocan", policy)
    with pytest.raises(
        DataError, match=r"1 evaluation\(s\) to compare \(.*\): expected two at least\. Run more methods"
    ):
        compare([one, one], tmp_path)
    assert not (tmp_path / "compare.html").exists()


def test_evaluations_of_a_run_come_in_the_order_of_the_methods(tmp_path: Path) -> None:
    for method, variant in (("dpo_s", ""), ("p_sacpo", "q = 0.75"), ("mocan", ""), ("p_sacpo", "q = 0.25")):
        evaluated(tmp_path, method, trained(tmp_path, method + variant, 1, {}), variant=variant)
    found = find_evaluations([tmp_path])
    assert [(one.info["method"], one.info["variant"]) for one in found] == [
        ("mocan", ""), ("dpo_s", ""), ("p_sacpo", "q = 0.25"), ("p_sacpo", "q = 0.75")
    ]  # fmt: skip
    assert find_evaluations([one.path for one in found]) == found


def test_policies_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    """By their variant, else by the keys of the configuration, else by their directory."""
    policies = [trained(tmp_path, str(n), 1, {}) for n in range(2)]
    configs = [{"constraints": {"safety": {"margin": m}}, "beta": 0.1, "train": {"lora": None}} for m in (0.5, 1.0)]
    margins = [evaluated(tmp_path, "mocan", p, config=c) for p, c in zip(policies, configs, strict=True)]
    assert names_of(margins) == ["MoCAN, margin 0.5", "MoCAN, margin 1.0"]
    mixed = [evaluated(tmp_path, "p_sacpo", policies[0], variant=f"q = {q}") for q in (0.25, 0.5)]
    assert names_of(mixed) == ["P_SACPO (q = 0.25)", "P_SACPO (q = 0.5)"]
    same = [evaluated(tmp_path, "dpo_h", policy) for policy in policies]
    assert names_of(same) == [f"DPO-H, {one.path.name}" for one in same]
    assert names_of(margins[:1]) == ["MoCAN"]


# -------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """MoCAN with a prediction, and another with a hostile name, on two constraints."""
    names = ("safety", "honesty")
    policy = trained(tmp_path, "a", 10, {})
    evaluated(tmp_path, "mocan", policy, constraints=names, predicted=True, gain=(1.0, 0.5))
    evaluated(tmp_path, "dpo_h", policy, constraints=names, variant=HOSTILE, gain=(-0.2, 0.1), seed=1)
    return tmp_path


def test_page_has_a_picture_and_a_table_for_each_constraint(two: Path) -> None:
    result = CliRunner().invoke(compare_command, [str(two), "--out", str(two / "out")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == str(two / "out" / "compare.html")
    assert re.search(r"^MoCAN +\+[01]\.\d\d \[", result.output, re.MULTILINE)
    text = (two / "out" / "compare.html").read_text()
    page = Page(text)
    assert [a["id"] for t, a in page.tags if t == "section"] == [
        "constraint-1", "constraint-2", "cost", "ranking", "provenance", "reading"
    ]  # fmt: skip
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert text.count("The dotted curve is what the dual of MoCAN predicts") == 4
    assert "every strength" not in text
    assert not re.search(r"\bnan\b|\bNone\b|Undefined", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {path.name for path in (two / "out").iterdir()} == {
        "compare.html", "compare.json", "compare-safety.svg", "compare-honesty.svg", "compare_kl-safety.svg",
        "compare_kl-honesty.svg",
    }  # fmt: skip


def test_numbers_of_the_record_are_those_of_the_tables(two: Path) -> None:
    compare(find_evaluations([two]), two)
    record = json.loads((two / "compare.json").read_text())
    for one, evaluation in zip(record["methods"], find_evaluations([two]), strict=True):
        for score in ("reward", "safety", "honesty"):
            gains = (evaluation.table[f"{score}.policy"].to_numpy()) - evaluation.table[f"{score}.reference"].to_numpy()
            assert one["gains"][score] == pytest.approx(interval(gains), rel=1e-9)
    ranking = record["ranking"]["reward"]
    assert ranking["names"][:2] == ["reference", "MoCAN"]
    above = np.mean([a > b for a, b in zip(*(
        find_evaluations([two])[n].table["reward.policy"].to_pylist() for n in (0, 1)), strict=True)])  # fmt: skip
    assert ranking["win"][1][2] == pytest.approx(above)
    assert record["frontier"]["safety"] == {"method": "MoCAN", "safety": [-0.2, 0.5, 1.0], "reward": [1.0, None, 0.2],
                                            "kl": [0.3, None, 0.9]}  # fmt: skip
    again = (two / "compare.html").read_bytes()
    compare(find_evaluations([two]), two)
    assert (two / "compare.html").read_bytes() == again


def test_hostile_names_stay_text(two: Path) -> None:
    compare(find_evaluations([two]), two)
    text = (two / "compare.html").read_text() + (two / "compare-safety.svg").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text


def test_pictures_stand_by_themselves(two: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    compare(find_evaluations([two]), two)
    root = ElementTree.fromstring((two / "compare-honesty.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in (two / "compare-honesty.svg").read_text()
    assert "var(--policy)" in (two / "compare.html").read_text()


# ------------------------------------------------------------------------------ rays, over-refusal, and public sets


def share(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - 0.05), "high": min(1.0, mean + 0.05), "se": 0.02}


def profile_of(policy: float, reference: float = 0.1) -> dict[str, Any]:
    """XSTest as a report has it: two totals, and a category that the comparison leaves to the reports."""
    sides = {"reference": share(reference), "policy": share(policy)}
    rows = [
        {"name": name, "is_total": total, "num_prompts": number, "refused": sides, "unsafe": {"safety": sides}}
        for name, total, number in (("to answer", True, 250), ("to refuse", True, 200), ("homonyms", False, 25))
    ]
    return {"set": "xstest", "num_prompts": 450, "rows": rows, "too_small": 0, "over_refusal": sides}


def test_a_set_that_several_were_asked_is_one_table_with_the_reference(tmp_path: Path) -> None:
    policy = trained(tmp_path, "a", 1, {})
    one_set, other_set = (made(tmp_path, "prompts", name, {}) for name in ("profile", "other"))
    for method, rate, inputs in (("mocan", 0.2, one_set), ("dpo_h", 0.4, one_set), ("dpo_s", 0.7, other_set)):
        evaluated(tmp_path, method, policy, inputs={"profile": inputs}, profile=profile_of(rate))
    evaluated(tmp_path, "sacpo", policy)
    compare(find_evaluations([tmp_path]), tmp_path)
    record = json.loads((tmp_path / "compare.json").read_text())
    first, second = record["profiles"]
    assert [list(entry["rows"]) for entry in (first, second)] == [
        ["reference", "MoCAN", "DPO-H"], ["reference", "DPO_S"]
    ]  # fmt: skip
    assert first["groups"] == {"to answer": 250, "to refuse": 200}
    assert first["rows"]["DPO-H"]["to refuse"]["unsafe"]["safety"]["mean"] == 0.4
    assert first["rows"]["reference"]["to answer"]["refused"]["mean"] == 0.1
    text = (tmp_path / "compare.html").read_text()
    assert text.count("<caption>XSTest: shares of responses") == 2
    assert "to answer: refused, of 250" in text
    assert "to refuse: safety below 0" in text


def test_over_refusal_is_a_column_also_where_one_method_has_none(tmp_path: Path) -> None:
    policy = trained(tmp_path, "a", 1, {})
    rates = {"num_prompts": 250, "reference": share(0.1), "policy": share(0.3)}
    evaluated(tmp_path, "mocan", policy, refusals=rates)
    evaluated(tmp_path, "dpo_h", policy)
    compare(find_evaluations([tmp_path]), tmp_path)
    text = (tmp_path / "compare.html").read_text()
    (table,) = re.findall(r"benign prompts refused</th>.*?</tbody>", text, re.DOTALL)
    rows = re.findall(r"<tr>.*?</tr>", table[table.index("<tbody>") :], re.DOTALL)
    cells = [re.findall(r"<td>(.*?) <small>", row) for row in rows]
    assert [len(row) for row in cells] == [4, 4]
    assert (cells[0][2], cells[1][2]) == ("30.0%", MISSING)


def test_the_ray_of_the_first_estimated_method_is_drawn_in_both_pictures(tmp_path: Path) -> None:
    policy = trained(tmp_path, "a", 1, {})
    ray = {"improvement": {"safety": [0.0, 0.4]}, "reward_improvement": [0.0, 0.1], "kl": [0.0, 0.2]}
    estimate = {"strength": {"alpha": 1.7}, "line": "safety +0.24", "ray": ray}
    evaluated(tmp_path, "dpo_h", policy)
    evaluated(tmp_path, "mocan", policy, estimate=estimate)
    compare(find_evaluations([tmp_path]), tmp_path)
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["ray"] == {
        "safety": {"method": "MoCAN", "safety": [0.0, 0.4], "reward": [0.0, 0.1], "kl": [0.0, 0.2]}
    }
    text = (tmp_path / "compare.html").read_text()
    assert text.count("validation responses say of every strength of MoCAN") == 2
    assert all("MoCAN, any strength" in (tmp_path / name).read_text() for name in ("compare.svg", "compare_kl.svg"))
