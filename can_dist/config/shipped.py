"""The files that travel with the package, by name: DeepSpeed files, recipes, job scripts, documentation.

In the repository they lie at its top; the wheel carries the same folders in ``can_dist/shipped`` (``pyproject.toml``
maps them), so that every name means the same file in both.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDERS = ("ds_configs", "recipes", "ray_jobs", "docs")


def shipped_root() -> Path:
    """Return the directory that holds the shipped folders."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def shipped_names(folder: str) -> list[str]:
    """Return the files of a shipped folder, or of a folder in one, by their names: ``ds_configs/zero3_bf16.json``."""
    root = shipped_root()
    files = (path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if "__pycache__" not in path.parts)


def shipped_file(name: str, folder: str, suffix: str) -> Path | None:
    """Return the shipped file of a name, or ``None``.

    Args:
        name: With or without the folder and the suffix: ``zero3_bf16``, or ``ds_configs/zero3_bf16.json``.
        folder: One of ``FOLDERS``.
        suffix: Of the files that are meant, with its dot.
    """
    whole = f"{folder}/{name.removeprefix(f'{folder}/').removesuffix(suffix)}{suffix}"
    return shipped_root() / whole if whole in shipped_names(folder) else None


def short_names(folder: str, suffix: str) -> str:
    """Return the names of a folder's files as a user may write them, in one line."""
    names = (name for name in shipped_names(folder) if name.endswith(suffix))
    return ", ".join(name.removeprefix(f"{folder}/").removesuffix(suffix) for name in names)
