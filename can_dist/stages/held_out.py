"""Which prompts are held out, by what they say: data that training reads is compared with them, whatever its ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from can_dist.tables.artifacts import Artifact
from can_dist.tables.foreign.formats import PreferencesRead
from can_dist.tables.foreign.messages import prompt_id
from can_dist.workspace import Workspace

SETTINGS = ("system", "developer")


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run: those of the test and of the validation.

    Attributes:
        ids: their ids.
        contents: ids of what they say (``prompt_id(messages)``).
        turns: the same without their system turns.
    """

    ids: frozenset[str]
    contents: frozenset[str]
    turns: frozenset[str]

    @classmethod
    def of(cls, prompts: Artifact) -> HeldOut:
        """Return the held-out prompts of a ``prompts`` table."""
        rows = [row for row in prompts.table.to_pylist() if row["split"] != "train"]
        messages = [row["messages"] for row in rows]
        contents, turns = map(prompt_id, messages), map(_turns, messages)
        return cls(frozenset(row["prompt_id"] for row in rows), frozenset(contents), frozenset(turns))

    def says(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Return whether a held-out prompt says the same."""
        return prompt_id(messages) in self.contents

    def marked(self, read: PreferencesRead) -> PreferencesRead:
        """Return a data set with a note of how many of its pairs an id would have put on the other side."""
        rows = read.table.select(["prompt_id", "messages"]).to_pylist()
        moved = sum((row["prompt_id"] in self.ids) != self.says(row["messages"]) for row in rows)
        return replace(read, carried={**read.carried, "pairs known by content": moved}) if moved else read

    def tell_alike(self, work: Workspace, source: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say how many rows differ from a held-out prompt in the system turn alone: those are other prompts."""
        alike = sum(_turns(row["messages"]) in self.turns for row in rows)
        if alike:
            work.say(
                f"{source}: {alike} pair(s) have the turns of a held-out prompt with another system turn, or with none "
                "where that has one; these are other prompts, and are kept"
            )


def _turns(messages: Sequence[Mapping[str, str]]) -> str:
    return prompt_id([message for message in messages if message["role"] not in SETTINGS])
