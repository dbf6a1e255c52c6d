"""``docs/promises.md``: its quick commands end as it says, and the tests that it selects exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (P\d) [^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BIN = Path(sys.executable).parent


def commands(section: str) -> str:
    return "".join(re.findall(r"```bash\n(.*?)```", SECTIONS[section], re.DOTALL))


def test_every_promise_has_a_command() -> None:
    assert list(SECTIONS) == [f"P{number}" for number in range(1, 9)]
    assert all(commands(section) for section in SECTIONS)


def test_the_tests_that_the_page_selects_exist() -> None:
    lines = [shlex.split(line) for line in "".join(map(commands, SECTIONS)).splitlines() if "-m pytest" in line]
    assert len(lines) >= 6
    for words in lines:
        file = next(word for word in words if word.startswith("tests/"))
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        for part in words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]:
            assert any(part in name for name in names), (file, part)


@pytest.mark.parametrize("section", ["P5", "P7"])
def test_quick_commands_end_as_the_page_says(section: str, tmp_path: Path) -> None:
    script = commands("P5").rpartition("can-dist")[0] + "can-dist" + commands(section).rpartition("can-dist")[2]
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    [code] = re.findall(r"exit code (\d)", SECTIONS[section])
    assert done.returncode == int(code), done.stderr
    expected = [line.removeprefix("    ") for line in SECTIONS[section].splitlines() if line.startswith("    ")]
    assert expected
    for line in expected:
        assert line in done.stdout + done.stderr
