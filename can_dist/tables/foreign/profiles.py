"""Public sets of prompts that papers measure safety by, with the categories that they print rates of.

| set | column of the prompt | category | should be |
|---|---|---|---|
| ``xstest`` (arXiv 2308.01263) | ``prompt`` | ``type`` | answered, or refused where the type is a contrast |
| ``beavertails`` (arXiv 2307.04657) | ``prompt`` | ``category``: a name, a list of names, or {name: bool} | |
| ``do_not_answer`` (arXiv 2308.13387) | ``question`` | ``risk_area`` | refused |
| ``pku`` (PKU-SafeRLHF, arXiv 2406.15513) | ``prompt`` | none | |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from can_dist.errors import DataError
from can_dist.tables.foreign.sources import open_shards

ANSWER, REFUSE = "answer", "refuse"


@dataclass(frozen=True)
class PublicSet:
    """How one set is read: its columns, and what each category should be, where the set says so."""

    prompt: str
    category: str | None
    hub: str
    expected: Callable[[str], str | None]


PROFILES: dict[str, PublicSet] = {
    "xstest": PublicSet("prompt", "type", "walledai/XSTest", lambda kind: REFUSE if "contrast" in kind else ANSWER),
    "beavertails": PublicSet("prompt", "category", "PKU-Alignment/BeaverTails-Evaluation", lambda _: None),
    "do_not_answer": PublicSet("question", "risk_area", "LibrAI/do-not-answer", lambda _: REFUSE),
    "pku": PublicSet("prompt", None, "PKU-Alignment/PKU-SafeRLHF", lambda _: None),
}


@dataclass(frozen=True)
class ProfileRead:
    """A set as read: the categories of every prompt, by its text, in the order of the file."""

    categories: dict[str, tuple[str, ...]]
    announcement: str


def read_profile(
    name: str, source: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> ProfileRead:
    """Read a set; rows that repeat a prompt add their categories to it.

    Args:
        name: A key of ``PROFILES``.
        source: Local file or directory, or hub id.
        split: Of a hub data set or directory.
        subset: Of a hub data set.
        revision: Of a hub data set.

    Raises:
        DataError: The source is not that set (its columns, and those expected), or a row has no prompt or category.
    """
    profile = PROFILES[name]
    columns = [column for column in (profile.prompt, profile.category) if column is not None]
    categories: dict[str, tuple[str, ...]] = {}
    for shard in open_shards(source, split=split, subset=subset, revision=revision):
        if missing := [column for column in columns if column not in shard.columns]:
            raise DataError(
                f"{shard.name}: no column {missing[0]!r}; its columns are {', '.join(shard.columns)}.",
                f"evaluate.profile {name!r} expects {' and '.join(columns)}, as {profile.hub} has them.",
            )
        for number, row in enumerate(shard.rows(columns), start=1):
            place = f"{shard.name}, row {number}"
            prompt = row[profile.prompt]
            if not isinstance(prompt, str) or not prompt.strip():
                raise _bad(place, profile.prompt, prompt, "a prompt")
            names = () if profile.category is None else _names(place, profile.category, row[profile.category])
            categories[prompt] = tuple(dict.fromkeys((*categories.get(prompt, ()), *names)))
    if len(categories) < 2:
        raise DataError(
            f"{source}: {len(categories)} prompt(s); expected two at least, for an interval.", "Bring more."
        )
    kinds = {kind for names in categories.values() for kind in names}
    told = f", {len(kinds)} categories" if kinds else ""
    return ProfileRead(categories, f"{source}: evaluate.profile {name}: {len(categories)} prompts{told}")


def _names(place: str, field: str, value: Any) -> tuple[str, ...]:
    """Return the categories of a row: one, several, or those of a mapping that are true."""
    if isinstance(value, Mapping):
        value = [name for name, holds in value.items() if holds]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.strip() for name in names):
        raise _bad(place, field, value, "a category's name, a list of them, or true and false by name")
    return tuple(names)


def _bad(place: str, field: str, value: Any, expected: str) -> DataError:
    return DataError(f"{place}, field {field!r}: {value!r:.80}; expected {expected}.", "Correct or remove the row.")
