"""What runs before a commit is what `make lint` runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[3]


def test_ruff_before_a_commit_is_that_of_make_lint() -> None:
    repositories: list[dict[str, Any]] = YAML(typ="safe", pure=True).load(ROOT / ".pre-commit-config.yaml")["repos"]
    revision = {repository["repo"].rpartition("/")[2]: repository.get("rev") for repository in repositories}
    pins = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert revision["ruff-pre-commit"] == f"v{pins['ruff']}"
    hooks = {hook["id"] for repository in repositories for hook in repository["hooks"]}
    assert hooks == {"check-added-large-files", "codespell", "end-of-file-fixer", "mypy", "ruff-check", "ruff-format"}
