"""The parts that ``solve`` and ``frontier`` share: the options that name a score table, and its reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import LOCAL_PATH, given
from can_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from can_dist.dual import Column, Margin
    from can_dist.tables.scores import Scores


DEMANDS = ("margin", "threshold", "equals")
KINDS = ("mean", "rectified", "worst_of", "cvar")
OPTIONS = ("alpha", "level")
FORMS = (
    "Expected COLUMN:margin=NUMBER (or threshold=, equals=), and for a tail COLUMN:margin=NUMBER,of=cvar,alpha=0.1 or "
    "COLUMN:margin=NUMBER,of=rectified,level=NUMBER or COLUMN,COLUMN:margin=NUMBER,of=worst_of."
)


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
    return click.option("--scores", type=LOCAL_PATH, help="A Parquet, Arrow or JSONL table with prompt_id.")(command)


def write_json(path: str | None, record: dict[str, Any]) -> None:
    """Write ``record`` to a path, or to standard output for '-'; None writes nothing."""
    if path == "-":
        click.echo(json.dumps(record, indent=1, allow_nan=False))
    elif path is not None:
        from can_dist.tables.artifacts import write_json

        write_json(Path(path), record)


def read_scores(path: Path, reward: str, columns: Sequence[Column], prompts_path: Path | None = None) -> Scores:
    """Read the scores of a table and make the utilities of ``columns`` from them, refusing missing ones by name."""
    import numpy as np

    from can_dist.config.explain import nearest
    from can_dist.dual import Column, source_column
    from can_dist.tables.score_shards import check_complete, column_names, id_hashes
    from can_dist.tables.scores import Scores, check_distinct, read_score_table, score_arrays

    wanted = [Column(reward, (reward,)), *columns]
    named = list(dict.fromkeys(source for column in wanted for source in column.sources))
    there, table = column_names(path), None
    if not there:
        table = read_score_table(path, named)
        there = table.column_names
    for name in ("prompt_id", *named):
        if source_column(name, there)[0] not in there:
            raise DataError(f"{path}: no column {name!r}.{nearest(name, there)} Columns found: {', '.join(there)}.")
    first, *others = ([source_column(name, there)[0] for name in column.sources] for column in wanted)
    check_distinct(first[0], list(chain(*others)), str(path))
    sources = list(dict.fromkeys(chain(first, *others)))
    if table is None:
        table = read_score_table(path, sources)
    if prompts_path is not None:
        expected = read_score_table(prompts_path).column("prompt_id")
        check_complete(path, id_hashes(table.column("prompt_id")), id_hashes(expected))
    arrays = score_arrays(table, sources[0], sources[1:], str(path))
    by_name = dict(zip(sources, [arrays.reward_N, *arrays.utility_NJ.T], strict=True))
    reward_N, *utilities = (column.read(by_name) for column in wanted)
    return Scores(arrays.prompt_N, reward_N, np.stack(utilities, axis=1))


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


def parse_constraint(text: str) -> tuple[Column, Margin]:
    """Return the utility that a text such as 'safety:margin=0.2,of=cvar,alpha=0.1' names, and what it demands."""
    from can_dist.dual import Margin

    column, given = _parse(text)
    demands = {key: value for key, value in given.items() if key in DEMANDS}
    if len(demands) > 1:
        raise ConfigError(
            f"--constraint {text}: given both as {' and as '.join(demands)}.", "Leave all of them out but one."
        )
    if not demands:
        raise ConfigError(f"--constraint {text}: no demand.", FORMS)
    ((kind, number),) = demands.items()
    if kind == "threshold":
        return column, Margin(column.name, threshold=number)
    return column, Margin(column.name, margin=number, equal=kind == "equals")


def parse_column(text: str) -> Column:
    """Return the utility that a text such as 'safety' or 'safety:of=rectified,level=0' names; a demand is refused."""
    column, given = _parse(text)
    if demands := [key for key in given if key in DEMANDS]:
        raise ConfigError(
            f"--constraint {text}: the frontier goes through every margin and needs none.",
            f"Give --constraint {text.rpartition(':')[0]}; leave out {demands[0]}, which can-dist solve takes.",
        )
    return column


def _parse(text: str) -> tuple[Column, dict[str, float]]:
    from can_dist.dual import Column

    name, _, rest = text.rpartition(":") if "=" in text.rpartition(":")[2] else (text, "", "")
    pairs = [part.partition("=") for part in rest.split(",") if rest]
    given = {key: value for key, _, value in pairs}
    is_twice = len(given) < len(pairs)
    if "fall" in given:
        both = [key for key in DEMANDS if key in given]
        words = f"given both as {both[0]} and as fall" if both else "fall is no demand"
        raise ConfigError(
            f"--constraint {text}: {words}.", f"That a cost falls by B is --constraint -{name.lstrip('-')}:margin=B."
        )
    of = given.pop("of", "mean")
    if is_twice or not name or of not in KINDS or not given.keys() <= {*DEMANDS, *OPTIONS}:
        raise ConfigError(f"--constraint {text}: not understood.", FORMS)
    numbers = {}
    for key, value in given.items():
        try:
            numbers[key] = float(value)
        except ValueError:
            raise ConfigError(f"--constraint {text}: {key} {value!r} is not a number.", FORMS) from None
    sources = tuple(name.split(",")) if of == "worst_of" else (name,)
    options = {key: numbers[key] for key in OPTIONS if key in numbers}
    return Column(name if of == "mean" else f"{of}({name})", sources, of=of, **options), numbers  # type: ignore[arg-type]
