"""A Dockerfile read, and a stage's commands run step by step without a container engine: for what an image would do."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One ``FROM``: its base and name, and its instructions with their arguments, in order."""

    base: str
    name: str
    steps: tuple[tuple[str, str], ...]


def read_dockerfile(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Return the arguments before the first stage, and the stages."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    steps = [line.split(None, 1) for line in re.sub(r"\s*\\\n\s*", " ", lines).splitlines() if line.strip()]
    arguments: dict[str, str] = {}
    stages: list[tuple[str, str, list[tuple[str, str]]]] = []
    for instruction, rest in steps:
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append((base, name, []))
        elif stages:
            stages[-1][2].append((instruction, rest))
        else:
            assert instruction == "ARG"
            key, _, value = rest.partition("=")
            arguments[key] = value
    return arguments, [Stage(base, name, tuple(inside)) for base, name, inside in stages]


def context_files(root: Path) -> list[str]:
    """Return the files of a repository that its .dockerignore lets through, which names what is let in."""
    lines = [line for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    kept = [line[1:] for line in lines if line.startswith("!")]
    left = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    assert lines[0] == "*"
    assert len(lines) == 1 + len(kept) + len(left)
    files = (path.relative_to(root) for name in kept for path in [root / name, *(root / name).rglob("*")])
    return sorted(
        str(file)
        for file in files
        if (root / file).is_file()
        and not any(fnmatch.fnmatch(part, pattern) for part in file.parts for pattern in left)
    )


def run_stage(stage: Stage, context: Path, roots: Path, left_out: Sequence[str]) -> Path:
    """Run the steps of a stage in a fresh folder and a fresh environment; return the folder that stands for its root.

    Args:
        stage: Its absolute paths become paths in the folder; ``USER`` and ``CMD`` are not run.
        context: The repository.
        roots: Where the folders of all stages are.
        left_out: Beginnings of commands that would change this machine.
    """
    root = roots / stage.name
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    here = root
    for instruction, rest in stage.steps:
        if instruction == "WORKDIR":
            here = root / rest.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, target = rest.split()
            copy(sources, here / target, context, roots)
        elif instruction == "RUN" and not rest.startswith(tuple(left_out)):
            run_step(rest, root, here)
        else:
            assert instruction in ("ARG", "USER", "CMD", "RUN"), instruction
    return root


def run_step(command: str, root: Path, here: Path) -> str:
    """Run a ``RUN`` in the environment of a stage's folder; return what it prints. A failure raises AssertionError."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**kept, "PATH": f"{root / 'venv' / 'bin'}:{kept['PATH']}", "VIRTUAL_ENV": str(root / "venv")}
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def copy(sources: Sequence[str], target: Path, context: Path, roots: Path) -> None:
    """Do a ``COPY``: from another stage, or from the context."""
    if sources[0].startswith("--from="):
        stage, [path] = sources[0].removeprefix("--from="), sources[1:]
        shutil.copytree(roots / stage / path.lstrip("/"), target)
        return
    for source in sources:
        for name in context_files(context):
            if source in (".", name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(context / name, target / name)
