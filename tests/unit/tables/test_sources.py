"""Files, directories and hub ids as sources: every kind is read whole or refused with its name, row and cure."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from can_dist.errors import DataError, EnvironmentProblem
from can_dist.tables.foreign.formats import PROMPTS_READ, read_preferences, read_prompts

USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}
OTHER = {"role": "assistant", "content": "Go away."}
PKU = {
    "prompt": "Hi?",
    "response_0": "Hello.",
    "response_1": "Go away.",
    "better_response_id": 1,
    "safer_response_id": 0,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}


def write(path: Path, rows: Iterable[Any]) -> str:
    """Write rows in the format the name says; in JSON lines a row given as a string is written as it is."""
    rows = list(rows)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    if path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return str(path)


def stream(path: Path, rows: list[Any]) -> list[int]:
    """Write an Arrow stream of one-row batches; return the position after each."""
    table, ends = pa.Table.from_pylist(rows), []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
            ends.append(file.tell())
    return ends


def texts(read: Any) -> list[str]:
    return [messages[-1]["content"] for messages in read.table.column("messages").to_pylist()]


def refusal(source: str | Path, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(source, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.arrow", "a.feather"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": text, "id": i} for i, text in enumerate(["one", "zwei — ü", "2024-01-01", "x\u2028y", "one"])]
    read = read_prompts(write(tmp_path / name, rows))
    assert read.table.schema == PROMPTS_READ
    assert texts(read) == ["one", "zwei — ü", "2024-01-01", "x\u2028y"]
    assert read.counts == {"rows": 5, "prompts": 4, "repeated": 1, "same_messages": 0, "set_aside": 0}
    assert read.format == "prompt"
    assert read.announcement == (
        f"{name}: TRL prompt-only (found prompt): 5 rows, 4 distinct prompts, 1 repeated rows merged; "
        "ignored columns: id"
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is written beside the source


def test_conversations_survive_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}]
    names = ("a.jsonl", "a.parquet", "a.arrow")
    tables = [read_preferences(write(tmp_path / name, rows)).table for name in names]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_json_lines_may_have_blank_lines_a_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}')
    assert texts(read_prompts(tmp_path / "a.jsonl")) == ["a", "b"]


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert texts(read_prompts(tmp_path / "a.json")) == ["a", "b"]


def test_a_text_column_of_dates_stays_text(tmp_path: Path) -> None:
    assert texts(read_prompts(write(tmp_path / "a.jsonl", [{"prompt": "2024-01-01"}]))) == ["2024-01-01"]


def test_a_rewritten_file_is_read_again_even_with_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert texts(read_prompts(write(path, [{"prompt": "aaa"}]))) == ["aaa"]
    stat = path.stat()
    write(path, [{"prompt": "bbb"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert texts(read_prompts(path)) == ["bbb"]


def test_many_rows_keep_their_order_and_row_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(3000)]
    for name in ("a.jsonl", "a.parquet"):
        assert texts(read_prompts(write(tmp_path / name, rows))) == [row["prompt"] for row in rows]
    message = refusal(write(tmp_path / "b.parquet", [*rows, {"prompt": None}]))
    assert "b.parquet, row 3000, field 'prompt': found None" in message


# ---------------------------------------------------------------------------------------------------- directories


def test_directory_of_shards_in_name_order(tmp_path: Path) -> None:
    for i in (1, 0):
        write(tmp_path / f"part-{i}.jsonl", [{"prompt": f"p{i}"}, {"prompt": "both"}])
    (tmp_path / "README.md").write_text("no data")
    read = read_prompts(tmp_path)
    assert texts(read) == ["p0", "both", "p1"]
    assert read.announcement.startswith(f"{tmp_path.name}: TRL prompt-only (found prompt): 4 rows")


def test_clone_of_a_hub_repository_takes_the_split_asked_for(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [{"prompt": split}])
    assert texts(read_prompts(tmp_path)) == ["train"]
    assert texts(read_prompts(tmp_path, split="dev")) == ["validation"]
    assert "no split 'test'; file names show ['train', 'validation']" in refusal(tmp_path, split="test")


def test_directories_that_could_mean_two_things_are_refused(tmp_path: Path) -> None:
    assert "holds no data file" in refusal(tmp_path)
    write(tmp_path / "train.jsonl", [{"prompt": "a"}])
    write(tmp_path / "more.jsonl", [{"prompt": "b"}])
    assert "some files carry a split in their name (['train.jsonl']), others none" in refusal(tmp_path)
    write(tmp_path / "train.parquet", [{"prompt": "a"}])
    assert "mixes kinds of files" in refusal(tmp_path)


def test_shards_of_different_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", [PKU])
    write(tmp_path / "1.jsonl", [{"prompt": "a"}])
    message = refusal(tmp_path)
    assert "1.jsonl: TRL prompt-only (columns prompt), but" in message
    assert "0.jsonl is PKU-SafeRLHF pairs" in message


def test_directories_written_by_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(read_prompts(tmp_path / "one")) == ["a", "b"]
    assert texts(read_prompts(tmp_path / "two", split="test")) == ["b"]
    assert "no split 'dev'; the directory holds ['test', 'train']" in refusal(tmp_path / "two", split="dev")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "lists files that do not exist" in refusal(tmp_path / "one")


# --------------------------------------------------------------------------------------- missing and damaged files


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/no/where", "a/b/c", "~/gone.parquet", "x.csv"])
def test_missing_path_is_named_and_not_looked_up_on_the_hub(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"{name}: no such file or directory (looked in ")
    assert "Correct the path." in message


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert "a.jsonl: the file is empty (0 bytes)" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n")
    assert "b.jsonl: the file is empty (no rows)" in refusal(tmp_path / "b.jsonl")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert "c.parquet: the file is empty (no rows)" in refusal(tmp_path / "c.parquet")


def test_unknown_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na\n")
    assert "a.csv: unknown kind of file. Expected one of .jsonl" in refusal(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "c"', "malformed JSON"),
        ("[1]", "found [1], expected one JSON object per line"),
        ("[" * 9999, "malformed"),
    ],
)
def test_malformed_json_line_is_named_by_its_number(tmp_path: Path, line: str, found: str) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"prompt": "a"}, "", line]))
    assert "a.jsonl, line 3: " in message
    assert found in message


def test_malformed_bytes_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert "a.jsonl, line 1: malformed JSON ('utf-8' codec" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"prompt": "a"}, 5]')
    assert "a.json, row 1: found 5, expected an object" in refusal(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"prompt": "a"}')
    assert "a.json: malformed JSON" in refusal(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.arrow"])
def test_f12_truncated_files_are_refused_at_every_length(tmp_path: Path, name: str) -> None:
    path = Path(write(tmp_path / name, [{"prompt": f"p{i}"} for i in range(5)]))
    data = path.read_bytes()
    for size in range(1, len(data), 7 if len(data) > 300 else 1):
        path.write_bytes(data[:size])
        assert "runcated" in refusal(path)


def test_f12_arrow_stream_is_read_whole_and_refused_without_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    ends = stream(path, [{"prompt": f"p{i}"} for i in range(3)])
    data = path.read_bytes()
    assert texts(read_prompts(path)) == ["p0", "p1", "p2"]
    for end in ends:  # between two messages: Arrow itself reads a shorter table without an error
        path.write_bytes(data[:end])
        assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == ends.index(end) + 1
        assert "truncated Arrow stream: its end-of-stream mark is missing" in refusal(path)
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        assert "truncated" in refusal(path)


def test_stream_whose_last_bytes_only_look_like_the_end_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    rows = [{"prompt": "p", "n": int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0", "little")}] * 2
    ends = stream(path, rows)
    path.write_bytes(path.read_bytes()[: ends[0]])
    assert path.read_bytes().rstrip(b"\0").endswith(b"\xff\xff\xff\xff")
    assert "end-of-stream mark is missing" in refusal(path)


def test_repeated_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    assert "columns ['prompt'] appear more than once" in refusal(tmp_path / "a.parquet")


# --------------------------------------------------------------------------------------------------- hub ids


def test_hub_ids_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: dict[str, Any] = {}

    def load(path: str, **kwargs: Any) -> Any:
        asked.update(kwargs, id=path)
        return datasets.Dataset.from_list([PKU, PKU])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = read_preferences("some/pairs", split="test", subset="alpaca-7b", revision="abc")
    assert asked == {"id": "some/pairs", "name": "alpaca-7b", "split": "test", "revision": "abc"}
    assert read.counts["pairs"] == 2
    assert read.announcement.startswith("some/pairs: PKU-SafeRLHF pairs (found prompt, response_0")


def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    failures = {
        "neither a path here": datasets.exceptions.DatasetNotFoundError("no"),
        "Set split, subset or revision": ValueError("Unknown split"),
    }
    for text, failure in failures.items():
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, failure=failure, **__: (_ for _ in ()).throw(failure))
        assert text in refusal("some/pairs")
    offline = ConnectionError("no route")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(offline))
    with pytest.raises(EnvironmentProblem, match=r"no such path here .* and the hub cannot be reached \(no route\)"):
        read_prompts("some/pairs")
