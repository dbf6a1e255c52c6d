"""What is wrong with a configuration, one line a problem, in words for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from can_dist.config.describe import _kind_of, models_in


def explain(problems: Sequence[Any], raw: Any, root: type[BaseModel]) -> list[str]:
    """Turn pydantic's problems into one line per key: what was found, what is expected, the nearest valid key."""
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        location = _user_location(problem["loc"], raw, problem["type"])
        by_key.setdefault(".".join(location) or "(top level)", []).append((location, problem))
    lines = []
    for key, found in by_key.items():
        if len(found) > 1 and all(problem["type"] != "extra_forbidden" for _, problem in found):
            # the alternatives of one key, none of which fits
            expected = " or ".join(dict.fromkeys(_message(problem) for _, problem in found))
            lines.append(f"{key}: {expected}{_shown(found[0][1])}")
        else:
            lines += [_line(key, location, problem, raw, root) for location, problem in found]
    return lines


def _line(key: str, location: Sequence[str], problem: Any, raw: Any, root: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        valid = sorted(_valid_keys(location[:-1], raw, root))
        nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"{key}: unknown key.{hint} Valid keys here: {', '.join(valid)}."
    if problem["type"] == "missing":
        return f"{key}: required, not given."
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind: expected {problem['ctx']['expected_tags']} (found {problem['ctx']['tag']!r})"
    return f"{key}: {_message(problem)}{_shown(problem)}"


def _message(problem: Any) -> str:
    if problem["type"] in ("model_type", "dict_type", "union_tag_not_found"):
        return "expected a group of keys"
    if problem["type"] == "tuple_type":
        return "expected a list"
    message = str(problem["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return re.sub(r"^(Input should be|(Dictionary|Tuple) should have)", "expected", message)


def _shown(problem: Any) -> str:
    found = problem.get("input")
    return "" if isinstance(found, Mapping | BaseModel) else f" (found {found!r})"


def _user_location(location: Sequence[Any], raw: Any, problem_type: str) -> list[str]:
    """Leave out what pydantic adds to the keys of the file: the alternatives of a union."""
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
    """Field names that are allowed at a location of the configuration."""
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
