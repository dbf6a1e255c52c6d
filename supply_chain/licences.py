"""``docs/licences.md``: the licence of every pinned package, as the package itself states it. ``make licences``.

pip tells the metadata of the pins that this Python installs, without installing them. The rows of the others are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from pins import CONSTRAINTS, ROOT, read_pins

PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences

Every package of `constraints.txt`, with the licence that its own metadata states: the expression, else the text or
the classifiers. Written by `make licences`; a test compares the names. can-dist is Apache-2.0, and ships none of them.

| package | licence |
|---|---|
"""
LONGEST = 80
"""Characters; a longer field is the licence's whole text, not its name."""


def licence_of(metadata: Mapping[str, Any]) -> str:
    """Return the licence that a package's metadata (as pip reports it) states, or '' where it states none."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    text = str(metadata.get("license") or "").strip()
    if text and text.upper() != "UNKNOWN" and "\n" not in text and len(text) <= LONGEST:
        return text
    kinds = [entry.split(" :: ") for entry in metadata.get("classifier", []) if entry.startswith("License :: ")]
    if kinds:
        return " or ".join(kind[-1] for kind in kinds)
    return text.splitlines()[0].strip() if text else ""


def metadata_of_pins() -> list[Mapping[str, Any]]:
    """Return the metadata of every pin that this Python installs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--report", str(report), "--requirement", str(CONSTRAINTS)], check=True)
        return [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]


def read_page() -> dict[str, str]:
    """Return the licences that the page has, by package."""
    if not PAGE.is_file():
        return {}
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name.strip("`"): licence for name, licence in cells[1:]}


def main() -> None:
    """Write the page; end with exit code 1, and leave it as it was, where a pinned package states no licence."""
    stated = {str(canonicalize_name(metadata["name"])): licence_of(metadata) for metadata in metadata_of_pins()}
    licences = read_page() | stated
    names = sorted({pin.name for pin in read_pins()})
    if bare := [name for name in names if not licences.get(name)]:
        sys.exit(
            f"no licence stated by {', '.join(bare)}. Run this with each Python of constraints.txt; see their files."
        )
    rows = [f"| `{name}` | {licences[name].replace('|', ' or ')} |" for name in names]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
