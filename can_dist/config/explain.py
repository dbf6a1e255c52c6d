"""The problems of a configuration in words for people, one line each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from can_dist.config.describe import _kind_of, models_in


def explain(problems: Sequence[Any], raw: Any, root: type[BaseModel]) -> list[str]:
    """Turn pydantic's problems into one line per key: the given value, the expected one, the nearest valid key.

    Args:
        problems: ``ValidationError.errors()``.
        raw: the plain data that was validated.
        root: the model that refused it.
    """
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        location = _user_location(problem["loc"], raw, problem["type"])
        by_key.setdefault(".".join(location) or "(top level)", []).append((location, problem))
    lines = []
    for key, entries in by_key.items():
        if len(entries) > 1 and all(problem["type"] != "extra_forbidden" for _, problem in entries):
            # the alternatives of one key, none of which fits
            expected = " or ".join(dict.fromkeys(_message(problem) for _, problem in entries))
            lines.append(f"{key}: {expected}{_shown(entries[0][1])}")
        else:
            lines += [_line(key, location, problem, raw, root) for location, problem in entries]
    return lines


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ' Did you mean ...?' with the known name that is most like ``name``, or ''."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _line(key: str, location: Sequence[str], problem: Any, raw: Any, root: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        valid = sorted(_valid_keys(location[:-1], raw, root))
        return f"{key}: unknown key.{nearest(location[-1], valid)} Valid keys here: {', '.join(valid)}."
    if problem["type"] == "missing":
        return f"{key}: required, not given."
    if problem["type"] == "union_tag_invalid":
        return _unknown(f"{key}.kind", "kind of scorer", problem["ctx"]["tag"], problem["ctx"]["expected_tags"])
    if problem["type"] == "literal_error" and key == "method":
        return _unknown(key, "method", problem["input"], problem["ctx"]["expected"])
    return f"{key}: {_message(problem)}{_shown(problem)}"


def _unknown(key: str, noun: str, name: Any, expected: str) -> str:
    """Return the line on a name that is none of those in pydantic's list ``expected``, such as "'a', 'b' or 'c'"."""
    valid = re.findall(r"'([^']+)'", expected)
    return f"{key}: unknown {noun} {name!r}.{nearest(str(name), valid)} Valid: {', '.join(valid)}."


def _message(problem: Any) -> str:
    if problem["type"] in ("model_type", "dict_type", "union_tag_not_found"):
        return "expected a group of keys"
    if problem["type"] == "tuple_type":
        return "expected a list"
    message = str(problem["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return re.sub(r"^(Input should be|(Dictionary|Tuple) should have)", "expected", message)


def _shown(problem: Any) -> str:
    value = problem.get("input")
    return "" if isinstance(value, Mapping | BaseModel) else f" (found {value!r})"


def _user_location(location: Sequence[Any], raw: Any, problem_type: str) -> list[str]:
    """Return the keys as the file has them; pydantic adds a union's alternatives, which are left out."""
    kept: list[str] = []
    node = raw
    for depth, part in enumerate(location):
        last = depth == len(location) - 1
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list | tuple) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        elif not (isinstance(node, Mapping) and last and problem_type == "missing"):
            continue
        kept.append(str(part))
    return kept


def _valid_keys(location: Sequence[str], raw: Any, root: type[BaseModel]) -> set[str]:
    """Return the field names that are allowed at a location of the configuration."""
    models = [root]
    node = raw
    for part in location:
        node = node.get(part) if isinstance(node, Mapping) else None
        following = [
            inner
            for model in models
            if part in model.model_fields
            for inner in models_in(model.model_fields[part].annotation)
        ]
        # constraints.<name> is a mapping: the name itself is free
        models = following or models
    kind = node.get("kind", "sequence_classifier") if isinstance(node, Mapping) else ""
    of_kind = [model for model in models if _kind_of(model) in ("", kind)]
    return {name for model in of_kind or models for name in model.model_fields}
