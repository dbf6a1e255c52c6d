"""What scripts take from can_dist is there, also in functions that no fast test calls, such as those of benchmarks."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import can_dist

ROOT = Path(__file__).parents[3]
FOLDERS = ("benchmarks", "kernels", "ray_jobs", "recipes", "supply_chain", "tests", ".ci")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def absent(tree: ast.AST) -> list[str]:
    """Return what a script imports from can_dist and is not there; nothing is imported."""
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "can_dist":
            there = names_of(node.module)
            missing += [f"{node.module}.{name.name}" for name in node.names if name.name not in there]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.split(".")[0] == "can_dist"]
            missing += [name for name in names if file_of(name) is None]
    return missing


@functools.cache
def names_of(module: str) -> frozenset[str]:
    """Return the names that a module's text binds, and the modules in its folder."""
    file = file_of(module)
    if file is None:
        return frozenset()
    names = set(can_dist.__all__) if module == "can_dist" else set()  # they load when they are used
    if file.name == "__init__.py":
        names |= {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


def file_of(module: str) -> Path | None:
    """Return the file of a module of can_dist."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_takes_from_can_dist_is_there(script: Path) -> None:
    assert absent(ast.parse(script.read_text(encoding="utf-8"))) == []


def test_a_name_that_is_not_there_is_seen() -> None:
    text = "def f():\n    from can_dist.scoring.protocol import LogProb, load_scorer\n    import can_dist.nowhere\n"
    assert absent(ast.parse(text)) == ["can_dist.scoring.protocol.load_scorer", "can_dist.nowhere"]
