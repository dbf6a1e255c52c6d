"""The command line. Heavy packages are imported inside the commands, so help and configuration errors are quick."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import click

from can_dist.cli.certify import certify
from can_dist.cli.chat import chat
from can_dist.cli.compare import compare, judge, run_and_compare
from can_dist.cli.estimate import estimate
from can_dist.cli.export import export
from can_dist.cli.files import files
from can_dist.cli.fit_scorer import fit_scorer
from can_dist.cli.frontier import frontier
from can_dist.cli.init import init
from can_dist.cli.look import doctor, status
from can_dist.cli.options import LOCAL_PATH, overrides_option, read_config, run_options, run_until
from can_dist.cli.plan import plan
from can_dist.cli.solve import solve
from can_dist.cli.sweep import sweep
from can_dist.console import MACHINE, folded, interruptible, of_machine, painted, printable
from can_dist.errors import CanDistError, ConfigError, DataError, EnvironmentProblem, Interrupted

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or configuration, 3 bad data, 4 infeasible or not certified, 5 numerical, "
    "6 environment, 7 not enough prompts to certify, 8 not believed as solve.require asks, "
    "9 some margins of a sweep have no policy, 75 interrupted (run again)."
)


GROUPS = {
    "Begin": ("init", "demo", "fit-scorer", "config", "doctor", "plan", "files"),
    "Run": ("run", "generate", "score", "solve", "label", "train", "strength", "evaluate", "sweep"),
    "Look": ("status", "chat", "frontier", "compare", "judge", "estimate", "verify"),
    "Hand on": ("export", "certify"),
}
"""The verbs as ``--help`` shows them; every verb is in one group (``tests/unit/cli/test_terminal.py``)."""


class Verbs(click.Group):
    """A group of commands whose help lists them by what they are for."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write every group of verbs with the first sentence of each, as far as a line holds it."""
        longest = max(map(len, self.commands))
        for title, verbs in GROUPS.items():
            room = formatter.width - longest - 6
            with formatter.section(title):
                formatter.write_dl([(verb, self.commands[verb].get_short_help_str(room)) for verb in verbs])


@click.group(
    cls=Verbs,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="can-dist")
def cli() -> None:
    """Make a language model safer by a stated amount in one fine-tuning run."""


@cli.command()
@run_options()
@click.option("--methods", metavar="NAME,...", help="Run these, each with its own keys, then compare them.")
@click.option("--until", metavar="STAGE", help="Stop after this stage: generate, score, solve, label, train, strength.")
def run(
    config: str | None,
    config_option: str | None,
    run_dir: Path,
    overrides: tuple[str, ...],
    methods: str | None,
    until: str | None,
) -> None:
    """Run the whole method: generate, score, solve, label, train, strength, evaluate. Run again to continue."""
    settings = read_config(config, config_option, overrides)
    if methods is not None and until is not None:
        raise ConfigError(
            "--methods compares finished methods, and --until stops before one is. Leave out one of them."
        )
    if until is not None:
        from can_dist.config.methods import check_stage

        check_stage(settings.method, until)
    if methods is not None:
        run_and_compare(run_dir, settings, methods)
    else:
        click.echo(str(run_until(run_dir, settings, until or "evaluate").path))


STAGES = {
    "generate": "Sample K responses per prompt from the reference.",
    "score": "Score the responses, and their log-probability under the reference.",
    "label": "Label pairs of responses with λ*.",
    "train": "Fine-tune the reference once on the labelled pairs.",
    "strength": "Scale what was trained until the margins are met, by the validation responses.",
    "evaluate": "Measure the policy on held-out prompts and write the report.",
}


def _stage_command(stage: str, text: str) -> None:
    @cli.command(stage, help=text)
    @run_options()
    def command(config: str | None, config_option: str | None, run_dir: Path, overrides: tuple[str, ...]) -> None:
        click.echo(str(run_until(run_dir, read_config(config, config_option, overrides), stage).path))


for name, text in STAGES.items():
    _stage_command(name, text)
for added in (
    init,
    sweep,
    chat,
    solve,
    frontier,
    compare,
    estimate,
    certify,
    export,
    fit_scorer,
    plan,
    judge,
    doctor,
    status,
    files,
):
    cli.add_command(added)


@cli.command("config")
@click.argument("config", required=False)
@click.option("--schema", is_flag=True, help="Print every key with its type, default and meaning.")
@overrides_option("Override a key.")
def config_command(config: str | None, schema: bool, overrides: tuple[str, ...]) -> None:
    """Check CONFIG and print it resolved, or print all keys (--schema)."""
    from can_dist.config import Config, dump_yaml, load_config
    from can_dist.config.describe import format_keys

    if schema:
        click.echo(format_keys(Config))
    elif config is not None:
        click.echo(dump_yaml(load_config(config, overrides)), nl=False)
    else:
        raise ConfigError("config needs a FILE to check, or --schema to list all keys.")


@cli.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
def verify(run_dir: Path) -> None:
    """Check the digest of every file of a run, and that each artifact was made from what it says."""
    from can_dist.tables.verify import files_outside, verify_run

    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory.")
    count, problems = verify_run(run_dir)
    if problems:
        raise DataError(f"{run_dir}: {len(problems)} problem(s) in {count} artifacts.\n  " + "\n  ".join(problems))
    if not count:
        raise DataError(f"{run_dir}: holds no finished artifact.")
    click.echo(f"{run_dir}: {count} artifacts, every digest and every input as recorded.")
    names = [f"{count} × {name}" if count > 1 else name for name, count in files_outside(run_dir).items()]
    if names:
        click.echo(f"Listed in no manifest, so not checked: {', '.join(names)}.")


@cli.command()
@click.option("--run", "run_dir", default="runs/demo", show_default=True, type=LOCAL_PATH, help="Run directory.")
@overrides_option("Override a key of the demo.")
def demo(run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Make a small world and run MoCAN on it: no network, no GPU, no download, a few minutes."""
    from can_dist.demo.run import run_demo

    run_demo(run_dir, overrides)


def _at_home(argument: str) -> str:
    """Return an argument with the home directory filled in where a shell leaves it as it is: in ``--run=~/mine``."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + (str(Path(value).expanduser()) if value.startswith("~/") else value)


def main(command: click.Command = cli) -> None:
    """Run the command line, or another command; an expected error becomes one message and its exit code."""
    gc.set_threshold(50_000)  # imports make no garbage: looking for it took a tenth of a short command
    sys.path.append(str(Path.cwd()))  # a scorer given as module:function lies beside the configuration
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        with interruptible():
            command.main(prog_name="can-dist" if command is cli else None, standalone_mode=False)
        sys.stdout.flush()  # a full device is told of here, not by the interpreter's end
    except (CanDistError, Interrupted) as error:
        name = type(error).__name__
        text = folded(printable(f"{name}: {error}"), sys.stderr)
        click.echo(painted(name, "red", sys.stderr) + text.removeprefix(name), err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        if error.filename is None:  # standard output itself: nothing more can be written there
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        click.echo(printable(f"EnvironmentProblem: {of_machine(error)}"), err=True)
        sys.exit(EnvironmentProblem.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; finished work is kept, run again to continue.", err=True)
        sys.exit(Interrupted.exit_code)
