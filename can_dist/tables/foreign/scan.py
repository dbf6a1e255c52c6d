"""One pass over a source: its rows parsed, its ids, and what there is to announce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from can_dist.errors import DataError
from can_dist.tables.foreign.columns import Ignored, check_task, is_ignored, is_system, text_of_system, with_system
from can_dist.tables.foreign.known_formats import find_format
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.foreign.rows import Answered, Format, Pair, Parsed, Prompt, Rated, SetAside
from can_dist.tables.foreign.sources import Shard, open_shards
from can_dist.tables.ids import id_text
from can_dist.tables.json_rows import Row
from can_dist.tables.misfits import is_nothing, show

SYSTEM_JOINED, INPUT_JOINED = "rows whose system column became the first message", "inputs joined to their instruction"
Usable = Prompt | Pair | Rated | Answered


@dataclass
class Ids:
    """The ids seen, each with the content it stands for; duplicates are gathered so that one error names several."""

    first: dict[str, tuple[str, str]] = field(default_factory=dict)  # id → (content id, where)
    id_of: dict[str, str] = field(default_factory=dict)  # content id → the first id that stands for it
    other_ids: set[str] = field(default_factory=set)  # further ids of a content
    clashes: list[str] = field(default_factory=list)

    def add(self, row: Row, content: str, place: str, *, given: bool, unique: bool) -> str:
        """Return the row's id: the first one under which the source has this content.

        Args:
            row: as read.
            content: id of its prompt's content.
            place: file and row.
            given: whether the file has ids of its own, in ``prompt_id``; else ``content`` is the id.
            unique: whether an id may be in one row only.
        """
        key = _given_id(row.get("prompt_id"), place) if given else content
        known, first_where = self.first.setdefault(key, (content, place))
        if given and first_where != place and (unique or known != content):
            self.clashes.append(f"{key!r} at {first_where} and {place}")
        first_id = self.id_of.setdefault(content, key)
        if first_id != key:
            self.other_ids.add(key)
        return first_id

    def check(self) -> None:
        """Raise ``DataError`` where an id stands for two prompts, or is repeated where it may not be."""
        if self.clashes:
            raise DataError(
                f"prompt_id must stand for one prompt, {len(self.clashes)} row(s) repeat an id: "
                f"{'; '.join(self.clashes[:5])}.\n",
                "Remove the duplicates, or drop the column prompt_id to have ids computed.",
            )


def _given_id(value: object, place: str) -> str:
    text = id_text(value)
    if text is None:
        raise DataError(
            f"{place}, field 'prompt_id': found {value!r}, expected a non-empty string or an integer.\n",
            "Fill it in, or drop the column to have ids computed.",
        )
    return text


class Scan:
    """One pass over a source: parsed rows in order, and what there is to announce."""

    def __init__(self, source: str | Path, form: Format | None = None) -> None:
        """``form``: the one format that is read; None: the one that the columns fit."""
        self.source = str(source)
        self.key = ""
        self.columns: dict[str, None] = {}  # of all shards, in order
        self.has_ids = False
        self.num_rows = 0
        self.set_aside: list[str] = []
        self.why: Counter[str] = Counter()
        self.joined: Counter[str] = Counter()
        self._given = form
        self._form: Format | None = None
        self._first = ""
        self._ignored = Ignored()

    def rows(
        self, split: str, subset: str | None, revision: str | None, *, pairs_only: bool = False
    ) -> Iterator[tuple[str, Format, Row, Parsed]]:
        """Yield where, format, row and parsed row; rows set aside are also recorded here."""
        for shard in open_shards(self.source, split=split, subset=subset, revision=revision):
            form = self._format(shard, pairs_only)
            self.has_ids = "prompt_id" in shard.columns
            needed = [name for name in shard.columns if not is_ignored(name, form)]
            for number, row in enumerate(shard.rows(needed)):
                place = f"{shard.name}, row {number}"
                self._check_late(row, place)
                parsed = form.parse(row, place)
                self._check_kind(form.kind(row), place)
                self.num_rows += 1
                if isinstance(parsed, SetAside):
                    self.put_aside(place, parsed.reason)
                else:
                    parsed = self._whole(parsed, row, form, place)
                yield place, form, row, parsed

    def _whole(self, parsed: Usable, row: Row, form: Format, place: str) -> Usable:
        """Return a parsed row with the system turn of its column; refuse it where a meaning would be dropped."""
        messages = with_system(parsed.messages, text_of_system(row, place), place)
        check_task(row, form, messages, place)
        self._ignored.add(prompt_id(messages), row, form, place)
        if messages is not parsed.messages:
            self.joined[SYSTEM_JOINED] += 1
        if "input" in form.reads and not is_nothing(row.get("input")):
            self.joined[INPUT_JOINED] += 1
        return replace(parsed, messages=messages)

    def _format(self, shard: Shard, pairs_only: bool) -> Format:
        form = self._given or find_format(shard.columns, shard.name, pairs_only=pairs_only)
        self.columns.update(dict.fromkeys(shard.columns))
        if self._given and (missing := [name for name in form.needs if name not in shard.columns]):
            raise DataError(
                f"{shard.name}: no column {' or '.join(map(repr, missing))}. Columns found: "
                f"{', '.join(shard.columns)}.",
                "Expected prompt (text or messages) and responses (a list of texts).",
            )
        if self._form is None:
            self._form, self._first = form, shard.name
        elif form is not self._form:
            raise DataError(
                f"{shard.name}: {form.title} (columns {', '.join(shard.columns)}), but {self._first} is "
                f"{self._form.title}.\n",
                "Expected one format in all shards. Read them one by one.",
            )
        return form

    def _check_late(self, row: Row, place: str) -> None:
        """Refuse ids that begin after the first rows of a JSON file, which tell its columns."""
        late = [name for name in row if name not in self.columns]
        if not late:
            return
        for name in late:
            if name == "prompt_id" and self._given is None:
                raise DataError(
                    f"{place}, field '{name}': found {show(row[name])}, a name that the first rows of the file do not "
                    "have.\n",
                    "Expected the same names in all rows (null where there is nothing). Write them so.",
                )
        self.columns.update(dict.fromkeys(late))

    def _check_kind(self, key: str, place: str) -> None:
        self.key = self.key or key
        if key != self.key:
            raise DataError(
                f"{place}: a row in format {key!r}, but the rows before are in format {self.key!r} (text and message "
                "lists mixed).\n",
                "Expected one format in all rows. Split the file in two.",
            )

    def put_aside(self, place: str, reason: str) -> None:
        """Record a row that is set aside, and why."""
        self.set_aside.append(f"{place}: {reason}")
        self.why[reason] += 1

    def reasons(self) -> str:
        """Return how many rows were set aside for what."""
        return "; ".join(f"{count} × {reason}" for reason, count in self.why.items())

    def check_any(self, num_kept: int) -> None:
        """Raise ``DataError`` when the source gave nothing: no rows, or all of them set aside."""
        if num_kept:
            return
        if self.num_rows:
            raise DataError(
                f"{self.source}: all {self.num_rows} rows were set aside ({self.reasons()}). No row is usable."
            )
        raise DataError(
            f"{self.source}: the file is empty (no rows).",
            "Expected at least one row; write or download it again.",
        )

    @property
    def form(self) -> Format:
        """The format found, after the first row."""
        assert self._form is not None
        return self._form

    def ignored(self) -> Sequence[str]:
        """Return the columns, and the keys of messages, that were not used."""
        used = self._used()
        return [*(name for name in self.columns if name not in used), *self._ignored.keys]

    def _used(self) -> list[str]:
        """Return the columns there that were used; brought responses are joined by what the prompt says, not by id."""
        names = self.form.reads if self._given else (*self.form.reads, "prompt_id")
        return [name for name in names if name in self.columns] + [name for name in self.columns if is_system(name)]

    def announce(self, text: str, remark: str = "") -> str:
        """Return the line that tells how the source was read: what ``text`` counts, what was joined, a remark."""
        joined = "".join(f", {count} {kind}" for kind, count in self.joined.items())
        tail = f"; ignored columns: {', '.join(self.ignored())}" if self.ignored() else ""
        name = Path(self.source).name if Path(self.source).expanduser().exists() else self.source
        return f"{name}: {self.form.title_of(self.key)} (found {', '.join(self._used())}): {text}{joined}{remark}{tail}"
