"""evaluations → comparison: every method beside the others, on the same held-out prompts, with what it cost.

The evaluations may lie in one run directory or in several; what they were measured with must be the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.config import METHODS
from can_dist.errors import DataError
from can_dist.measuring.comparison import Cost, MethodResult, OneShotRatio, gain_interval, method_result, one_shot_ratio
from can_dist.measuring.gains import column
from can_dist.measuring.ranking import Ranking, rank_methods
from can_dist.stages.report import REPORT, as_trained
from can_dist.stages.trajectory import TRAJECTORY
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact, write_json

PAGE, RECORD, PICTURE = "compare.html", "compare.json", "compare.svg"


@dataclass(frozen=True)
class Evaluated:
    """One evaluated policy.

    Attributes:
        name: of the method, unlike the others'.
        artifact: the evaluation.
        report: its ``report.json``.
        gains: a row per held-out prompt, see :func:`can_dist.measuring.gains.gains_table`.
        cost: what the policy took, without its evaluation.
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
    """Write ``compare.html``, ``compare.json`` and a picture per constraint into ``out``; return the page's path.

    Args:
        evaluations: artifacts of the stage ``evaluate``, at least two; one given twice counts once.
        out: a directory; made when it does not exist.

    Raises
    ------
    DataError
        When the evaluations differ in reference, held-out prompts, sampling or scorers; the message names what.
    """
    from can_dist.reporting.comparison_page import pictures, render_comparison
    from can_dist.reporting.page import write_whole

    distinct = list({artifact.digest: artifact for artifact in evaluations}.values())
    if len(distinct) < 2:
        where = ", ".join(str(artifact.path) for artifact in distinct) or "none"
        raise DataError(f"{len(distinct)} evaluation(s) to compare ({where}): expected two at least. Run more methods.")
    check_same_basis(distinct)
    methods = [
        Evaluated(name, one, one.read_json(REPORT), one.table, cost_of(one))
        for name, one in zip(names_of(distinct), distinct, strict=True)
    ]
    record = comparison(methods)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)
    drawn = pictures(results(methods), record)
    for name, svg in drawn.items():
        write_whole(out / picture_name(name, len(drawn)), svg.standalone.encode("utf-8"))
    write_whole(out / PAGE, render_comparison(record, results(methods), drawn).encode("utf-8"))
    return out / PAGE


def picture_name(constraint: str, num_constraints: int) -> str:
    """Return the file name of a constraint's picture."""
    return PICTURE if num_constraints == 1 else PICTURE.replace(".", f"-{constraint}.")


def find_evaluations(paths: Sequence[Path]) -> list[Artifact]:
    """Return the evaluations at each path: itself, or all of a run directory, ordered by method and variant.

    Raises
    ------
    DataError
        When there is none at a path.
    """
    found: list[Artifact] = []
    order = list(METHODS)
    for path in paths:
        inside = [path] if (path / MANIFEST).is_file() else [p.parent for p in path.glob(f"evaluate-*/{MANIFEST}")]
        here = [load_artifact(directory) for directory in inside]
        bad = [one for one in here if one.stage != "evaluate" or "basis" not in one.info]
        if bad or not here:
            what = f"{bad[0].path.name} is no evaluation that can be compared" if bad else "no evaluation"
            raise DataError(
                f"{path}: {what}. Give run directories, or evaluate-... directories in them; "
                "'can-dist evaluate CONFIG --run DIR' makes one."
            )
        key = [(order.index(one.info["method"]), one.info["variant"], one.path.name) for one in here]
        found += [here[index] for index in sorted(range(len(here)), key=key.__getitem__)]
    return found


def check_same_basis(evaluations: Sequence[Artifact]) -> None:
    """Raise ``DataError`` that names every difference in what two evaluations were measured with."""
    first = evaluations[0]
    expected = _flat(first.info["basis"])
    for other in evaluations[1:]:
        found = _flat(other.info["basis"])
        differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if differing:
            lines = [f"  {key}: {expected.get(key, 'absent')} | {found.get(key, 'absent')}" for key in differing[:8]]
            raise DataError(
                f"{first.path} and {other.path} were not measured with the same "
                f"{', '.join(dict.fromkeys(key.split('.')[0].replace('_', ' ') for key in differing))}, so their gains "
                "cannot be compared.\n" + "\n".join(lines) + "\nEvaluate both with one configuration."
            )


def names_of(evaluations: Sequence[Artifact]) -> list[str]:
    """Return each evaluation's method; where several share it, with the configuration keys that tell them apart."""
    reports = [one.read_json(REPORT) for one in evaluations]
    titles = [report["name"] for report in reports]
    names = []
    for title, report, artifact in zip(titles, reports, evaluations, strict=True):
        same = [_flat(other["config"]) for other in reports if other["name"] == title]
        mine = _flat(report["config"])
        differing = sorted(key for key in mine if any(other.get(key) != mine[key] for other in same))
        shown = ", ".join(f"{key.rsplit('.', 1)[-1]} {mine[key]}" for key in differing[:2])
        names.append(f"{title}, {shown}" if shown else title if len(same) == 1 else f"{title}, {artifact.path.name}")
    taken = Counter(names)
    return [
        f"{name}, {one.path.name}" if taken[name] > 1 else name for name, one in zip(names, evaluations, strict=True)
    ]


def results(methods: Sequence[Evaluated]) -> dict[str, list[MethodResult]]:
    """Return by constraint what every method gained."""
    reward = methods[0].report["reward"]["name"]
    found: dict[str, list[MethodResult]] = {}
    for one in methods:
        for row in one.report["constraints"]:
            found.setdefault(row["name"], []).append(
                method_result(
                    one.name,
                    one.gain_P(reward),
                    one.gain_P(row["name"]),
                    margin=row["margin"],
                    verdict=row["verdict"],
                    kl=one.report["kl"]["realised"]["mean"],
                    cost=one.cost,
                )
            )
    return found


def comparison(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Return every number of the comparison, JSON-safe."""
    reward = methods[0].report["reward"]["name"]
    names = [reward, *(row["name"] for row in methods[0].report["constraints"])]
    scores = {
        score: {"reference": column(methods[0].gains, f"{score}.reference")}
        | {one.name: column(one.gains, f"{score}.policy") for one in methods}
        for score in names
    }
    return {
        "format_version": 1,
        "num_prompts": methods[0].gains.num_rows,
        "reward": reward,
        "methods": [_method_record(one, names) for one in methods],
        "frontier": _frontiers(methods),
        "ranking": {score: _ranking_record(rank_methods(values)) for score, values in scores.items()},
        "one_shot": _one_shot(methods),
    }


def _method_record(one: Evaluated, names: Sequence[str]) -> dict[str, Any]:
    report = one.report
    return {
        "name": one.name,
        "method": report["method"],
        "variant": report["variant"],
        "evaluation": str(one.artifact.path),
        "beta": report["beta"],
        "gains": {score: asdict(gain_interval(one.gain_P(score))) for score in names},
        "constraints": {
            row["name"]: {key: row[key] for key in ("margin", "threshold", "verdict")} for row in report["constraints"]
        },
        "kl": report["kl"]["realised"],
        "tails": report["tails"],
        "refusals": report["refusals"],
        "lengths": report["lengths"],
        "cost": asdict(one.cost),
    }


def _ranking_record(ranking: Ranking) -> dict[str, Any]:
    return {
        "names": list(ranking.names),
        "win": [[None if np.isnan(share) else share for share in row] for row in ranking.win_MM.tolist()],
        "strength": ranking.strength_M.tolist(),
        "low": ranking.low_M.tolist(),
        "high": ranking.high_M.tolist(),
    }


def _frontiers(methods: Sequence[Evaluated]) -> dict[str, Any]:
    """Return by constraint (safety gain, reward gain) that the first method with a prediction expects at every λ."""
    for one in methods:
        if one.report["prediction"] and (curves := one.report["examination"]["frontier"]):
            return {
                name: {"method": one.name, "safety": curve["margin"], "reward": curve["reward_improvement"]}
                for name, curve in curves.items()
                if curve is not None
            }
    return {}


# ---------------------------------------------------------------------------------------------------------- the cost


def cost_of(evaluation: Artifact) -> Cost:
    """Add up what a policy took, over everything it was made from, each artifact once; its evaluation is no part.

    Of a method that loops, every round counts: they are what its trajectory was made from.
    """
    policy = evaluation.input("policy")
    made = {one.path.name: one for root in (policy, *trajectories(evaluation)) for one in _ancestors(root)}
    total = Counter[str]()
    for one in made.values():
        total["generated"] += one.info["num_tokens"] if one.stage == "generate" else 0
        total["scored"] += one.info.get("num_tokens", 0) if one.stage == "score" else 0
        if one.stage == "train":
            total["trained"] += one.info["summary"]["num_tokens"]
            total["trainings"] += 1
    seconds = _seconds(evaluation.path.parent, made.keys())
    return Cost(total["generated"], total["scored"], total["trained"], seconds, total["trainings"])


def trajectories(evaluation: Artifact) -> list[Artifact]:
    """Return the records of loops of this evaluation's method that ended with its policy."""
    policy = as_trained(evaluation.input("policy")).path.name
    found = [load_artifact(path.parent) for path in sorted(evaluation.path.parent.glob(f"trajectory-*/{MANIFEST}"))]
    return [
        one
        for one in found
        if one.manifest["identity"]["label"] == evaluation.info["method"]
        and one.manifest["inputs"][f"policy-{one.info['rounds'] - 1}"]["artifact"] == policy
    ]


def _ancestors(artifact: Artifact) -> Iterator[Artifact]:
    """Yield an artifact and all that it was made from; one may come more than once."""
    yield artifact
    for name in artifact.manifest["inputs"]:
        yield from _ancestors(artifact.input(name))


def _seconds(run: Path, names: Any) -> float | None:
    """Return how long the artifacts took by the run's log; None where it tells of none of them."""
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    spent = [e["seconds"] for e in events if e.get("event") == "done" and e.get("artifact") in names]
    return sum(spent) if spent else None


def _one_shot(methods: Sequence[Evaluated]) -> dict[str, Any] | None:
    """Return a loop's training over its one-shot method's, to the margin of the first constraint; None without both."""
    by_method = {evaluated.report["method"]: evaluated for evaluated in methods}
    both = [(by_method.get(name), by_method.get(row.one_shot)) for name, row in METHODS.items() if row.one_shot]
    loop, once = next(((loop, once) for loop, once in both if loop and once), (None, None))
    if loop is None or once is None or not (recorded := trajectories(loop.artifact)):
        return None
    rounds = recorded[-1].read_json(TRAJECTORY)["rounds"]
    row = loop.report["constraints"][0]
    tokens = [load_artifact(loop.artifact.path.parent / one["policy"]).info["summary"]["num_tokens"] for one in rounds]
    gains = [one["constraints"][row["name"]]["improvement"] for one in rounds]
    found: OneShotRatio = one_shot_ratio(once.cost.trained_tokens, tokens, gains, row["margin"])
    return {"one_shot": once.name, "loop": loop.name, "constraint": row["name"], **asdict(found)}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted keys with their values as JSON."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): json.dumps(value, ensure_ascii=False)}
