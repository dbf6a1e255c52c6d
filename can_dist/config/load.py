"""From YAML to a configuration: every problem of the file reported at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from can_dist.config.beside import beside
from can_dist.config.explain import explain
from can_dist.config.methods import METHODS, OWN_SECTIONS
from can_dist.config.root import Config
from can_dist.config.shipped import shipped_file, short_names
from can_dist.config.yaml_files import apply_override, format_yaml, merge, read_yaml
from can_dist.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Args:
        path: A YAML file, or the name of a recipe that comes with the package: ``pku_7b/lora``. A relative path in the
            file means one in the working directory or, where there is none, one beside the file.
        overrides: Dotted keys with their values as YAML; a relative path means one in the working directory.

    Raises:
        ConfigError: naming every problem of the file: unknown keys with the nearest valid one, duplicates, bounds.

    >>> load_config("my.yaml", ["constraints.safety.margin=0.5"]).constraints["safety"].margin
    0.5
    """
    file = find_yaml(str(path))
    raw = beside(read_yaml(file), file.parent)
    for override in overrides:
        apply_override(raw, override)
    return validate_config(raw, str(path))


def find_yaml(name: str) -> Path:
    """Return the YAML file of a path, or of a recipe's name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name).expanduser()
    file = path if path.is_file() else shipped_file(name, "recipes", ".yaml")
    if file is None:
        raise ConfigError(
            f"{name}: no such configuration file.",
            f"Give the path of a YAML file, or the name of a recipe: {short_names('recipes', '.yaml')}.",
        )
    return file


def validate_config(raw: Mapping[str, Any], source: str = "configuration") -> Config:
    """Build a ``Config`` from plain data, or raise one ``ConfigError`` that lists all problems."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems = explain(error.errors(), raw, Config)
        lines = "\n".join(f"  {line}" for line in problems)
        raise ConfigError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}.\n{lines}") from None
    for method in config.methods:
        for_method(config, method, source)
    return config


def for_method(config: Config, method: str, source: str = "configuration") -> Config:
    """Return the configuration of one method: the whole one, overridden by ``methods.<method>``.

    Sections that belong to other methods are left out.

    Raises:
        ConfigError: there is no such method, or it cannot be run with these keys.
    """
    given = config.model_dump(mode="json", exclude_unset=True)
    overrides = given.pop("methods", {}).get(method, {})
    source = f"{source}, methods.{method}"
    if fixed := [name for name in ("method", "methods") if name in overrides]:
        raise ConfigError(f"{source}: {fixed[0]} cannot be set for one method.", "Leave it out.")
    row = METHODS.get(method)
    others = set(OWN_SECTIONS) - set(row.sections if row else ())
    if row and "strength" not in row.stages:
        others.add("strength")
    if row and not row.basis:
        others.add("basis")
    base = {name: value for name, value in given.items() if name not in others}
    return validate_config(merge(base, {**overrides, "method": method}), source)


def with_margins(config: Config, margins: Mapping[str, float]) -> Config:
    """Return the configuration with other margins; a threshold of the same constraint is replaced.

    Raises:
        ConfigError: a name is no constraint, or a margin cannot be asked for.
    """
    given = config.model_dump(mode="json", exclude_unset=True)
    for name, margin in margins.items():
        if name not in config.constraints:
            raise ConfigError(f"margin {name}: no such constraint.", f"Name one of {', '.join(config.constraints)}.")
        given["constraints"][name] |= {"margin": margin, "threshold": None}
    return validate_config(given, "configuration with other margins")


def margins_text(margins: Mapping[str, float]) -> str:
    """Return margins as text: 'safety +0.25, honesty +0.1'."""
    return ", ".join(f"{name} {margin:+g}" for name, margin in margins.items())


def dump_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return format_yaml(json.loads(config.model_dump_json()))
