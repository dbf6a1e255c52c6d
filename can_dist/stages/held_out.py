"""Which prompts are held out, by what they say: data that training reads is compared with them, whatever its ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact
from can_dist.tables.foreign.formats import PreferencesRead
from can_dist.tables.foreign.messages import prompt_id
from can_dist.workspace import Workspace

SETTINGS = ("system", "developer")
SEALED = ("sealed",)
HELD_OUT = ("test", "validation", *SEALED)


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run: those of the test, of the validation, and the sealed ones.

    Attributes:
        ids: their ids.
        sealed: ids of the sealed ones.
        contents: ids of what they say (``prompt_id(messages)``).
        turns: the same without their system turns.
    """

    ids: frozenset[str]
    sealed: frozenset[str]
    contents: frozenset[str]
    turns: frozenset[str]

    @classmethod
    def of(cls, prompts: Artifact) -> HeldOut:
        """Return the held-out prompts of a ``prompts`` table."""
        rows = [row for row in prompts.table.to_pylist() if row["split"] in HELD_OUT]
        messages = [row["messages"] for row in rows]
        contents, turns = map(prompt_id, messages), map(_turns, messages)
        ids, sealed = ({row["prompt_id"] for row in rows if row["split"] in kinds} for kinds in (HELD_OUT, SEALED))
        return cls(frozenset(ids), frozenset(sealed), frozenset(contents), frozenset(turns))

    def says(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Return whether a held-out prompt says the same."""
        return prompt_id(messages) in self.contents

    def leaves_out(self, row: Mapping[str, Any]) -> bool:
        """Return whether training must not read a row: a held-out prompt says the same, or a sealed one has its id."""
        return self.says(row["messages"]) or row["prompt_id"] in self.sealed

    def marked(self, read: PreferencesRead) -> PreferencesRead:
        """Return a data set with a note of how many of its pairs an id would have put on the other side."""
        rows = read.table.select(["prompt_id", "messages"]).to_pylist()
        moved = sum((row["prompt_id"] in self.ids) != self.leaves_out(row) for row in rows)
        return replace(read, carried={**read.carried, "pairs known by content": moved}) if moved else read

    def tell_alike(self, work: Workspace, source: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say how many rows differ from a held-out prompt in the system turn alone: those are other prompts."""
        alike = sum(_turns(row["messages"]) in self.turns for row in rows)
        if alike:
            work.say(
                f"{source}: {alike} pair(s) have the turns of a held-out prompt with another system turn, or with none "
                "where that has one; these are other prompts, and are kept"
            )


def refuse_sealed(prompts: Artifact, contents: Sequence[str], source: str) -> None:
    """Raise ``DataError`` where texts that a stage would read are those of sealed prompts of a run.

    Args:
        prompts: the run's prompts.
        contents: ids of what the texts say (``prompt_id(messages)``).
        source: the file, for the message.
    """
    rows = [row for row in prompts.table.to_pylist() if row["split"] in SEALED]
    if both := {prompt_id(row["messages"]): row["prompt_id"] for row in rows}.keys() & set(contents):
        raise DataError(
            f"{source}: {len(both)} of its prompts are sealed (prompts.num_sealed), which nothing but 'can-dist "
            "certify' may read.",
            "Remove them from this file.",
        )


def _turns(messages: Sequence[Mapping[str, str]]) -> str:
    return prompt_id([message for message in messages if message["role"] not in SETTINGS])
