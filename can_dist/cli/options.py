"""The parts that commands share: the options of a run, running it, and checking output paths."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.console import set_amount
from can_dist.errors import ConfigError
from can_dist.tables.urls import check_run_directory, is_remote

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.tables.artifacts import Artifact


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the configuration, as an argument or as an option, and its overrides."""
    config = click.option("--config", "config_option", metavar="FILE", help="The same as the argument CONFIG.")
    overrides = overrides_option("Override a key, e.g. constraints.safety.margin=2.")
    return click.argument("config", required=False)(config(overrides(command)))


def run_options(required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of every stage: the configuration, overrides, the run directory."""
    text = "Run directory; made if absent."
    run = click.option("--run", "run_dir", required=required, type=LOCAL_PATH, help=text)
    return lambda command: config_options(run(amount_options(command)))


class LocalPath(click.Path):
    """A path of this machine. A URL is refused as it was typed; a path made of it would have lost a slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; raise ``ConfigError`` for a URL."""
        if param is not None:
            check_local(param.opts[0] if isinstance(param, click.Option) else param.human_readable_name, str(value))
        return super().convert(value, param, ctx)


def check_local(name: str, path: str) -> None:
    """Raise ``ConfigError`` where a path given as ``name`` is a URL."""
    if name in RUN_DIRECTORIES:
        check_run_directory(path)
    elif is_remote(path):
        raise ConfigError(f"{name} {path}: is a URL, and only a path of this machine can stand here.", "Give a path.")


LOCAL_PATH = LocalPath(path_type=Path)
RUN_DIRECTORIES = ("--run", "RUN", "RUN...")
"""As what commands take a run directory."""


def amount_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``-q`` and ``-v``: how much of its progress the command prints; its log holds all of it either way."""

    def choose(_context: click.Context, option: click.Parameter, value: bool) -> None:
        if value:
            set_amount("quiet" if option.name == "quiet" else "verbose")

    for short, name, text in (
        ("-v", "verbose", "Print the time of day with every line of progress."),
        ("-q", "quiet", "Print results and errors alone; RUN/log.jsonl holds the progress."),
    ):
        command = click.option(short, f"--{name}", is_flag=True, expose_value=False, callback=choose, help=text)(
            command
        )
    return command


def overrides_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option ``--set KEY=VALUE`` with its help text."""
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=text)


def read_config(config: str | None, config_option: str | None, overrides: tuple[str, ...]) -> Config:
    """Load the configuration from CONFIG or --config.

    Raises:
        ConfigError: none or both were given, or the file has problems.
    """
    from can_dist.config import load_config

    if (config is None) == (config_option is None):
        raise ConfigError("give the configuration file once: can-dist VERB CONFIG --run DIR.")
    return load_config(str(config or config_option), overrides)


def run_until(run_dir: Path, settings: Config, until: str) -> Artifact:
    """Run the configured method up to and including a stage; return that stage's artifact."""
    # libraries announce themselves on standard output, which is for results
    with contextlib.redirect_stdout(sys.stderr):
        from can_dist.pipeline import run_pipeline

        return run_pipeline(run_dir, settings, until)


def given(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that were given."""
    return [name for name, value in options.items() if value not in (None, (), False)]


def check_output(option: str, path: str | None) -> None:
    """Check before any work that a path can be written; None and - are not paths.

    Raises:
        ConfigError: it is a URL, its directory is missing or not writable, or it is a directory.
    """
    if path is None or path == "-":
        return
    check_local(option, path)
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{option} {path}: no such directory {Path(path).parent}. Make it first.")
    if Path(path).is_dir():
        raise ConfigError(f"{option} {path}: is a directory. Give the path of a file.")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".tmp-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be written ({error.strerror}). Give a path in a directory you may write to."
        ) from None
