"""The tests under the lowest and the newest versions that pyproject.toml allows, and docs/compatibility.md from them.

    python benchmarks/compatibility.py try lowest --python 3.10
    python benchmarks/compatibility.py try newest --python 3.13 --rooms dual tables
    python benchmarks/compatibility.py try pinned --python 3.12
    python benchmarks/compatibility.py ask --environment DIRECTORY
    python benchmarks/compatibility.py page

uv resolves the versions and makes an environment in ``build/compatibility``; the tests run there, the unit tests of all
rooms at once, and what they say of each is in ``benchmarks/results/compatibility``. A room that is run again replaces
what it said.
``ask`` needs no more of an environment than torch, and keeps which attention a GPU would get there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility"
ATTENTION = ROOT / "benchmarks" / "results" / "attention_of_torch.json"
ENVIRONMENTS = ROOT / "build" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
RESOLUTIONS = {
    "lowest": ("--resolution", "lowest-direct"),
    "newest": ("--resolution", "highest"),
    "pinned": ("--constraint", str(ROOT / "constraints.txt")),
}
ROOMS = sorted(folder.name for folder in (ROOT / "tests" / "unit").iterdir() if any(folder.glob("test_*.py")))
TRAINING = "a training"
TRAININGS = [
    "tests/integration/test_train.py",
    "-k",
    "two_ranks_one_rank_and_plain_torch or adapters_train_resume or export_of_tied_embeddings",
]  # full and by adapters, on one rank and two, killed and resumed, merged, exported: beside plain torch
SHOWN = ("torch", "transformers", "deepspeed", "ray", "peft", "datasets", "numpy", "pyarrow")
ASK_THE_ENVIRONMENT = """
import importlib.metadata, inspect, json, platform, sys, torch
from can_dist.modeling.attention import Machine, choose_attention, torch_varlen
varlen = torch_varlen()
parameters = None if varlen is None else frozenset(inspect.signature(varlen).parameters)
machine = Machine("cuda", (9, 0), torch.__version__, parameters, None)
versions = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
attention = str(choose_attention(machine, torch.bfloat16, (128, 128)))
print(json.dumps({"python": platform.python_version(), "packages": versions, "attention": attention}))
"""


def requirements() -> dict[str, str]:
    """Return the bounds of the packages that can-dist needs, by name, as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r'^ *"([\w.-]+)(?:\[[\w,]+\])?([^"]*)"', block, re.MULTILINE))


def pins() -> dict[str, str]:
    """Return the versions of constraints.txt by name; of a package with two, that of the newer Pythons."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==([^;\s]+)", text, re.MULTILINE)}


# ------------------------------------------------------------------------------------------------------------ the runs


def environment(folder: Path, versions: str, version: str) -> Path:
    """Install what uv resolves, unless the folder has just that; return the environment's Python."""
    python, pins = folder / "bin" / "python", folder / "requirements.txt"
    wanted = folder.with_suffix(f"{folder.suffix}.txt")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    uv("pip", "compile", "--python-version", version, *RESOLUTIONS[versions], "--extra", "dev", "--no-header",
       "--output-file", wanted, ROOT / "pyproject.toml")  # fmt: skip
    if not pins.exists() or pins.read_bytes() != wanted.read_bytes():
        uv("venv", "--clear", "--python", version, folder)
        uv("pip", "install", "--python", python, "--requirements", wanted)
        uv("pip", "install", "--python", python, "--no-deps", "--editable", ROOT)
        pins.write_bytes(wanted.read_bytes())
    wanted.unlink()
    return python


def uv(*arguments: str | Path) -> None:
    """Run uv, which PATH or this Python has."""
    try:
        subprocess.run(["uv", *arguments[:1], "--quiet", *arguments[1:]], check=True)
    except FileNotFoundError:
        sys.exit("compatibility.py: uv is not on PATH; pip install uv")


def run_tests(python: Path, tests: Sequence[str | Path], rooms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run tests in an environment; return how many passed of each room, and which failed."""
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}", *tests],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    return read_report(report, done.returncode, rooms)


def tests_of(rooms: Sequence[str]) -> list[str]:
    """Return what pytest is told to run: the tests of rooms, or the training."""
    return TRAININGS if rooms == [TRAINING] else ["-n", "2", *(f"tests/unit/{room}" for room in rooms)]


def run_failed(python: Path, room: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Run again what failed in a room, and nothing else."""
    again = run_tests(python, earlier["failed"], [room])[room]
    return {name: earlier[name] + again[name] for name in ("passed", "skipped")} | {"failed": again["failed"]}


def read_report(report: Path, code: int, rooms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the JUnit report of a pytest that ended with a code; no room passed a run that did not come to its end."""
    every = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    ended = [] if code in (0, 1) else [f"pytest ended with exit code {code}"]
    results = {}
    for room in rooms:
        cases = [case for case in every if room_of(case) == room]
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skipped = [case for case in cases if case.find("skipped") is not None]
        names = sorted({f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in failed})
        passed = len(cases) - len(failed) - len(skipped)
        results[room] = {"passed": passed, "skipped": len(skipped), "failed": [*names, *ended]}
    return results


def room_of(case: ElementTree.Element) -> str:
    """Return the room of a test: the folder of a unit test, or the training."""
    module = case.get("classname", "").split(".")
    return module[2] if module[:2] == ["tests", "unit"] else TRAINING


def ask(python: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return an environment's Python, the versions of packages, and the sentence on attention that a GPU would get."""
    told = subprocess.run(
        [python, "-c", ASK_THE_ENVIRONMENT, *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(told.stdout))


def record_attention(python: Path, path: Path) -> None:
    """Keep the sentence on attention of an environment's torch beside those of others, by version."""
    about = ask(python, ["torch"])
    sentences = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sentences[about["packages"]["torch"]] = about["attention"]
    path.write_text(json.dumps(dict(sorted(sentences.items(), key=lambda item: order(item[0]))), indent=1) + "\n")


def record_runs(name: str, python: Path, rooms: Sequence[str], *, only_failed: bool) -> Path:
    """Run rooms in an environment, or what failed of them before; return the record."""
    about = ask(python, requirements())
    path = RESULTS / f"{name}-{'.'.join(about['python'].split('.')[:2])}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = earlier.get("runs", {}) if earlier.get("packages") == about["packages"] else {}
    groups = [[room for room in rooms if room == TRAINING], [room for room in rooms if room != TRAINING]]
    for group in filter(None, groups):
        if only_failed:
            ran = {room: run_failed(python, room, runs[room]) for room in group if runs.get(room, {}).get("failed")}
        else:
            ran = run_tests(python, tests_of(group), group)
        runs |= ran
        for room, result in ran.items():
            print(f"{path.stem}, {room}: {result}", flush=True)
        date = datetime.now(timezone.utc).date().isoformat()
        record = {"versions": name, "date": date, **about, "runs": dict(sorted(runs.items()))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ the page


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the records, by versions and Python."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: (record["versions"], [int(n) for n in record["python"].split(".")]))


def page(
    records: Sequence[Mapping[str, Any]],
    bounds: Mapping[str, str],
    pinned: Mapping[str, str],
    attention: Mapping[str, str],
) -> str:
    """Return docs/compatibility.md.

    Args:
        records: What ``record_runs`` wrote.
        bounds: Bounds of the packages by name, as pyproject.toml has them.
        pinned: Versions by name in small letters, as constraints.txt has them.
        attention: What ``record_attention`` wrote, beside the sentences of the records.
    """
    lines = [
        "# Compatibility",
        "",
        "Which versions were run. `make compatibility` installs the lowest and the newest versions that",
        "`pyproject.toml` allows, each in an environment of its own, runs the tests there, and writes this page from",
        "the [records](../benchmarks/results/compatibility); *pinned* are those of `constraints.txt`. Everything ran",
        "on Linux, on a CPU.",
        "",
        "| versions | Python | " + " | ".join(SHOWN) + " | unit tests | a training | date |",
        "|---|---|" + "---|" * len(SHOWN) + "---|---|---|",
    ]
    for record in records:
        packages = [record["packages"][name] for name in SHOWN]
        results = [unit_tests(record["runs"]), training(record["runs"])]
        lines.append(f"| {' | '.join([record['versions'], record['python'], *packages, *results, record['date']])} |")
    lines += [
        "",
        "*A training* is full and by adapters, on one rank and on two, killed and resumed, merged and exported, and",
        "compared with a loop in plain torch. Where only some rooms of the unit tests were run, they are named.",
        "",
        "## Bounds",
        "",
        "| package | bounds | lowest run | newest run | pinned |",
        "|---|---|---|---|---|",
    ]
    for name, bound in bounds.items():
        versions = sorted({record["packages"][name] for record in records}, key=order)
        lines.append(f"| {name} | `{bound}` | {versions[0]} | {versions[-1]} | {pinned[name.lower()]} |")
    lines += [
        "",
        "When the newest were run, on 2026-11-28, PyPI had no version beyond these bounds. Pinned is what was tested",
        "as a whole: torch 2.13 is the newest of which a build without CUDA was at hand, and the others are small",
        "releases behind. vLLM 0.33 is within the bounds of its extra and was not run: the newest for CPUs is 0.32.",
        "",
        "DeepSpeed before 0.19.8 does not wait for every part of a gather by gloo. Under 0.19.0, one of two trainings",
        "of adapters on two CPU ranks merged them into the base weights of a neighbouring matrix. Opening such a",
        "policy ends with an error, since its log-probabilities are compared with those of the training.",
        "",
        "peft before 0.20 does not know experts that are one parameter: asked for `all-linear` layers of such a model,",
        "0.18 leaves the experts untrained without a word, and 0.19 ends with an error that names no remedy.",
        "",
        "Under Python 3.10 the documentation cannot be built: `mkdocs-material` needs 3.11.",
        "",
        "## Attention on a GPU",
        "",
        "What an H100 would be told under each of these versions of torch, asked under that very version; nothing here",
        "ran on a GPU.",
        "",
        "| torch | packs in bf16, without flash-attn |",
        "|---|---|",
    ]
    sentences = dict(attention) | {record["packages"]["torch"]: record["attention"] for record in records}
    lines += [f"| {version} | {sentences[version]} |" for version in sorted(sentences, key=order)]
    return "\n".join([*lines, ""])


def order(version: str) -> list[int]:
    """Return what versions are ordered by."""
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def unit_tests(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how the unit tests ended, and which rooms they were of."""
    rooms = [room for room in runs if room != TRAINING]
    part = "" if set(rooms) >= set(ROOMS) else f" ({', '.join(rooms)})"
    return verdict([runs[room] for room in rooms]) + part


def training(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how the training ended."""
    return verdict([runs[TRAINING]]) if TRAINING in runs else "not run"


def verdict(results: Sequence[Mapping[str, Any]]) -> str:
    """Say how tests ended."""
    passed, skipped = sum(result["passed"] for result in results), sum(result["skipped"] for result in results)
    failed = [name for result in results for name in result["failed"]]
    return f"{passed:,} passed, {skipped} skipped" + (f", **{len(failed)} failed**" if failed else "")


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    attempt = commands.add_parser("try", help="install versions, run the tests under them")
    attempt.add_argument("versions", choices=sorted(RESOLUTIONS))
    attempt.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="3.x")
    attempt.add_argument("--rooms", nargs="+", choices=[TRAINING, *ROOMS], default=[TRAINING, *ROOMS], metavar="ROOM")
    attempt.add_argument("--failed", action="store_true", help="only the tests that failed before")
    attempt.add_argument("--environment", type=Path, help="an environment that is there and is taken as it is")
    question = commands.add_parser("ask", help="which attention a GPU would get under an environment's torch")
    question.add_argument("--environment", type=Path, required=True)
    commands.add_parser("page", help="write docs/compatibility.md from the records")
    arguments = parser.parse_args()
    if arguments.command == "page":
        sentences = json.loads(ATTENTION.read_text(encoding="utf-8"))
        PAGE.write_text(page(read_records(RESULTS), requirements(), pins(), sentences), encoding="utf-8")
        return
    if arguments.command == "ask":
        record_attention(arguments.environment.absolute() / "bin" / "python", ATTENTION)
        return
    name, version = arguments.versions, arguments.python
    if arguments.environment is not None:
        python = arguments.environment.absolute() / "bin" / "python"
    else:
        python = environment(ENVIRONMENTS / f"{name}-{version}", name, version)
    path = record_runs(name, python, arguments.rooms, only_failed=arguments.failed)
    failed = [test for result in json.loads(path.read_text())["runs"].values() for test in result["failed"]]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
