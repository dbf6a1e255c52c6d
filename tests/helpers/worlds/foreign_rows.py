"""Files of other people's data, small or real: for readers of prompts and preferences, and for what they refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from can_dist.errors import DataError
from can_dist.tables.foreign.formats import read_preferences, read_prompts

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
HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go away."}


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(source: str | Path, *, pairs: bool = False, **kwargs: Any) -> str:
    read: Callable[..., Any] = read_prompts
    if pairs:
        read = read_preferences
    with pytest.raises(DataError) as caught:
        read(source, **kwargs)
    return str(caught.value)


def data(name: str) -> Path:
    root = Path(os.environ.get("CAN_DIST_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
    if not (root / name).is_file():
        pytest.skip(f"{root / name} is not here; set CAN_DIST_DATA to the folder that holds {name}")
    return root / name
