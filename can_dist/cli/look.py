"""Looking at the machine and at runs: ``doctor`` and ``status``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from can_dist.cli.options import LOCAL_PATH, overrides_option
from can_dist.console import folded, painted
from can_dist.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from can_dist.doctor import Finding


@click.command()
@click.option("--run", "run_dir", type=LOCAL_PATH, help="Also look at this run directory's storage.")
@click.option("--config", "config_path", metavar="FILE", help="Also look at its models, data and cluster.")
@overrides_option("Override a key of the configuration.")
@click.option("--clean", is_flag=True, help="Remove temporary files of --run that are older than a day, nothing else.")
def doctor(run_dir: Path | None, config_path: str | None, overrides: tuple[str, ...], clean: bool) -> None:
    """Look at what a run depends on; say what is wrong and what to do. Exit code 6 when something is an error."""
    if clean and run_dir is None:
        raise ConfigError("--clean removes temporary files of a run directory. Give --run DIR.")
    if overrides and config_path is None:
        raise ConfigError("--set overrides a key of a configuration. Give --config FILE.")
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.config import load_config
        from can_dist.doctor import Severity, examine

        findings = examine(run_dir, load_config(config_path, overrides) if config_path else None, clean=clean)
    click.echo(in_colours(folded(format_findings(findings), sys.stdout)))
    if any(finding.severity is Severity.ERROR for finding in findings):
        sys.exit(EnvironmentProblem.exit_code)


def format_findings(findings: list[Finding]) -> str:
    """Return a table of findings, remedies below what they are for, and a last line that counts them."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.severity.name.lower():<8} {finding.subject:<{width}}  {finding.state}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  → {finding.remedy}")
    counts = {name: sum(f.severity.name == name for f in findings) for name in ("ERROR", "WARNING", "NOTE")}
    return "\n".join(
        [*lines, ", ".join(f"{count} {name.lower()}{'s' * (count != 1)}" for name, count in counts.items())]
    )


def in_colours(text: str) -> str:
    """Return a table of findings whose severities have their colours."""
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    lines = text.split("\n")
    for number, line in enumerate(lines):
        word = line.partition(" ")[0]
        if word in colours:
            lines[number] = painted(word, colours[word], sys.stdout) + line[len(word) :]
    return "\n".join(lines)


@click.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def status(run_dir: Path, as_json: bool) -> None:
    """Tell where RUN is: its stages, who works on it, its last error, and the next command to give."""
    from can_dist.doctor.status import format_status, read_status

    state = read_status(run_dir)
    click.echo(json.dumps(state, ensure_ascii=False) if as_json else folded(format_status(state), sys.stdout))
