"""The commands about the dual alone: ``solve`` a table or a run, and its whole ``frontier``."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli_run import check_output, given, read_config, run_options, run_until
from can_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from can_dist.dual import Frontier, Margin
    from can_dist.tables.scores import Scores

DEMANDS = ("margin", "threshold", "equals")
ENGINES = ("memory", "stream", "ray")
MEMORY_BYTES = 10**9
ESTIMATORS = ("empirical", "jackknife", "gaussian", "auto")


def score_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what names a score table and its columns."""
    command = click.option("--beta", type=float, help="KL weight β.")(command)
    command = click.option("--reward", help="Column of the reward.")(command)
    return click.option(
        "--scores", type=click.Path(path_type=Path), help="A Parquet, Arrow or JSONL table with prompt_id."
    )(command)


@click.command()
@run_options(required=False)
@score_options
@click.option(
    "--constraint",
    "constraints",
    multiple=True,
    metavar="COL:margin=B",
    help="At least B over the reference mean; COL:threshold=T for an absolute level, COL:equals=B to improve by "
    "exactly B. May be repeated.",
)
@click.option("--estimator", type=click.Choice(ESTIMATORS), help="How λ* is estimated; default empirical.")
@click.option("--confidence", type=float, help="Raise the margins so that all are met with this confidence, e.g. 0.95.")
@click.option(
    "--as-published", is_flag=True, help="Also solve by the rules of the paper's code, and show both. One threshold."
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="memory: the whole table at once; stream: shard after shard; ray: shards as tasks on the cluster of "
    "RAY_ADDRESS. Default: memory up to 1 GB of files, then stream. All give the same numbers.",
)
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    help="A table whose prompt_id are those that must be scored, no more and no fewer.",
)
@click.option("--report", "report_path", metavar="PATH", help="Write an HTML page: can the prediction be believed?")
@click.option("--json", "json_path", metavar="PATH|-", help="Write the solution as JSON; - for standard output.")
def solve(
    config: str | None,
    config_option: str | None,
    run_dir: Path | None,
    overrides: tuple[str, ...],
    scores: Path | None,
    reward: str | None,
    beta: float | None,
    constraints: tuple[str, ...],
    estimator: str | None,
    confidence: float | None,
    as_published: bool,
    engine: str | None,
    prompts_path: Path | None,
    report_path: str | None,
    json_path: str | None,
) -> None:
    """Solve the dual of a score table (--scores ...), or of a run (CONFIG --run DIR)."""
    named = {"--reward": reward, "--constraint": constraints, "--beta": beta}
    options = {"--estimator": estimator, "--confidence": confidence}
    outputs = {"--engine": engine, "--prompts": prompts_path, "--report": report_path, "--json": json_path}
    if scores is None:
        if run_dir is None:
            raise ConfigError(
                "solve needs --scores FILE --reward COL --constraint COL:margin=B --beta X, or CONFIG --run DIR."
            )
        _only_config("solve", given({**named, **options, "--as-published": as_published, **outputs}))
        artifact = run_until(run_dir, read_config(config, config_option, overrides), "solve")
        click.echo(str(artifact.path))
        return
    _only_scores("solve", config, config_option, run_dir, overrides)
    if reward is None or beta is None or not constraints:
        raise ConfigError(f"solve --scores also needs {', '.join(_missing(named))}.")
    if as_published and given(options):
        raise ConfigError(
            f"--as-published is the solver of the paper's code, which has neither estimators nor confidence: leave out "
            f"{' and '.join(given(options))}, or --as-published."
        )
    check_output("--json", json_path)
    check_output("--report", report_path)
    margins = [_parse_constraint(text) for text in constraints]
    engine = engine or ("memory" if _size(scores) <= MEMORY_BYTES else "stream")
    if engine == "memory":
        arrays = _read_scores(scores, reward, [margin.name for margin in margins], prompts_path)
        record, text = _solve_arrays(
            arrays, margins, beta, estimator or "empirical", confidence, as_published, report_path
        )
    else:
        needs = given({"--as-published": as_published, "--report": report_path})
        if needs:
            raise ConfigError(f"{' and '.join(needs)}: the table must be in memory for it; give --engine memory.")
        record, text = _solve_shards(scores, reward, margins, beta, estimator, confidence, engine, prompts_path)
    _write_json(json_path, record)
    if json_path != "-":
        click.echo(text)


def _solve_arrays(
    arrays: Scores,
    margins: Sequence[Margin],
    beta: float,
    estimator: str,
    confidence: float | None,
    as_published: bool,
    report_path: str | None,
) -> tuple[dict[str, Any], str]:
    """Return the JSON record and the text of the solution; writes the page of diagnostics where asked."""
    from can_dist.cli_text import comparison_text, solution_text
    from can_dist.dual import ScoreTable, solve_table
    from can_dist.dual.published import solve_as_published

    names = [margin.name for margin in margins]
    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=names)
    if as_published:
        found = solve_as_published(table, beta=beta, constraints=margins)
        return found.to_dict(), comparison_text(found)
    solution = solve_table(table, beta=beta, constraints=margins, estimator=estimator, confidence=confidence)
    if report_path is not None:
        from can_dist.reporting.diagnostics import write_diagnostics

        write_diagnostics(table, solution, Path(report_path))
    return solution.to_dict(), solution_text(solution)


def _solve_shards(
    scores: Path,
    reward: str,
    margins: Sequence[Margin],
    beta: float,
    estimator: str | None,
    confidence: float | None,
    engine: str,
    prompts_path: Path | None,
) -> tuple[dict[str, Any], str]:
    """Solve without holding the table: in this process, or as Ray tasks."""
    from can_dist.cli_text import solution_text
    from can_dist.config import Cluster
    from can_dist.dual import solve_table
    from can_dist.stages.passes import big_scores
    from can_dist.tables.scores import read_score_table

    ids = None if prompts_path is None else read_score_table(prompts_path).column("prompt_id")
    columns = [reward, *(margin.name for margin in margins)]
    with big_scores(scores, columns, cluster=Cluster() if engine == "ray" else None, prompt_ids=ids) as table:
        solution = solve_table(
            table, beta=beta, constraints=margins, estimator=estimator or "empirical", confidence=confidence
        )
    return solution.to_dict(), solution_text(solution)


def _size(path: Path) -> int:
    """Bytes of a table's files; 0 where there are none, which reading will say."""
    from can_dist.tables.scores import score_files

    return sum(file.stat().st_size for file in score_files(path)) if path.exists() else 0


@click.command()
@run_options(required=False)
@score_options
@click.option(
    "--constraint", "constraints", multiple=True, metavar="COL", help="Column of a utility; give one, or two for a map."
)
@click.option(
    "--points", type=click.IntRange(min=2), help="Points of the curve, default 50; of the whole map for two, 400."
)
@click.option("--lam-max", type=float, help="End the curve at this λ; default: near the most attainable margin.")
@click.option("--csv", "csv_path", metavar="PATH", help="Write every number as CSV.")
@click.option("--json", "json_path", metavar="PATH|-", help="Write every number as JSON; - for standard output.")
@click.option("--plot", "plot_path", metavar="PATH", help="Draw it: .svg, .pdf or .png.")
def frontier(
    config: str | None,
    config_option: str | None,
    run_dir: Path | None,
    overrides: tuple[str, ...],
    scores: Path | None,
    reward: str | None,
    beta: float | None,
    constraints: tuple[str, ...],
    points: int | None,
    lam_max: float | None,
    csv_path: str | None,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Every margin's λ*, reward and KL at once, of a score table (--scores ...) or of a run (CONFIG --run DIR)."""
    _check_frontier_options(constraints, lam_max)
    for option, path in (("--csv", csv_path), ("--json", json_path), ("--plot", plot_path)):
        check_output(option, path)
    if plot_path is not None:
        from can_dist.reporting.frontier_plot import check_format

        check_format(Path(plot_path))
    if scores is None:
        if run_dir is None:
            raise ConfigError(
                "frontier needs --scores FILE --reward COL --constraint COL --beta X, or CONFIG --run DIR."
            )
        _only_config("frontier", given({"--reward": reward, "--beta": beta}))
        settings = read_config(config, config_option, overrides)
        names, beta = _constraints_of_run(constraints, list(settings.constraints)), settings.beta
        arrays = _read_scores(run_until(run_dir, settings, "score").path, "reward", names)
    else:
        _only_scores("frontier", config, config_option, run_dir, overrides)
        if reward is None or beta is None or not constraints:
            named = {"--reward": reward, "--constraint": constraints, "--beta": beta}
            raise ConfigError(f"frontier --scores also needs {', '.join(_missing(named))}.")
        names = list(constraints)
        arrays = _read_scores(scores, reward, names)
    curve = _trace(arrays, names, beta, points or (50 if len(names) == 1 else 400), lam_max)
    _write_frontier(curve, csv_path, json_path, plot_path)


def _check_frontier_options(constraints: Sequence[str], lam_max: float | None) -> None:
    for text in constraints:
        name, colon, demand = text.rpartition(":")
        if colon and demand.partition("=")[0] in DEMANDS:
            raise ConfigError(
                f"--constraint {text}: the frontier goes through every margin and needs none. "
                f"Give --constraint {name}; can-dist solve takes a margin."
            )
    if len(constraints) > 2:
        raise ConfigError(
            f"--constraint: {len(constraints)} given, {', '.join(constraints)}; a frontier is that of one or two. "
            "Leave some out."
        )
    if len(set(constraints)) < len(constraints):
        raise ConfigError(f"--constraint {constraints[0]} is given twice. Name two different columns.")
    if lam_max is not None and not (lam_max > 0 and math.isfinite(lam_max)):
        raise ConfigError(f"--lam-max: found {lam_max}, expected a positive finite number.")
    if lam_max is not None and len(constraints) > 1:
        raise ConfigError("--lam-max ends the curve of one constraint; leave it out for two.")


def _constraints_of_run(asked: Sequence[str], configured: list[str]) -> list[str]:
    """Return the constraints to trace: those asked for, else all of the configuration if there are one or two."""
    for name in asked:
        if name not in configured:
            raise ConfigError(
                f"--constraint {name}: not in the configuration.{_nearest(name, configured)} It has "
                f"{', '.join(configured)}."
            )
    if not asked and len(configured) > 2:
        raise ConfigError(
            f"frontier: the configuration has {len(configured)} constraints ({', '.join(configured)}); choose one or "
            "two with --constraint NAME. The others are then left out, as if they asked for nothing."
        )
    return list(asked) or configured


def _trace(arrays: Scores, names: Sequence[str], beta: float, num_points: int, lam_max: float | None) -> Frontier:
    import numpy as np

    from can_dist.dual import ScoreTable, frontier_table, predict

    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=names)
    if lam_max is None:
        return frontier_table(table, beta=beta, names=names, num_points=num_points)
    if len(names) > 1:
        raise ConfigError("--lam-max ends the curve of one constraint; choose one with --constraint, or leave it out.")
    first, last = (float(predict(table, [lam], beta, [0.0]).improvement_J[0]) for lam in (0.0, lam_max))
    return frontier_table(table, beta=beta, names=names, margins=np.linspace(first, last, num_points))


def _write_frontier(curve: Frontier, csv_path: str | None, json_path: str | None, plot_path: str | None) -> None:
    from can_dist.cli_text import frontier_text
    from can_dist.tables.artifacts import atomic_file

    if csv_path is not None:
        import csv

        rows = curve.rows()
        with (
            atomic_file(Path(csv_path)) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if plot_path is not None:
        from can_dist.reporting.frontier_plot import draw_frontier

        with atomic_file(Path(plot_path)) as temporary:
            draw_frontier(curve, temporary, Path(plot_path).suffix[1:])
    _write_json(json_path, curve.to_dict())
    if json_path != "-":
        click.echo(frontier_text(curve))


def _write_json(path: str | None, record: dict[str, Any]) -> None:
    if path == "-":
        click.echo(json.dumps(record, indent=1, allow_nan=False))
    elif path is not None:
        from can_dist.tables.artifacts import write_json

        write_json(Path(path), record)


def _read_scores(path: Path, reward: str, names: Sequence[str], prompts_path: Path | None = None) -> Scores:
    from can_dist.tables.score_shards import check_complete, id_hashes
    from can_dist.tables.scores import read_score_table, score_arrays, source_column

    table = read_score_table(path)
    for name in ("prompt_id", reward, *names):
        if source_column(name, table.column_names)[0] not in table.column_names:
            raise DataError(
                f"{path}: no column {name!r}.{_nearest(name, table.column_names)} Columns found: "
                f"{', '.join(table.column_names)}."
            )
    if prompts_path is not None:
        expected = read_score_table(prompts_path).column("prompt_id")
        check_complete(path, id_hashes(table.column("prompt_id")), id_hashes(expected))
    return score_arrays(table, reward, names, str(path))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _only_config(verb: str, extra: Sequence[str]) -> None:
    if extra:
        raise ConfigError(
            f"{verb} CONFIG --run DIR takes what it needs from the configuration; change that by --set KEY=VALUE. "
            f"Leave out {', '.join(extra)}, or give --scores."
        )


def _only_scores(
    verb: str, config: str | None, config_option: str | None, run_dir: Path | None, overrides: tuple[str, ...]
) -> None:
    if config or config_option or run_dir or overrides:
        raise ConfigError(f"{verb} takes either --scores and its options, or CONFIG --run DIR, not both.")


def _missing(named: dict[str, Any]) -> list[str]:
    there = given(named)
    return [name for name in named if name not in there]


def _parse_constraint(text: str) -> Margin:
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
