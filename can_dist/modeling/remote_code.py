"""Code that a model ships: run only where the configuration says so, and then only code that cannot change.

Every ``from_pretrained`` of this package takes its revision and its permission to run code from ``source_options``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from can_dist.config import Model
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.stored import read_json
from can_dist.tables.artifacts import file_digest

COMMIT = re.compile(r"[0-9a-f]{40}")
MAPPED = ("config.json", "tokenizer_config.json")
"""Files whose ``auto_map`` names the code of a model."""


def source_options(spec: Model) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say which version of a model is read, and whether it runs code.

    Raises:
        ConfigError: code is to be run that may change: of a hub model without a commit, or of another repository.
    """
    refuse_floating_code(f"model {spec.model!r}", spec)
    return {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}


def refuse_floating_code(owner: str, spec: Model) -> None:
    """Raise ``ConfigError`` where a model's code would be what a repository of the hub holds on the day.

    ``owner`` begins the message. transformers runs the newest commit of another repository that an ``auto_map`` names
    as ``owner/repo--module.Class``, whatever the model's own revision.
    """
    if not spec.trust_remote_code:
        return
    is_local = Path(spec.model).expanduser().is_dir()
    if not is_local and not COMMIT.fullmatch(spec.revision or ""):
        raise ConfigError(
            f"{owner}: trust_remote_code runs whatever code {spec.model!r} on the hub holds on the day; revision is "
            f"{spec.revision!r}.",
            "Read the code of one commit and give its 40 hexadecimal digits as revision.",
        )
    for name in MAPPED:
        for reference in _named_code(_stored_json(spec, name).get("auto_map")):
            repository, separator, _ = reference.partition("--")
            if separator:
                raise ConfigError(
                    f"{owner}: auto_map in its {name} names {reference!r}, code of another repository, of which the "
                    "newest commit would be run.",
                    f"Copy the code of one commit of {repository} into a local directory of the model, and leave "
                    f"'{repository}--' out of auto_map there.",
                )


def code_digests(directory: Path) -> dict[str, str]:
    """Return the digests of all Python files of a model's directory, by their place there."""
    return {str(path.relative_to(directory)): file_digest(path) for path in sorted(directory.rglob("*.py"))}


def _stored_json(spec: Model, name: str) -> dict[str, Any]:
    """Return a JSON file of a model, or {} where it has none or cannot be reached, which its opening tells."""
    local = Path(spec.model).expanduser() / name
    if Path(spec.model).expanduser().is_dir():
        return read_json(local) if local.is_file() else {}
    from transformers.utils import cached_file

    try:
        return read_json(Path(str(cached_file(spec.model, name, revision=spec.revision))))
    except (OSError, DataError):
        return {}


def _named_code(auto_map: Any) -> list[str]:
    """Return the classes that an ``auto_map`` names: each value is a name, or a list of names and nulls."""
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map if isinstance(auto_map, list) else []
    nested = [value if isinstance(value, list) else [value] for value in values]
    return [name for names in nested for name in names if isinstance(name, str)]
