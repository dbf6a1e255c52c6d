"""Readers of other people's prompts and preferences, whose format is found by their columns (``known_formats``).

The format found is announced, never guessed past: columns that fit none are refused with the list of those known. A
row that breaks its format's contract stops the reading with its file, row and field. A row that keeps the contract but
holds no pair of single responses to one prompt (in HH-RLHF, dialogues that part before the last turn) is set aside and
listed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from can_dist.errors import ConfigError
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.foreign.rated import RatedPrompts
from can_dist.tables.foreign.rows import ANSWERED, Answered, Pair, Rated, SetAside
from can_dist.tables.foreign.scan import Ids, Scan
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
    """Prompts as read.

    Attributes:
        table: schema ``PROMPTS_READ``, one row per conversation.
        format: key of the format found.
        announcement: one line that tells how the source was read.
        counts: ``rows`` read, ``prompts`` in the table, ``repeated`` rows merged into an earlier prompt,
            ``same_messages`` (further ids of the file for messages already seen, merged too), ``set_aside``.
        reasons: how many rows were set aside for what.
        set_aside: one line per row set aside, with file, row and reason.
        carried: how many rows hold what earlier versions dropped or kept twice, by kind; empty for most data.
    """

    table: pa.Table
    format: str
    announcement: str
    counts: dict[str, int]
    reasons: dict[str, int]
    set_aside: tuple[str, ...] = ()
    carried: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferencesRead:
    """Pairs as read.

    Attributes:
        table: schema ``PREFERENCES_READ``, one row per pair.
        format: key of the format found.
        announcement: one line that tells how the source was read.
        counts: ``rows`` read, ``used`` of them, ``pairs`` in the table, ``prompts`` (distinct messages),
            ``equal_responses``, ``empty_responses`` (pairs with at least one), ``disagreements`` (better and safer
            differ), ``conflicts`` (rows whose response called safer is unsafe, the other safe), ``set_aside``.
        reasons: how many rows were set aside for what.
        set_aside: one line per row set aside, with file, row and reason.
        names_criteria: whether the data set says by what a response is better, not only which was chosen.
        carried: as in ``PromptsRead``.
    """

    table: pa.Table
    format: str
    announcement: str
    counts: dict[str, int]
    reasons: dict[str, int]
    set_aside: tuple[str, ...]
    names_criteria: bool
    carried: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ResponsesRead:
    """Brought responses as read.

    Attributes:
        texts: the responses by the id of their prompt's content (``prompt_id(messages)``), in file order.
        num_rows: rows read.
        announcement: one line that tells how the source was read.
    """

    texts: dict[str, list[str]]
    num_rows: int
    announcement: str


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
        ``table: prompt_id, messages``, one row per conversation. Ids are those of the file's ``prompt_id`` column where
        it has one (of several ids of a conversation the first), else ``prompt_id()``.

    Raises:
        DataError: no such source, unknown columns, a damaged file, a bad row, duplicate ids in a prompt-only file, or
            an id used for different messages.
        ConfigError: an argument that cannot mean anything.
        EnvironmentProblem: the hub cannot be reached.
    """
    _check_limit(limit)
    scan, ids = Scan(source), Ids()
    messages_of: dict[str, list[dict[str, str]]] = {}
    for place, form, row, parsed in scan.rows(split, subset, revision):
        if isinstance(parsed, SetAside):
            continue
        content = prompt_id(parsed.messages)
        key = ids.add(row, content, place, given=scan.has_ids, unique=not form.pairs)
        messages_of.setdefault(key, parsed.messages)
        if len(messages_of) == limit:
            break
    ids.check()
    counts = {
        "rows": scan.num_rows,
        "prompts": len(messages_of),
        "repeated": scan.num_rows - len(scan.set_aside) - len(messages_of),
        "same_messages": len(ids.other_ids),
        "set_aside": len(scan.set_aside),
    }
    scan.check_any(len(messages_of))
    table = pa.table([list(messages_of), list(messages_of.values())], schema=PROMPTS_READ)
    text = f"{counts['rows']} rows, {len(messages_of)} distinct prompts" + _notes(
        (counts["repeated"], "repeated rows merged"),
        (counts["same_messages"], "of them under another prompt_id"),
        (counts["set_aside"], f"rows set aside ({scan.reasons()})"),
    )
    return PromptsRead(
        table, scan.key, scan.announce(text), counts, dict(scan.why), tuple(scan.set_aside), _carried(scan, ids)
    )


def _carried(scan: Scan, ids: Ids) -> dict[str, int]:
    other_ids = {"further ids of a conversation": len(ids.other_ids)} if ids.other_ids else {}
    return {**scan.joined, **other_ids}


def read_responses(
    source: str | Path, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> ResponsesRead:
    """Read responses that somebody brings: ``prompt`` (text or messages) and ``responses`` (a list of texts).

    Several rows of one prompt add up. A system column is part of the prompt, as in ``read_prompts``.

    Args:
        source: as in ``read_prompts``.
        split: as in ``read_prompts``.
        subset: as in ``read_prompts``.
        revision: as in ``read_prompts``.

    Raises:
        DataError: as ``read_prompts``.
        ConfigError: an argument that cannot mean anything.
        EnvironmentProblem: the hub cannot be reached.
    """
    scan = Scan(source, ANSWERED)
    texts: dict[str, list[str]] = {}
    for _, _, _, parsed in scan.rows(split, subset, revision):
        assert isinstance(parsed, Answered)
        texts.setdefault(prompt_id(parsed.messages), []).extend(parsed.texts)
    scan.check_any(scan.num_rows)
    num_responses = sum(map(len, texts.values()))
    text = f"{scan.num_rows} rows, {num_responses} responses to {len(texts)} prompts"
    return ResponsesRead(texts, scan.num_rows, scan.announce(text))


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
    scan, ids, rated = Scan(source), Ids(), RatedPrompts()
    pairs: list[tuple[str, Pair]] = []
    for place, _, row, parsed in scan.rows(split, subset, revision, pairs_only=True):
        if not isinstance(parsed, Pair | Rated):
            continue
        key = ids.add(row, prompt_id(parsed.messages), place, given=scan.has_ids, unique=False)
        if isinstance(parsed, Rated):
            rated.add(key, parsed, place)
            continue
        pairs.append((key, parsed))
        if len(pairs) == limit:
            break
    ids.check()
    for place, reason in rated.unused():
        scan.put_aside(place, reason)
    pairs += itertools.islice(rated.pairs(), limit)
    scan.check_any(len(pairs))
    return _preferences(scan, pairs, _carried(scan, ids))


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


def _preferences(scan: Scan, pairs: Sequence[tuple[str, Pair]], carried: dict[str, int]) -> PreferencesRead:
    names = ("equal_responses", "empty_responses", "disagreements", "conflicts")
    totals: Counter[str] = Counter()
    for _, pair in pairs:
        totals.update(_properties(pair))
    num_prompts = len({prompt_id(pair.messages) for _, pair in pairs})
    counts = {
        "rows": scan.num_rows,
        "used": scan.num_rows - len(scan.set_aside),
        "pairs": len(pairs),
        "prompts": num_prompts,
        **{name: int(totals[name]) for name in names},
        "set_aside": len(scan.set_aside),
    }
    text = f"{counts['rows']} rows, {len(pairs)} pairs, {num_prompts} distinct prompts" + _notes(
        (counts["equal_responses"], "pairs of equal responses"),
        (counts["empty_responses"], "pairs with an empty response"),
        (counts["disagreements"], "pairs where better and safer differ"),
        (counts["conflicts"], "safer_response_id contradicting is_response_i_safe"),
        (counts["set_aside"], f"rows set aside ({scan.reasons()})"),
    )
    remark = ""
    if scan.form.better_first:
        remark = "; chosen comes first by construction, so shuffle before comparing positions"
    rows = [(key, p.messages, p.a, p.b, p.better, p.safer, p.safe_a, p.safe_b) for key, p in pairs]
    return PreferencesRead(
        pa.table([list(column) for column in zip(*rows, strict=True)], schema=PREFERENCES_READ),
        scan.key,
        scan.announce(text, remark),
        counts,
        dict(scan.why),
        tuple(scan.set_aside),
        scan.form.names_criteria,
        carried,
    )


def _notes(*notes: tuple[int, str]) -> str:
    return "".join(f", {count} {kind}" for count, kind in notes if count)
