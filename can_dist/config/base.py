"""The base of all configuration models, and the identity of a model: the fields that decide a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Strict(BaseModel):
    """Base of every configuration model: frozen, unknown keys rejected, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("expected a number or text, not true/false")
        return value


def runtime(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a field that is not part of any stage's identity."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **bounds)


def added(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a field that came after the first runs: its default is left out of every identity, as it was then."""
    return Field(default, description=description, json_schema_extra={"added": True}, **bounds)


def changed(model: BaseModel, names: Sequence[str]) -> list[str]:
    """Return the names whose value is not the default."""
    return [n for n in names if getattr(model, n) != type(model).model_fields[n].get_default(call_default_factory=True)]


def identity(model: BaseModel, *, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON-safe fields of ``model`` that decide a result; runtime fields are left out."""
    dumped: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if name in exclude or extra.get("runtime") or (extra.get("added") and not changed(model, [name])):
            continue
        dumped[name] = _plain(getattr(model, name))
    return dumped


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
