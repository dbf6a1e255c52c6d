"""evaluations → comparison: all methods on the same held-out prompts, with the cost of each.

The evaluations may lie in several run directories. They must have been measured alike (:func:`check_same_basis`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.config import METHODS
from can_dist.dual import mean_interval
from can_dist.errors import DataError
from can_dist.measuring.comparison import Cost, MethodResult, OneShotRatio, method_result, one_shot_ratio
from can_dist.measuring.gains import column
from can_dist.measuring.ranking import Ranking, rank_methods
from can_dist.measuring.verdicts import current
from can_dist.stages.cost import cost_of, trajectories
from can_dist.stages.trajectory import TRAJECTORY
from can_dist.tables.artifacts import MANIFEST, Artifact, flatten, load_artifact, write_json, write_text
from can_dist.workspace import REPORT

PAGE, RECORD = "compare.html", "compare.json"
FILES = {"gains": "compare.svg", "price": "compare_kl.svg"}
"""The files of the pictures; of several constraints each has its name behind a hyphen."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluated policy.

    Attributes:
        name: of the method; different from the others'.
        artifact: the evaluation.
        report: its ``report.json``.
        gains: a row per held-out prompt, see :func:`can_dist.measuring.gains.gains_table`.
        cost: of the policy, without its evaluation.
    """

    name: str
    artifact: Artifact
    report: Mapping[str, Any]
    gains: pa.Table
    cost: Cost

    def gain_P(self, score: str) -> np.ndarray:
        """Return policy minus reference of each prompt's mean score."""
        gain_P: np.ndarray = column(self.gains, f"{score}.policy") - column(self.gains, f"{score}.reference")
        return gain_P


def compare(evaluations: Sequence[Artifact], out: Path) -> Path:
    """Write ``compare.html``, ``compare.json`` and two pictures per constraint into ``out``; return the page's path.

    Args:
        evaluations: artifacts of the stage ``evaluate``, at least two; one given twice counts once.
        out: a directory; made when it does not exist.

    Raises:
        DataError: fewer than two evaluations, or they differ in reference, held-out prompts, sampling or scorers; the
            message names the differences.
    """
    from can_dist.reporting.comparison_page import pictures, render_comparison
    from can_dist.reporting.figures.style import standalone_svg

    distinct = list({artifact.digest: artifact for artifact in evaluations}.values())
    if len(distinct) < 2:
        paths = ", ".join(str(artifact.path) for artifact in distinct) or "none"
        raise DataError(f"{len(distinct)} evaluation(s) to compare ({paths}): expected two at least. Run more methods.")
    check_same_basis(distinct)
    methods = [
        Evaluated(name, evaluation, evaluation.read_json(REPORT), evaluation.table, cost_of(evaluation))
        for name, evaluation in zip(names_of(distinct), distinct, strict=True)
    ]
    record = comparison(methods)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)
    drawn = pictures(results(methods), record)
    for constraint, svgs in drawn.items():
        for name, svg in svgs.items():
            write_text(out / picture_name(name, constraint, len(drawn)), standalone_svg(svg))
    write_text(out / PAGE, render_comparison(record, results(methods), drawn))
    return out / PAGE


def picture_name(picture: str, constraint: str, num_constraints: int) -> str:
    """Return the file name of one picture of a constraint."""
    name = FILES[picture]
    return name if num_constraints == 1 else name.replace(".", f"-{constraint}.")


def find_evaluations(paths: Sequence[Path]) -> list[Artifact]:
    """Return the evaluations at each path: itself, or all of a run directory, ordered by method and variant.

    Raises:
        DataError: there is no evaluation at a path.
    """
    evaluations: list[Artifact] = []
    for path in paths:
        inside = [path] if (path / MANIFEST).is_file() else [p.parent for p in path.glob(f"evaluate-*/{MANIFEST}")]
        here = [load_artifact(directory) for directory in inside]
        bad = [artifact for artifact in here if artifact.stage != "evaluate" or "basis" not in artifact.info]
        if bad or not here:
            problem = f"{bad[0].path.name} is no evaluation that can be compared" if bad else "no evaluation"
            raise DataError(
                f"{path}: {problem}. Give run directories, or evaluate-... directories in them; "
                "'can-dist evaluate CONFIG --run DIR' makes one."
            )
        evaluations += sorted(here, key=_place)
    return evaluations


def _place(evaluation: Artifact) -> tuple[int, str, str]:
    return list(METHODS).index(evaluation.info["method"]), evaluation.info["variant"], evaluation.path.name


def check_same_basis(evaluations: Sequence[Artifact]) -> None:
    """Check that all evaluations were measured alike.

    Raises:
        DataError: naming the differences between two evaluations in reference, held-out prompts, sampling or scorers.
    """
    first = evaluations[0]
    expected = flatten(first.info["basis"])
    for other in evaluations[1:]:
        actual = flatten(other.info["basis"])
        differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
        if differing:
            lines = [f"  {key}: {expected.get(key, 'absent')} | {actual.get(key, 'absent')}" for key in differing[:8]]
            raise DataError(
                f"{first.path} and {other.path} were not measured with the same "
                f"{', '.join(dict.fromkeys(key.split('.')[0].replace('_', ' ') for key in differing))}, so their gains "
                "cannot be compared.\n" + "\n".join(lines) + "\nEvaluate both with one configuration."
            )


def names_of(evaluations: Sequence[Artifact]) -> list[str]:
    """Return each evaluation's method; where several share it, with the configuration keys that tell them apart."""
    reports = [evaluation.read_json(REPORT) for evaluation in evaluations]
    titles = [report["name"] for report in reports]
    names = []
    for title, report, artifact in zip(titles, reports, evaluations, strict=True):
        same = [flatten(other["config"]) for other in reports if other["name"] == title]
        mine = flatten(report["config"])
        differing = sorted(key for key in mine if any(other.get(key) != mine[key] for other in same))
        shown = ", ".join(f"{key.rsplit('.', 1)[-1]} {mine[key]}" for key in differing[:2])
        names.append(f"{title}, {shown}" if shown else title if len(same) == 1 else f"{title}, {artifact.path.name}")
    taken = Counter(names)
    return [
        f"{name}, {evaluation.path.name}" if taken[name] > 1 else name
        for name, evaluation in zip(names, evaluations, strict=True)
    ]


def results(methods: Sequence[Evaluated]) -> dict[str, list[MethodResult]]:
    """Return the gains of every method by constraint."""
    reward = methods[0].report["reward"]["name"]
    by_constraint: dict[str, list[MethodResult]] = {}
    for method in methods:
        for row in method.report["constraints"]:
            by_constraint.setdefault(row["name"], []).append(
                method_result(
                    method.name,
                    method.gain_P(reward),
                    method.gain_P(row["name"]),
                    column(method.gains, "kl"),
                    margin=row["margin"],
                    verdict=current(row["verdict"]),
                    cost=method.cost,
                )
            )
    return by_constraint


def comparison(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Return every number of the comparison, JSON-safe."""
    reward = methods[0].report["reward"]["name"]
    names = [reward, *(row["name"] for row in methods[0].report["constraints"])]
    scores = {
        score: {"reference": column(methods[0].gains, f"{score}.reference")}
        | {method.name: column(method.gains, f"{score}.policy") for method in methods}
        for score in names
    }
    return {
        "format_version": 1,
        "num_prompts": methods[0].gains.num_rows,
        "reward": reward,
        "methods": [_method_record(method, names) for method in methods],
        "frontier": _frontiers(methods),
        "ray": _rays(methods),
        "profiles": _profiles(methods),
        "ranking": {score: _ranking_record(rank_methods(values)) for score, values in scores.items()},
        "one_shot": _one_shot(methods),
    }


def _method_record(method: Evaluated, names: Sequence[str]) -> dict[str, Any]:
    report = method.report
    return {
        "name": method.name,
        "method": report["method"],
        "variant": report["variant"],
        "evaluation": str(method.artifact.path),
        "beta": report["beta"],
        "gains": {score: asdict(mean_interval(method.gain_P(score))) for score in names},
        "constraints": {
            row["name"]: {"margin": row["margin"], "threshold": row["threshold"], "verdict": current(row["verdict"])}
            for row in report["constraints"]
        },
        "kl": report["kl"]["realised"],
        "estimate": _estimate_record(report),
        "tails": report["tails"],
        "refusals": report["refusals"],
        "lengths": report["lengths"],
        "cost": asdict(method.cost),
    }


def _estimate_record(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a policy's strength and its estimate in a line; None where it was not estimated."""
    estimate = report.get("estimate")
    if not estimate:
        return None
    return {"strength": estimate["strength"]["alpha"] if estimate["strength"] else 1.0, "line": estimate["line"]}


def _ranking_record(ranking: Ranking) -> dict[str, Any]:
    return {
        "names": list(ranking.names),
        "win": [[None if np.isnan(share) else share for share in row] for row in ranking.win_MM.tolist()],
        "strength": ranking.strength_M.tolist(),
        "low": ranking.low_M.tolist(),
        "high": ranking.high_M.tolist(),
    }


def _frontiers(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Return by constraint gains and KL that the first method with a prediction expects at every λ."""
    for method in methods:
        if method.report["prediction"] and (curves := method.report["examination"]["frontier"]):
            return {
                name: {
                    "method": method.name,
                    "safety": curve["margin"],
                    "reward": curve["reward_improvement"],
                    "kl": curve["kl"],
                }
                for name, curve in curves.items()
                if curve is not None
            }
    return {}


def _rays(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Return by constraint gains and KL of every strength of the first method that was estimated."""
    for method in methods:
        if estimate := method.report.get("estimate"):
            ray = estimate["ray"]
            return {
                name: {"method": method.name, "safety": gains, "reward": ray["reward_improvement"], "kl": ray["kl"]}
                for name, gains in ray["improvement"].items()
            }
    return {}


def _profiles(methods: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return for each public set what the reference and every policy that was asked it did, in rates of its totals."""
    by_set: dict[str, list[Evaluated]] = {}
    for method in methods:
        if method.report.get("profile"):
            by_set.setdefault(method.artifact.input("profile").digest, []).append(method)
    return [_profile_record(measured) for measured in by_set.values()]


def _profile_record(methods: Sequence[Evaluated]) -> dict[str, Any]:
    first = methods[0].report
    totals = [row for row in first["profile"]["rows"] if row["is_total"]]
    sides = [("reference", methods[0], "reference"), *((method.name, method, "policy") for method in methods)]
    return {
        "set": first["profile"]["set"],
        "groups": {row["name"]: row["num_prompts"] for row in totals},
        "borders": {name: first["tails"][name]["border"] for name in totals[0]["unsafe"]} if totals else {},
        "rows": {name: _totals(method.report["profile"], side) for name, method, side in sides},
    }


def _totals(profile: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the rates of one side for each of a set's totals."""
    return {
        row["name"]: {
            "refused": row["refused"][side],
            "unsafe": {name: rates[side] for name, rates in row["unsafe"].items()},
        }
        for row in profile["rows"]
        if row["is_total"]
    }


def _one_shot(methods: Sequence[Evaluated]) -> dict[str, Any] | None:
    """Compare a loop's training with its one-shot method's, to the first constraint's margin; None without both."""
    by_method = {evaluated.report["method"]: evaluated for evaluated in methods}
    both = [(by_method.get(name), by_method.get(row.one_shot)) for name, row in METHODS.items() if row.one_shot]
    loop, once = next(((loop, once) for loop, once in both if loop and once), (None, None))
    if loop is None or once is None or not (recorded := trajectories(loop.artifact)):
        return None
    rounds = recorded[-1].read_json(TRAJECTORY)["rounds"]
    row = loop.report["constraints"][0]
    tokens = [
        load_artifact(loop.artifact.path.parent / entry["policy"]).info["summary"]["num_tokens"] for entry in rounds
    ]
    gains = [entry["constraints"][row["name"]]["improvement"] for entry in rounds]
    ratio: OneShotRatio = one_shot_ratio(once.cost.trained_tokens, tokens, gains, row["margin"])
    return {"one_shot": once.name, "loop": loop.name, "constraint": row["name"], **asdict(ratio)}
