"""The parts that ``solve`` and ``frontier`` share: the options that name a score table, and its reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import given
from can_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from can_dist.dual import Margin
    from can_dist.tables.scores import Scores


DEMANDS = ("margin", "threshold", "equals")


TABLE_ENDINGS = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".json", ".gz")
ONE_PATTERN = "Give the directory that holds the parts; a pattern such as scores/*.parquet is replaced by the shell."


class ScoreCommand(click.Command):
    """A command that takes --scores: several files there are told from a configuration too many."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse as click does, and name the pattern that the shell has replaced by its files."""
        given = list(arguments)
        try:
            return super().parse_args(context, arguments)
        except click.UsageError as error:
            extra = [text for text in given if text.endswith(TABLE_ENDINGS) and f"({text}" in error.message]
            if "--scores" in given and (extra or "unexpected extra arguments" in error.message):
                raise ConfigError(f"--scores names one table. {error.message}.", ONE_PATTERN) from None
            raise


def score_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a score table and its columns."""
    command = click.option("--beta", type=float, help="KL weight β.")(command)
    command = click.option("--reward", help="Column of the reward.")(command)
    return click.option(
        "--scores", type=click.Path(path_type=Path), help="A Parquet, Arrow or JSONL table with prompt_id."
    )(command)


def write_json(path: str | None, record: dict[str, Any]) -> None:
    """Write ``record`` to a path, or to standard output for '-'; None writes nothing."""
    if path == "-":
        click.echo(json.dumps(record, indent=1, allow_nan=False))
    elif path is not None:
        from can_dist.tables.artifacts import write_json

        write_json(Path(path), record)


def read_scores(path: Path, reward: str, names: Sequence[str], prompts_path: Path | None = None) -> Scores:
    """Read the score columns of a table, refusing missing columns by name; ``-cost`` is minus the column ``cost``."""
    import numpy as np

    from can_dist.config.explain import nearest
    from can_dist.dual import source_column
    from can_dist.tables.score_shards import check_complete, column_names, id_hashes
    from can_dist.tables.scores import Scores, read_score_table, score_arrays

    named = [reward, *names]
    columns, table = column_names(path), None
    if not columns:
        table = read_score_table(path, named)
        columns = table.column_names
    for name in ("prompt_id", *named):
        if source_column(name, columns)[0] not in columns:
            raise DataError(f"{path}: no column {name!r}.{nearest(name, columns)} Columns found: {', '.join(columns)}.")
    sources, signs = zip(*(source_column(name, columns) for name in named), strict=True)
    if table is None:
        table = read_score_table(path, sources)
    if prompts_path is not None:
        expected = read_score_table(prompts_path).column("prompt_id")
        check_complete(path, id_hashes(table.column("prompt_id")), id_hashes(expected))
    arrays = score_arrays(table, sources[0], sources[1:], str(path))
    return Scores(arrays.prompt_N, signs[0] * arrays.reward_N, np.array(signs[1:]) * arrays.utility_NJ)


def only_config(verb: str, extra: Sequence[str]) -> None:
    """Refuse options that belong to a score table, given beside CONFIG --run DIR."""
    if extra:
        raise ConfigError(
            f"{verb} CONFIG --run DIR takes what it needs from the configuration; change that by --set KEY=VALUE. "
            f"Leave out {', '.join(extra)}, or give --scores."
        )


def only_scores(
    verb: str, config: str | None, config_option: str | None, run_dir: Path | None, overrides: tuple[str, ...]
) -> None:
    """Refuse a configuration or a run given beside --scores."""
    if config and config.endswith(TABLE_ENDINGS):
        raise ConfigError(f"--scores names one table, and {config} is another.", ONE_PATTERN)
    if config or config_option or run_dir or overrides:
        raise ConfigError(f"{verb} takes either --scores and its options, or CONFIG --run DIR, not both.")


def missing(named: dict[str, Any]) -> list[str]:
    """Return the names of the options that were not given."""
    there = given(named)
    return [name for name in named if name not in there]


def parse_constraint(text: str) -> Margin:
    """Return the margin that a text such as 'safety:margin=0.2' demands."""
    from can_dist.dual import Margin

    name, colon, demand = text.rpartition(":")
    kind, equals, value = demand.partition("=")
    if not (name and colon and equals) or kind not in DEMANDS:
        raise ConfigError(
            f"--constraint {text}: expected COLUMN:margin=NUMBER, COLUMN:threshold=NUMBER or COLUMN:equals=NUMBER."
        )
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"--constraint {text}: {value!r} is not a number.") from None
    if kind == "threshold":
        return Margin(name, threshold=number)
    return Margin(name, margin=number, equal=kind == "equals")
