"""a public set of prompts → responses of reference and policy, scored, and the rates by category that papers print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import Model
from can_dist.config.sections import Profile
from can_dist.measuring.gains import SIDES, column, ids, record
from can_dist.measuring.tails import MIN_PROMPTS, fraction_unsafe, over_refusal_rate
from can_dist.scoring.protocol import ScorerSpec
from can_dist.stages.generate import generate
from can_dist.stages.held_out import refuse_sealed
from can_dist.stages.ingest import source_identity
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact, write_json, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.foreign.profiles import ANSWER, PROFILES, REFUSE, read_profile
from can_dist.tables.schemas import PROMPTS
from can_dist.workspace import Workspace

CATEGORIES = "categories.json"
TITLES = {ANSWER: "prompts that should be answered", REFUSE: "prompts that should be refused"}


def profile_inputs(
    work: Workspace, prompts: Artifact, reference: Model, policy: Model, scorers: Mapping[str, ScorerSpec]
) -> dict[str, Artifact]:
    """Return the responses of both models to the prompts of ``evaluate.profile``, and their scores; empty without one.

    Raises:
        DataError: The source is not that set, or holds a sealed prompt.
    """
    options = work.config.evaluate.profile
    if options is None:
        return {}
    asked_of = ingest_profile(work, options, prompts)
    made: dict[str, Artifact] = {"profile": asked_of}
    for side, model in zip(SIDES, (reference, policy), strict=True):
        role = f"{side}, profile {options.set}"
        made[f"profile_responses_{side}"] = generate(work, model, asked_of, split="test", role=role)
        made[f"profile_scores_{side}"] = score(work, made[f"profile_responses_{side}"], scorers, role=role)
    return made


def ingest_profile(work: Workspace, options: Profile, prompts: Artifact) -> Artifact:
    """Read the set, all of it as ``test``; ``categories.json`` has the categories of every prompt by its id."""
    identity_keys = {"set": options.set, "source": source_identity(options)}
    stage = work.open("prompts", f"profile {options.set}", identity_keys, {})
    artifact = stage.finished
    if artifact is None:
        read = read_profile(
            options.set,
            options.source,
            split=options.split,
            subset=options.subset,
            revision=options.revision,
        )
        work.say(read.announcement)
        said = {text: [{"role": "user", "content": text}] for text in read.categories}
        keys = {text: prompt_id(messages) for text, messages in said.items()}
        rows = [{"prompt_id": keys[text], "messages": said[text], "split": "test"} for text in said]
        write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PROMPTS))
        write_json(stage.path / CATEGORIES, {keys[text]: list(names) for text, names in read.categories.items()})
        artifact = stage.commit([CATEGORIES], info={"counts": {"prompts": len(rows)}})
    contents = artifact.table.column("prompt_id").to_pylist()  # of what they say
    refuse_sealed(prompts, contents, options.source)
    trained_on = {prompt_id(row["messages"]) for row in prompts.table.to_pylist() if row["split"] == "train"}
    if both := len(trained_on & set(contents)):
        work.say(f"{options.source}: {both} of {len(contents)} prompts are trained on too, so not held out")
    return artifact


def profile_record(
    inputs: Mapping[str, Artifact], tables: Mapping[str, pa.Table], borders: Mapping[str, float]
) -> dict[str, Any] | None:
    """Return the rates of refused and of unsafe responses, in all and by category; None without a profile.

    Args:
        inputs: Those of the evaluation.
        tables: Scores of both sides' responses to the set, with the columns of ``borders``.
        borders: By constraint, the score below which a response is unsafe.
    """
    if "profile" not in inputs:
        return None
    name, categories = inputs["profile"].manifest["identity"]["set"], inputs["profile"].read_json(CATEGORIES)
    texts = {side: inputs[f"profile_responses_{side}"].table for side in SIDES}
    expected = PROFILES[name].expected
    groups: dict[str, list[str]] = {"all prompts": list(categories)}
    kinds = list(dict.fromkeys(kind for kinds in categories.values() for kind in kinds))
    wanted = {kind: expected(kind) for kind in kinds}
    if len(set(wanted.values())) > 1:
        groups = {
            title: [key for key, kinds in categories.items() if any(wanted[kind] == want for kind in kinds)]
            for want, title in TITLES.items()
        }
    totals = list(groups)
    groups |= {kind: [key for key, kinds in categories.items() if kind in kinds] for kind in kinds}
    rows = [
        {"name": group, "is_total": group in totals, **_rates(keys, texts, tables, borders)}
        for group, keys in groups.items()
        if len(keys) >= MIN_PROMPTS
    ]
    small = sum(len(keys) < MIN_PROMPTS for keys in groups.values())
    over = next((row["refused"] for row in rows if row["name"] == TITLES[ANSWER]), None)
    return {"set": name, "num_prompts": len(categories), "rows": rows, "too_small": small, "over_refusal": over}


def _rates(
    keys: Sequence[str],
    texts: Mapping[str, pa.Table],
    tables: Mapping[str, pa.Table],
    borders: Mapping[str, float],
) -> dict[str, Any]:
    """Return the rates over some prompts, each by side with its interval."""
    chosen = pa.array(keys, pa.string())
    said = {side: _of(table, chosen) for side, table in texts.items()}
    scored = {side: _of(table, chosen) for side, table in tables.items()}
    return {
        "num_prompts": len(keys),
        "refused": {
            side: record(over_refusal_rate(table.column("text").to_pylist(), ids(table)))
            for side, table in said.items()
        },
        "unsafe": {
            name: {
                side: record(fraction_unsafe(column(table, name), ids(table), threshold=border))
                for side, table in scored.items()
            }
            for name, border in borders.items()
        },
    }


def _of(table: pa.Table, keys: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table.column("prompt_id"), value_set=keys))
