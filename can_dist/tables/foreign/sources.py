"""Rows of other people's files: JSON, JSON lines, Parquet and Arrow on disk, data sets on the Hugging Face hub.

A source becomes shards. A shard knows its name, its columns, and how to yield its rows as dictionaries, in file order,
so that an error can name the file and the row. Nothing is written beside the source; local files leave no cache.

Only hub ids go through ``datasets``. Measured with datasets 5.2.0, its builders for local files (a) read an Arrow
stream cut off at a message boundary as a shorter table, without an error; (b) turn a text column of dates into
timestamps; (c) serve the old rows of a file rewritten with the same modification time; (d) do not say which file a
bad row is in.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.tables.foreign.json_type import row_decoder
from can_dist.tables.json_rows import JSON_ENDINGS, Row, json_rows
from can_dist.tables.misfits import UNREADABLE, named, sound
from can_dist.tables.remote import local_path

_KINDS = {
    **dict.fromkeys(JSON_ENDINGS, "json"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
_HUB_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\..+")  # how the hub names shards: <split>-00000-of-00002.parquet
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|dev|eval)(?=[^a-z]|$)")
_SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
_BATCH_ROWS = 1024
_PEEK_ROWS = 64  # a JSON file has no schema: its columns are those of its first rows
_EOS = (b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x00")  # Arrow's end-of-stream mark, and the one before 0.15


@dataclass(frozen=True)
class Shard:
    """One file, or one hub data set: its name in messages, its columns, and ``rows(columns)`` yielding dictionaries."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Row]]


def open_shards(source: str | Path, *, split: str, subset: str | None, revision: str | None) -> Iterator[Shard]:
    """Open ``source`` shard by shard.

    Args:
        source: a file, a directory of shards (or one written by ``save_to_disk``), the URL of either, or a hub id.
        split: of the hub data set or the directory.
        subset: configuration of the hub data set.
        revision: commit, tag or branch of the hub data set.

    Raises:
        DataError: the source does not exist, is empty, damaged or of an unknown kind.
        ConfigError: split, subset or revision is given for a source that has none.
        EnvironmentProblem: the hub cannot be reached.
    """
    text, path = str(source), local_path(str(source))
    if path.exists():
        if subset is not None or revision is not None:
            raise ConfigError(f"{text} is local: 'subset' and 'revision' select on the hub only.", "Leave them out.")
        if path.is_file() and split != "train":
            raise ConfigError(f"{text} is one file and has no split {split!r}.", "Name the file of that split.")
        return (_open_file(file) for file in _local_files(path, split))
    if isinstance(source, Path) or _looks_local(text):
        raise DataError(
            f"{text}: no such file or directory (looked in {Path.cwd()}).\n",
            f"Expected a file ({', '.join(_KINDS)}), a directory of such files, or a hub id such as "
            "PKU-Alignment/PKU-SafeRLHF. Correct the path.",
        )
    return iter([_open_hub(text, split, subset, revision)])


def _looks_local(text: str) -> bool:
    """Whether ``text`` can only be meant as a path: a URL, a data file's ending, or not the shape of a hub id."""
    return _kind(Path(text)) is not None or Path(text).suffix == ".csv" or not _HUB_ID.fullmatch(text)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), None)


# ---------------------------------------------------------------------------------------------------- directories


def _local_files(path: Path, split: str) -> list[Path]:
    """The data files of a path in name order: the file itself, or the shards of ``split`` in a directory."""
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        splits = sorted(child.parent.name for child in path.glob("*/state.json"))
        if split not in splits:
            raise DataError(f"{path}: no split {split!r}; the directory holds {splits}.", "Set split to one of them.")
        path = path / split
    if (path / "state.json").is_file():  # datasets.Dataset.save_to_disk: its state lists its files
        return _saved_files(path)
    for folder in (path, path / "data"):  # a clone of a hub repository keeps its shards in data/
        files = sorted(f for f in folder.glob("*") if _is_data(f))
        if files:
            break
    else:
        raise DataError(
            f"{path}: the directory holds no data file.\n",
            f"Found {sorted(f.name for f in path.iterdir())[:8]}; expected files ending in {', '.join(_KINDS)}.",
        )
    kinds = Counter(_kind(f) for f in files)
    if len(kinds) > 1:
        raise DataError(
            f"{path}: the directory mixes kinds of files ({dict(kinds)}), perhaps the same rows twice.\n",
            "Name one file, or keep one kind in the directory.",
        )
    return _of_split(path, files, split)


def _is_data(path: Path) -> bool:
    return path.is_file() and _kind(path) is not None and path.name not in _NOT_ROWS and path.name[0] not in "._"


def _saved_files(path: Path) -> list[Path]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path / 'state.json'}: not a state written by save_to_disk ({error!r}).",
            "Save again.",
        ) from error
    missing = [str(f) for f in files if not f.is_file()]
    if missing:
        raise DataError(
            f"{path / 'state.json'} lists files that do not exist: {missing[:5]}.",
            "Save or copy it again.",
        )
    return files


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    """Those files whose name carries ``split``; all of them where no name carries any split."""
    whole = {file: match[1] for file in files if (match := _HUB_SHARD.fullmatch(file.name))}
    if split in whole.values():
        return [file for file in files if whole.get(file) == split]
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        match = _SPLIT.search(file.name.lower())
        name = None if match is None else _SPLIT_ALIASES.get(match[1], match[1])
        by_split.setdefault(name, []).append(file)
    wanted = _SPLIT_ALIASES.get(split, split)
    if set(by_split) == {None} and wanted == "train":
        return files
    if None in by_split and len(by_split) > 1:
        named = [f.name for f in files if f not in by_split[None]]
        raise DataError(
            f"{path}: some files carry a split in their name ({named[:3]}), others none "
            f"({[f.name for f in by_split[None]][:3]}).\n",
            "Name one file, or move the others away.",
        )
    if wanted not in by_split:
        names = sorted(name for name in by_split if name is not None)
        raise DataError(f"{path}: no split {split!r}; file names show {names or 'no split'}.", "Set split accordingly.")
    several = sorted({whole[file] for file in by_split[wanted] if file in whole})
    if len(several) > 1:  # such as train_prefs and train_sft, whose rows are not of one kind
        raise DataError(f"{path}: split {split!r} may be any of {', '.join(several)}.", "Set split to one of them.")
    return by_split[wanted]


# ---------------------------------------------------------------------------------------------------------- files


def _open_file(path: Path) -> Shard:
    """One local file as a shard; its schema, or its first rows, are read here."""
    kind = _kind(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown kind of file. Expected one of {', '.join(_KINDS)}.",
            "Convert it to JSON lines.",
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).", "Check its permissions.") from error
    if not head:
        raise DataError(
            f"{path}: the file is empty (0 bytes).",
            "Expected at least one row; write or download it again.",
        )
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the data.", "Run `git lfs pull` in its repository.")
    shard = {"json": _open_json, "parquet": _open_parquet, "arrow": _open_arrow}[kind](path)
    twice = [name for name, count in Counter(shard.columns).items() if count > 1]
    if twice:
        raise DataError(f"{path}: columns {twice} appear more than once.", "Rename or drop one of each.")
    return shard


def _open_json(path: Path) -> Shard:
    rows = json_rows(path)
    first = list(itertools.islice(rows, _PEEK_ROWS))
    if not first:
        raise DataError(f"{path}: the file is empty (no rows).", "Expected one JSON object per line.")
    columns = tuple(dict.fromkeys(name for row in first for name in row))
    return Shard(str(path), columns, lambda _: itertools.chain(first, rows))


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path}: truncated or damaged {kind} ({error}).", "Write or download the file again.")


def _open_parquet(path: Path) -> Shard:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = named(file.schema_arrow)
    except UNREADABLE as error:
        raise _damaged(path, "Parquet file", error) from error

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        return cast("Iterator[Any]", file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)))

    return Shard(str(path), tuple(schema.names), lambda columns: _batch_rows(path, schema, batches(columns)))


def _open_arrow(path: Path) -> Shard:
    """An Arrow IPC file, or a stream (what ``datasets`` writes) if it ends with its end-of-stream mark."""
    try:
        buffer = pa.memory_map(str(path)).read_buffer()
        if buffer[:6].to_pybytes() == b"ARROW1":
            reader = pa.ipc.open_file(buffer)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            _check_stream_end(path, buffer)
            reader = pa.ipc.open_stream(buffer)
            batches = iter(reader)
        schema = named(reader.schema)
    except UNREADABLE as error:
        raise _damaged(path, "Arrow file", error) from error
    return Shard(
        str(path),
        tuple(schema.names),
        lambda columns: _batch_rows(path, schema, (b.select(list(columns)) for b in batches)),
    )


def _check_stream_end(path: Path, buffer: Any) -> None:
    """Refuse a stream without its end mark: Arrow reads one cut off between two messages as a shorter table."""
    stream = pa.BufferReader(buffer)
    messages = pa.ipc.MessageReader.open_stream(stream)
    end = 0
    try:
        while True:
            end = stream.tell()
            messages.read_next_message()
    except StopIteration:
        pass
    if buffer[end:].to_pybytes() not in _EOS:
        raise DataError(
            f"{path}: truncated Arrow stream: its end-of-stream mark is missing, so rows may be missing too.\n",
            "Write or download the file again; a writer must be closed.",
        )


def _batch_rows(path: Path, schema: pa.Schema, batches: Iterator[Any]) -> Iterator[Row]:
    decoded, number = row_decoder(schema, path), 0
    try:
        for batch in batches:
            for row in sound(batch).to_pylist():
                yield decoded(row, number)
                number += 1
    except UNREADABLE as error:
        raise _damaged(path, "data", error) from error


# ------------------------------------------------------------------------------------------------------------ hub


def _open_hub(name: str, split: str, subset: str | None, revision: str | None) -> Shard:
    """A hub data set through ``datasets``, which keeps it in its own cache."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    place = f"{name} (hub, split {split!r}" + (f", revision {revision}" if revision else "") + ")"
    try:
        table = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{name}: neither a path here ({Path.cwd()}) nor a data set on the hub that can be read.\n  {error}\n",
            "Correct the path, the id or the revision; for a gated data set run `hf auth login`.",
        ) from error
    except ConnectionError as error:
        raise EnvironmentProblem(
            f"{name}: no such path here ({Path.cwd()}), and the hub cannot be reached ({error}).\n",
            "Correct the path, or get the network back, or name a local copy.",
        ) from error
    except (DatasetsError, ValueError, OSError) as error:  # unknown split or subset, a loading script, bad files
        raise DataError(f"{place}: datasets cannot load it: {error}\n", "Set split, subset or revision.") from error
    return Shard(place, tuple(table.column_names), lambda columns: iter(table.select_columns(list(columns))))
