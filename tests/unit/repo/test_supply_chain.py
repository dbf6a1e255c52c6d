"""Hashes, licences and the audit of the pinned packages: S7 of SECURITY.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from audit import CLEAN, COULD_NOT_LOOK, VULNERABLE, verdict
from licences import PAGE, licence_of, read_page
from pins import ROOT, read_pins

from can_dist.tables.artifacts import file_digest


def test_s7_every_pin_has_its_hashes_and_no_other_line_has() -> None:
    """pip's mode of hashes takes a file whole or not at all; after a change of constraints.txt: `make hashes`."""
    text = (ROOT / "constraints-hashes.txt").read_text()
    blocks = re.findall(r"^([\w.-]+==.*?)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert [line for line, _ in blocks] == [pin.line for pin in read_pins()]
    written = len(blocks) + sum(hashes.count("--hash=") for _, hashes in blocks)
    assert written == len([line for line in text.splitlines() if not line.startswith("#")])


def test_s7_every_pinned_package_has_a_licence() -> None:
    """After a change of constraints.txt: `make licences`."""
    licences = read_page()
    assert sorted(licences) == sorted({pin.name for pin in read_pins()})
    assert [name for name, licence in licences.items() if not licence.strip()] == []
    assert PAGE.name in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"license_expression": "MIT", "license": "long"}, "MIT"),
        ({"license": "Apache 2.0"}, "Apache 2.0"),
        ({"license": "UNKNOWN", "classifier": ["License :: OSI Approved :: BSD License"]}, "BSD License"),
        ({"license": "The ISC License\n\nPermission is granted", "classifier": []}, "The ISC License"),
        ({"classifier": ["Topic :: Text"]}, ""),
    ],
)
def test_s7_licence_is_what_the_package_states(metadata: dict[str, Any], licence: str) -> None:
    assert licence_of(metadata) == licence


KNOWN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}
UNSEEN = "could not look at 1 of 1 packages: a"


@pytest.mark.parametrize(
    ("entries", "code", "line"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], CLEAN, "no known vulnerability in 1 packages"),
        ([{"name": "a", "version": "1", "vulns": [KNOWN]}], VULNERABLE, "a 1: PYSEC-1, CVE-1; mended in 2.1"),
        # what pip-audit says of a package that it could not look up; by itself it then ends with 0
        (
            [{"name": "a", "skip_reason": "Dependency not found"}],
            COULD_NOT_LOOK,
            "could not look at 1 of 1 packages: a",
        ),
        ([], COULD_NOT_LOOK, UNSEEN),
    ],
)
def test_s7_audit_is_clean_only_where_it_looked(entries: list[dict[str, Any]], code: int, line: str) -> None:
    assert verdict(entries, ["a"]) == (code, [line])


def wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/METADATA", name)
    return path


def test_s7_hashes_are_those_of_the_release_that_is_pinned(tmp_path: Path) -> None:
    """Asked of pip, from a folder: another release or project and a torn name are left out, a local build is in."""
    files = [wheel(tmp_path, name) for name in ("a_b-1.0", "a_b-1.0+cpu", "a_b-1.1", "a_bc-1.0", "a_b-x")]
    pins = [f"Pin('a-b', '{version}', 'A.b=={version}')" for version in ("1.0", "2.0")]
    code = f"from hashes import hashed; from pins import Pin; print(hashed([{pins[0]}])); hashed([{pins[1]}])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'supply_chain'}:{ROOT}", "PIP_NO_INDEX": "1"}
    environment["PIP_FIND_LINKS"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    expected = sorted(f"    --hash=sha256:{file_digest(path)}" for path in files[:2])
    assert done.stdout.split(" \\\n") == ["A.b==1.0", expected[0], expected[1] + "\n\n"]
    assert done.returncode == 1
    assert "no hashes of 1 pins: A.b==2.0. Is the index reached" in done.stderr
