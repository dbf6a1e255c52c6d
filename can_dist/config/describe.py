"""The keys of a configuration model, described for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        for alternative in alternatives:
            yield from describe_keys(alternative, below, _kind_of(alternative) if len(alternatives) > 1 else kind)


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
        return " or ".join(dict.fromkeys(_words(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is tuple:
        several = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {several}{_words(arguments[0])}s".replace("texts", "text")
    if origin is dict:
        inner = WORDS.get(arguments[1])
        return f"{inner}s by name" if inner else "groups by name"
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
    # list[int] is an instance of type for Python 3.10
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, dict, Annotated):
        return [model for argument in get_args(annotation) for model in models_in(argument)]
    return []
