"""Readers of other people's prompts and preferences, whose format is found by their columns (``known_formats``).

The format found is announced, never guessed past: columns that fit none are refused with the list of those known. A
row that breaks its format's contract stops the reading with its file, row and field. A row that keeps the contract but
holds no pair of single responses to one prompt (in HH-RLHF, dialogues that part before the last turn) is set aside and
listed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from can_dist.errors import ConfigError, DataError
from can_dist.tables.foreign.known_formats import find_format
from can_dist.tables.foreign.rated import RatedPrompts
from can_dist.tables.foreign.rows import Format, Pair, Parsed, Rated, SetAside
from can_dist.tables.foreign.sources import Row, Shard, open_shards
from can_dist.tables.schemas import MESSAGES

PROMPTS_READ = pa.schema([("prompt_id", pa.string()), ("messages", MESSAGES)])

PREFERENCES_READ = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("response_a", pa.string()),
        ("response_b", pa.string()),
        ("better", pa.int8()),  # the more helpful response: 0 = a, 1 = b, -1 = no label
        ("safer", pa.int8()),  # the safer response, likewise
        ("safe_a", pa.bool_()),  # null = no label
        ("safe_b", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class PromptsRead:
    """Prompts as read: ``table`` (schema ``PROMPTS_READ``, one row per id) and what was found.

    ``counts``: ``rows`` read, ``prompts`` in the table, ``repeated`` rows merged into an earlier prompt,
    ``same_messages`` (further ids of the file for messages already seen), ``set_aside``.
    ``reasons``: how many rows were set aside for what. ``set_aside``: one line per row set aside, with file, row and
    reason.
    """

    table: pa.Table
    format: str
    announcement: str
    counts: dict[str, int]
    reasons: dict[str, int]
    set_aside: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreferencesRead:
    """Pairs as read: ``table`` (schema ``PREFERENCES_READ``) and what was found.

    ``counts``: ``rows`` read, ``used`` of them, ``pairs`` in the table, ``prompts`` (distinct messages),
    ``equal_responses``, ``empty_responses`` (pairs with at least one), ``disagreements`` (better and safer differ),
    ``conflicts`` (rows whose response called safer is unsafe, the other safe), ``set_aside``.
    ``reasons``: how many rows were set aside for what. ``set_aside``: one line per row set aside, with file, row and
    reason. ``names_criteria``: whether the data set says by what a response is better, not only which was chosen.
    """

    table: pa.Table
    format: str
    announcement: str
    counts: dict[str, int]
    reasons: dict[str, int]
    set_aside: tuple[str, ...]
    names_criteria: bool


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the id of a prompt: first 16 hex digits of the SHA-256 of ``[[role, content], ...]`` as compact JSON."""
    pairs = [[message["role"], message["content"]] for message in messages]
    text = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> PromptsRead:
    """Read the distinct prompts of a data set, in order of first appearance; of preference data, the prompt part.

    Args:
        source: local file (.jsonl, .json, their .gz, .parquet, .arrow, .feather), directory of shards, or hub id.
        split: of a hub data set, or of a directory whose file names carry splits.
        subset: configuration of a hub data set, such as ``"alpaca-7b"``.
        revision: commit, tag or branch of a hub data set.
        limit: stop after this many prompts.

    Returns:
        ``table: prompt_id, messages``. Ids are the file's ``prompt_id`` column where it has one, else ``prompt_id()``.

    Raises:
        DataError: no such source, unknown columns, a damaged file, a bad row, duplicate ids in a prompt-only file, or
            an id used for different messages.
        ConfigError: an argument that cannot mean anything.
        EnvironmentProblem: the hub cannot be reached.
    """
    _check_limit(limit)
    scan = _Scan(source)
    messages_of: dict[str, list[dict[str, str]]] = {}
    ids = _Ids()
    for where, form, row, parsed in scan.rows(split, subset, revision, pairs_only=False):
        if isinstance(parsed, SetAside):
            continue
        own = prompt_id(parsed.messages)
        key = ids.add(row, own, where, given=scan.has_ids, unique=not form.pairs)
        if key not in messages_of:
            messages_of[key] = parsed.messages
        if len(messages_of) == limit:
            break
    ids.check()
    counts = {
        "rows": scan.num_rows,
        "prompts": len(messages_of),
        "repeated": scan.num_rows - len(scan.set_aside) - len(messages_of),
        "same_messages": len(messages_of) - len(ids.contents),
        "set_aside": len(scan.set_aside),
    }
    scan.check_any(len(messages_of))
    table = pa.table([list(messages_of), list(messages_of.values())], schema=PROMPTS_READ)
    text = f"{counts['rows']} rows, {len(ids.contents)} distinct prompts" + _notes(
        (counts["repeated"], "repeated rows merged"),
        (counts["same_messages"], "prompts repeat under another prompt_id"),
        (counts["set_aside"], f"rows set aside ({scan.reasons()})"),
    )
    return PromptsRead(table, scan.key, scan.announce(text), counts, dict(scan.why), tuple(scan.set_aside))


def read_preferences(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> PreferencesRead:
    """Read pairs of responses with people's labels of them.

    Files of chosen and rejected responses have one unnamed criterion: chosen is response a, better and safer alike. Of
    responses rated one by one the best and the worst of a prompt are a pair, and so on inwards (``tables/rated.py``).

    Args:
        source: as in ``read_prompts``.
        split: as in ``read_prompts``.
        subset: as in ``read_prompts``.
        revision: as in ``read_prompts``.
        limit: stop after this many pairs.

    Returns:
        ``table`` in the schema ``PREFERENCES_READ``, one row per pair, file order.

    Raises:
        DataError: as ``read_prompts``.
        ConfigError: an argument that cannot mean anything.
        EnvironmentProblem: the hub cannot be reached.
    """
    _check_limit(limit)
    scan = _Scan(source)
    ids, rated = _Ids(), RatedPrompts()
    pairs: list[tuple[str, Pair]] = []
    for where, _, row, parsed in scan.rows(split, subset, revision, pairs_only=True):
        if not isinstance(parsed, Pair | Rated):
            continue
        key = ids.add(row, prompt_id(parsed.messages), where, given=scan.has_ids, unique=False)
        if isinstance(parsed, Rated):
            rated.add(key, parsed, where)
            continue
        pairs.append((key, parsed))
        if len(pairs) == limit:
            break
    ids.check()
    for where, reason in rated.unused():
        scan.put_aside(where, reason)
    pairs += itertools.islice(rated.pairs(), limit)
    scan.check_any(len(pairs))
    return _preferences(scan, pairs)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1, or none to read everything.")


def _properties(pair: Pair) -> dict[str, int]:
    return {
        "equal_responses": pair.a == pair.b,
        "empty_responses": not pair.a.strip() or not pair.b.strip(),
        "disagreements": pair.better != pair.safer and min(pair.better, pair.safer) >= 0,
        "conflicts": pair.conflict,
    }


def _preferences(scan: _Scan, pairs: Sequence[tuple[str, Pair]]) -> PreferencesRead:
    names = ("equal_responses", "empty_responses", "disagreements", "conflicts")
    found: Counter[str] = Counter()
    for _, pair in pairs:
        found.update(_properties(pair))
    num_prompts = len({prompt_id(pair.messages) for _, pair in pairs})
    counts = {
        "rows": scan.num_rows,
        "used": scan.num_rows - len(scan.set_aside),
        "pairs": len(pairs),
        "prompts": num_prompts,
        **{name: int(found[name]) for name in names},
        "set_aside": len(scan.set_aside),
    }
    text = f"{counts['rows']} rows, {len(pairs)} pairs, {num_prompts} distinct prompts" + _notes(
        (counts["equal_responses"], "pairs of equal responses"),
        (counts["empty_responses"], "pairs with an empty response"),
        (counts["disagreements"], "pairs where better and safer differ"),
        (counts["conflicts"], "safer_response_id contradicting is_response_i_safe"),
        (counts["set_aside"], f"rows set aside ({scan.reasons()})"),
    )
    if scan.form.better_first:
        text += "; chosen comes first by construction, so shuffle before comparing positions"
    rows = [(key, p.messages, p.a, p.b, p.better, p.safer, p.safe_a, p.safe_b) for key, p in pairs]
    return PreferencesRead(
        pa.table([list(column) for column in zip(*rows, strict=True)], schema=PREFERENCES_READ),
        scan.key,
        scan.announce(text),
        counts,
        dict(scan.why),
        tuple(scan.set_aside),
        scan.form.names_criteria,
    )


def _notes(*notes: tuple[int, str]) -> str:
    return "".join(f", {count} {what}" for count, what in notes if count)


# ----------------------------------------------------------------------------------------------------- ids and rows


@dataclass
class _Ids:
    """The ids seen, each with the content it stands for; duplicates are gathered so that one error names several."""

    first: dict[str, tuple[str, str]] = field(default_factory=dict)  # id → (content id, where)
    contents: set[str] = field(default_factory=set)
    clashes: list[str] = field(default_factory=list)

    def add(self, row: Row, content: str, where: str, *, given: bool, unique: bool) -> str:
        """Return the row's id: its ``prompt_id`` if the file has that column, else that of its content."""
        key = _given_id(row.get("prompt_id"), where) if given else content
        known, first_where = self.first.setdefault(key, (content, where))
        self.contents.add(content)
        if given and first_where != where and (unique or known != content):
            self.clashes.append(f"{key!r} at {first_where} and {where}")
        return key

    def check(self) -> None:
        if self.clashes:
            raise DataError(
                f"prompt_id must stand for one prompt, {len(self.clashes)} row(s) repeat an id: "
                f"{'; '.join(self.clashes[:5])}.\n"
                "  Remove the duplicates, or drop the column prompt_id to have ids computed."
            )


def _given_id(value: object, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise DataError(
        f"{where}, field 'prompt_id': found {value!r}, expected a non-empty string or an integer.\n"
        "  Fill it in, or drop the column to have ids computed."
    )


class _Scan:
    """One pass over a source: parsed rows in order, and what there is to announce."""

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.key = ""
        self.columns: tuple[str, ...] = ()
        self.has_ids = False
        self.num_rows = 0
        self.set_aside: list[str] = []
        self._form: Format | None = None
        self._first = ""
        self.why: Counter[str] = Counter()

    def rows(
        self, split: str, subset: str | None, revision: str | None, *, pairs_only: bool
    ) -> Iterator[tuple[str, Format, Row, Parsed]]:
        """Yield where, format, row and parsed row; rows set aside are also recorded here."""
        for shard in open_shards(self.source, split=split, subset=subset, revision=revision):
            form = self._format(shard, pairs_only)
            self.has_ids = "prompt_id" in shard.columns
            needed = [name for name in (*form.reads, "prompt_id") if name in shard.columns]
            for number, row in enumerate(shard.rows(needed)):
                where = f"{shard.name}, row {number}"
                parsed = form.parse(row, where)
                self._check_kind(form.kind(row), where)
                self.num_rows += 1
                if isinstance(parsed, SetAside):
                    self.put_aside(where, parsed.reason)
                yield where, form, row, parsed

    def _format(self, shard: Shard, pairs_only: bool) -> Format:
        form = find_format(shard.columns, shard.name, pairs_only=pairs_only)
        if self._form is None:
            self._form, self._first, self.columns = form, shard.name, shard.columns
        elif form is not self._form:
            raise DataError(
                f"{shard.name}: {form.title} (columns {', '.join(shard.columns)}), "
                f"but {self._first} is {self._form.title}.\n"
                "  Expected one format in all shards. Read them one by one."
            )
        return form

    def _check_kind(self, key: str, where: str) -> None:
        self.key = self.key or key
        if key != self.key:
            raise DataError(
                f"{where}: a row in format {key!r}, but the rows before are in format {self.key!r} "
                "(text and message lists mixed).\n  Expected one format in all rows. Split the file in two."
            )

    def put_aside(self, where: str, reason: str) -> None:
        self.set_aside.append(f"{where}: {reason}")
        self.why[reason] += 1

    def reasons(self) -> str:
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
            f"{self.source}: the file is empty (no rows). Expected at least one row; write or download it again."
        )

    @property
    def form(self) -> Format:
        """The format found, after the first row."""
        assert self._form is not None
        return self._form

    def announce(self, text: str) -> str:
        found = [name for name in (*self.form.reads, "prompt_id") if name in self.columns]
        ignored = [name for name in self.columns if name not in found]
        tail = f"; ignored columns: {', '.join(ignored)}" if ignored else ""
        name = Path(self.source).name if Path(self.source).expanduser().exists() else self.source
        return f"{name}: {self.form.title_of(self.key)} (found {', '.join(found)}): {text}{tail}"
