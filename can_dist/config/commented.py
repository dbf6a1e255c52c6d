"""A configuration as YAML text in which every key is explained, by the descriptions that its model has."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from can_dist.config.describe import describe_keys
from can_dist.config.root import Config
from can_dist.config.scorers import SequenceClassifier
from can_dist.config.yaml_files import format_yaml

WIDTH = 120
DEFAULT_KIND = str(SequenceClassifier.model_fields["kind"].default)


def commented_yaml(data: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Return plain data as YAML, each value with the description of its key.

    Args:
        data: keys of a configuration; groups are mappings, and a list is written on one line.
        notes: what to say of a key, by its dotted name, instead of its description.
    """
    descriptions = {(key.name, key.kind): key.description for key in describe_keys(Config)}
    return "\n".join(_lines(data, notes, descriptions, "", "")) + "\n"


def _lines(
    data: Mapping[str, Any],
    notes: Mapping[str, str],
    descriptions: Mapping[tuple[str, str], str],
    key: str,
    described: str,
) -> Iterator[str]:
    """Yield the lines of a group of keys; ``described`` is its name in ``descriptions``, with '<name>' for any."""
    indent = "  " * key.count(".")
    kind = str(data.get("kind", DEFAULT_KIND))
    is_free = (f"{described}<name>.margin", "") in descriptions
    for name, value in data.items():
        whole = f"{described}{'<name>' if is_free else name}"
        default = descriptions.get((whole, ""), "")
        comment = notes.get(f"{key}{name}", descriptions.get((whole, kind), default))
        if isinstance(value, Mapping):
            yield from _above(comment if f"{key}{name}" in notes else "", indent)
            yield f"{indent}{name}:"
            yield from _lines(value, notes, descriptions, f"{key}{name}.", f"{whole}.")
            continue
        text = f"{indent}{name}: {_scalar(value)}"
        beside = f"{text}  # {comment}"
        if comment and len(beside) > WIDTH:
            yield from _above(comment, indent)
            yield text
        else:
            yield beside if comment else text


def _above(comment: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(comment, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"


def _scalar(value: Any) -> str:
    """Return a value as YAML spells it on one line; a text of several lines as JSON, which YAML reads too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    text = format_yaml({"value": value}).removeprefix("value:").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
