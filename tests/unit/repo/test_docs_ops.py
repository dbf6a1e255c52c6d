"""What the pages about clusters, observing and security say exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from can_dist.cli import cli
from can_dist.cluster import connection as cluster
from can_dist.cluster import metrics as ray_metrics
from can_dist.train import train
from can_dist.workspace import Workspace

ROOT = Path(__file__).parents[3]
TESTS = ROOT / "tests"
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "can_dist").rglob("*.py"))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_test_that_security_md_names_exists() -> None:
    text = page("SECURITY.md")
    written = {
        name: re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in TESTS.rglob("test_*.py")
        for name in [str(path.relative_to(TESTS))]
    }
    everywhere = [test for tests in written.values() for test in tests]
    named = re.findall(r"`(test_\w+?)(?:_\.\.\.|`)", text)
    assert len(named) > 10
    assert [name for name in named if not any(test.startswith(name) for test in everywhere)] == []
    files = re.findall(r"`((?:unit|integration)/[\w/]+\.py)`", text)
    assert len(files) > 5
    assert set(files) <= set(written)
    for number in range(1, 12):
        [row] = [line for line in text.splitlines() if line.startswith(f"| S{number} ")]
        assert f"`test_s{number}_" in row


PAGES = [path for path in ROOT.rglob("*") if path.suffix == ".md" or path.name == "Makefile"]


def test_every_file_of_tests_that_a_page_names_exists() -> None:
    named = {
        (str(path.relative_to(ROOT)), file)
        for path in PAGES
        if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
        for file in re.findall(r"\b(tests/[\w/]+\.py)", path.read_text(encoding="utf-8"))
    }
    named |= {
        ("docs/faults.md", f"tests/{name}")
        for name in re.findall(r"`((?:unit|integration)/\S+\.py)`", page("docs/faults.md"))
    }
    assert len(named) > 30
    assert [(name, file) for name, file in sorted(named) if not (ROOT / file).is_file()] == []


def test_every_test_that_the_faults_page_names_exists_and_every_fault_has_one() -> None:
    text = page("docs/faults.md")
    tests = [
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    named = re.findall(r"`(test_\w+)(\*?)`", text)
    assert len(named) > 50
    for name, many in named:
        assert any(test.startswith(name) if many else test == name for test in tests), name
    for number in range(1, 47):
        [row] = [line for line in text.splitlines() if line.startswith(f"| F{number:02d} ")]
        # nothing can be resumed from a mistyped path where no path is given
        assert number == 39 or any(f"_f{number:02d}_" in test for test in tests), row


def test_every_event_is_documented_and_every_documented_event_is_written() -> None:
    documented = set(re.findall(r"^\| `([a-z ]+)` \|", page("docs/observability.md"), re.MULTILINE))
    assert documented - {"event"} == set(re.findall(r'event="([a-z ]+)"', SOURCES))
    assert callable(Workspace.log)


def test_every_metric_is_documented() -> None:
    text = page("docs/observability.md")
    names = [f"ray_{name}_total" for name in ray_metrics.COUNTERS]
    names += [f"ray_{ray_metrics.WAITING}", f"ray_{ray_metrics.SECONDS}"]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", ["docs/clusters.md", "docs/observability.md"])
def test_commands_of_the_pages_exist(name: str) -> None:
    lines = re.findall(r"^(?: {4})?((?:can-dist|deepspeed|torchrun) [^`\n]*)$", page(name), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)
        if words[0] == "can-dist":
            cli.commands[words[1]].make_context(words[1], words[2:])
        else:
            train.make_context("train", words[words.index("can_dist.train") + 1 :])


def test_forwarded_variables_that_the_pages_name_are_forwarded() -> None:
    named = set(re.findall(r"`((?:NCCL|GLOO)_\w+)`", page("docs/clusters.md")))
    assert named == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert named <= set(cluster.FORWARDED)


def test_shell_commands_of_the_cluster_page_are_syntactically_right() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", page("docs/clusters.md"), re.DOTALL)
    assert any("srun" in block for block in blocks)
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True)
