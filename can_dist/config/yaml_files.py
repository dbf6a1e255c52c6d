"""YAML files to plain data and back, and ``key=value`` overrides."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from can_dist.errors import ConfigError

MOST_NESTED = 100
"""Brackets open at once; the parser's time grows with their square."""
MOST_NODES = 100_000
"""Values of a configuration; ten aliases of ten aliases of ten are soon more than any machine holds."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).", "Give a YAML file.") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(raw).__name__}.")
    return raw


def format_yaml(data: Any) -> str:
    """Return plain data as YAML text, one key a line."""
    import io

    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(data, stream)
    return stream.getvalue()


def parse_yaml(text: str, source: str) -> Any:
    """Return the plain data of a YAML text; ``source`` names it in messages.

    Raises:
        ConfigError: it is not valid YAML, or a key is given twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import ReusedAnchorWarning, YAMLError

    opened = accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
    if max(opened, default=0) > MOST_NESTED:
        raise ConfigError(f"{source}: nested without end, or too deeply for a configuration.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            data = YAML(typ="safe", pure=True).load(text)
        if _num_nodes(data, {}) > MOST_NODES:
            raise ConfigError(f"{source}: more than {MOST_NODES} values once its aliases (*name) are filled in.")
        return data
    except ConfigError:
        raise
    except ReusedAnchorWarning:
        raise ConfigError(f"{source}: an anchor (&name) is given twice.", "Give each a name of its own.") from None
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        key = re.search(r'duplicate key "([^"]*)"', str(error.problem))
        raise ConfigError(
            f"{source}, line {line}: key {key.group(1) if key else '?'!r} is given twice.",
            "Keep one.",
        ) from None
    except (RecursionError, _Endless):
        raise ConfigError(f"{source}: nested without end, or too deeply for a configuration.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{source}: not valid YAML: {error}.") from None
    except YAMLError as error:
        text = str(error).replace('in "<unicode string>", ', "")
        raise ConfigError(f"{source}: not valid YAML: {text}") from None


class _Endless(Exception):
    """A value holds itself, by an alias."""


def _num_nodes(value: Any, known: dict[int, int | None]) -> int:
    """Return how many values a tree has when every alias is filled in; each value is counted once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if (count := known[id(value)]) is None:
            raise _Endless
        return count
    known[id(value)] = None
    inner = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_num_nodes(item, known) for item in inner)
    known[id(value)] = total
    return total


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``over``; groups of keys are merged, anything else is replaced.

    A group of another ``kind`` is replaced whole: the keys of one kind mean nothing to another.
    """
    if "kind" in over and over["kind"] != base.get("kind"):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in ``raw``; the value is read as YAML.

    Raises:
        ConfigError: there is no key, no '=', or a parent of the key is no group.
    """
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set {override}: expected key=value, for example constraints.safety.margin=2.0.")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent!r} holds a value, not a group of keys.")
    node[last] = parse_yaml(text, f"--set {override}")
