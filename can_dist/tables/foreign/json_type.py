"""Columns whose values are JSON texts by their type: ``datasets``' Json, and Arrow's ``arrow.json``.

``datasets`` 4.7 and later store what has no fixed type so, conversations with tool calls for one. The Arrow type
tells which columns they are, or the features that ``datasets`` writes into the schema's metadata (key ``huggingface``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from can_dist.errors import DataError
from can_dist.tables.json_rows import Row, unique_names
from can_dist.tables.misfits import show

Decode = Callable[[Any], Any]


def row_decoder(schema: pa.Schema, path: Path) -> Callable[[Row, int], Row]:
    """Return a function of a row and its number that gives the row with its JSON texts as values."""
    features = _features(schema)
    decoders: dict[str, Decode] = {}
    for field in schema:
        decode = _by_feature(features.get(field.name)) or _by_type(field.type)
        if decode is not None:
            decoders[field.name] = decode

    def decoded(row: Row, number: int) -> Row:
        for name, decode in decoders.items():
            if name in row:
                try:
                    row[name] = decode(row[name])
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}, row {number}, field '{name}': found {show(row[name])}, expected JSON texts, as the "
                        f"column's type says ({error}).\n",
                        "Write the file again.",
                    ) from error
        return row

    return decoded


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that ``datasets`` wrote into a schema; none where it wrote none."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(text).get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _by_feature(feature: object) -> Decode | None:
    if isinstance(feature, list):  # how older versions wrote lists
        return _each(_by_feature(feature[0])) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "Json":
        return _load
    if isinstance(feature.get("feature"), dict | list) and isinstance(feature.get("_type"), str):
        return _each(_by_feature(feature["feature"]))
    return _members({name: _by_feature(member) for name, member in feature.items()})


def _by_type(kind: pa.DataType) -> Decode | None:
    if isinstance(kind, pa.JsonType):
        return _load
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _each(_by_type(kind.value_type))
    if pa.types.is_struct(kind):
        return _members({field.name: _by_type(field.type) for field in kind})
    return None


def _load(value: Any) -> Any:
    return json.loads(value, object_pairs_hook=unique_names) if isinstance(value, str) else value


def _each(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda values: None if values is None else [decode(value) for value in values]


def _members(decoders: dict[str, Decode | None]) -> Decode | None:
    known = {name: decode for name, decode in decoders.items() if decode is not None}
    if not known:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {name: known[name](value[name]) for name in known if name in value}

    return decode
