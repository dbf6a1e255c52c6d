"""The keys of a configuration model: what exists, in words for people, and what is wrong with a given value."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "with at least", "pattern": "like"}


class Key(NamedTuple):
    """One configuration key. ``kind`` names the alternative it belongs to, where its group has several."""

    name: str
    type: str
    default: str
    description: str
    kind: str
    runtime: bool


def describe_keys(model: type[BaseModel], prefix: str = "", kind: str = "") -> Iterator[Key]:
    """Yield every key of a model and of the models in it, in file order."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        runtime = isinstance(extra, dict) and bool(extra.get("runtime"))
        key = f"{prefix}{name}"
        yield Key(key, _type(field), _default(field), field.description or "", kind, runtime)
        alternatives = models_in(field.annotation)
        below = f"{key}.<name>." if get_origin(field.annotation) is dict else f"{key}."
        for one in alternatives:
            yield from describe_keys(one, below, _kind_of(one) if len(alternatives) > 1 else kind)


def format_keys(model: type[BaseModel]) -> str:
    """Return the reference of all keys as text, two lines a key."""
    lines = []
    for key in describe_keys(model):
        kind = f" (kind: {key.kind})" if key.kind else ""
        runtime = " Changing it recomputes nothing." if key.runtime else ""
        lines.append(f"{key.name}{kind}: {key.type}; {key.default}\n    {key.description}{runtime}")
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{words} {value}"
        for constraint in field.metadata
        for name, words in BOUNDS.items()
        if (value := getattr(constraint, name, None)) is not None
    ]
    words, null, _ = _words(field.annotation).partition(" or null")
    return " ".join([words, ", ".join(bounds)]).strip() + null


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in arguments))
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is tuple:
        several = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {several}{_words(arguments[0])}s".replace("texts", "text")
    if origin is dict:
        return "groups by name"
    return WORDS.get(annotation, "group")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "default: the defaults of its keys"
    return f"default {json.dumps(field.default, ensure_ascii=False)}"


def _kind_of(model: type[BaseModel]) -> str:
    return str(model.model_fields["kind"].default) if "kind" in model.model_fields else ""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation names, alternatives in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, dict, Annotated):
        return [model for argument in get_args(annotation) for model in models_in(argument)]
    return []


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
        kinds = [kind.strip(" '") for kind in problem["ctx"]["expected_tags"].split(",")]
        nearest = difflib.get_close_matches(str(problem["ctx"]["tag"]), kinds, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"{key}.kind: unknown kind {problem['ctx']['tag']!r}.{hint} Kinds of scorers: {', '.join(kinds)}."
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
