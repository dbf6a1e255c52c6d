"""The commands about the dual alone: ``solve`` a table or a run, and its whole ``frontier``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import LOCAL_PATH, check_output, given, read_config, run_options, run_until
from can_dist.console import folded
from can_dist.errors import ConfigError, NotBelieved

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.dual import Column, Margin
    from can_dist.tables.scores import Scores
from can_dist.cli.scores import (
    ScoreCommand,
    missing,
    only_config,
    only_scores,
    parse_constraint,
    read_scores,
    score_options,
    write_json,
)

ENGINES = ("memory", "stream", "ray")
MEMORY_BYTES = 10**8
"""Larger files are streamed: from about there on that is faster as well as smaller (docs/dual.md, engines)."""

ESTIMATORS = ("empirical", "jackknife", "gaussian", "auto")


@click.command(cls=ScoreCommand)
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
@click.option("--estimator", type=click.Choice(ESTIMATORS), help="How λ* is estimated; default auto: the jackknife.")
@click.option("--confidence", type=float, help="Raise the margins so that all are met with this confidence, e.g. 0.95.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="memory: the whole table at once; stream: shard after shard; ray: shards as tasks on the cluster of "
    "RAY_ADDRESS. Default: memory up to 100 MB of files, then stream. All give the same numbers.",
)
@click.option(
    "--prompts",
    "prompts_path",
    type=LOCAL_PATH,
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
    engine: str | None,
    prompts_path: Path | None,
    report_path: str | None,
    json_path: str | None,
) -> None:
    """Solve the dual of a score table (--scores ...), or of a run (CONFIG --run DIR)."""
    named = {"--reward": reward, "--constraint": constraints, "--beta": beta}
    options = {"--estimator": estimator, "--confidence": confidence}
    reading = {"--engine": engine, "--prompts": prompts_path}
    if scores is None:
        if run_dir is None:
            raise ConfigError(
                "solve needs --scores FILE --reward COL --constraint COL:margin=B --beta X, or CONFIG --run DIR."
            )
        only_config("solve", given({**named, **options, **reading}))
        _solve_run(run_dir, read_config(config, config_option, overrides), report_path, json_path)
        return
    only_scores("solve", config, config_option, run_dir, overrides)
    if reward is None or beta is None or not constraints:
        raise ConfigError(f"solve --scores also needs {', '.join(missing(named))}.")
    check_output("--json", json_path)
    check_output("--report", report_path)
    columns, margins = zip(*map(parse_constraint, constraints), strict=True)
    tails = [column.name for column in columns if column.of == "cvar"]
    engine = engine or _engine(scores, needs_table=bool(report_path or tails) or estimator == "gaussian")
    if engine == "memory":
        arrays = read_scores(scores, reward, columns, prompts_path)
        record, text = _solve_arrays(arrays, columns, margins, beta, estimator or "auto", confidence, report_path)
    else:
        if report_path is not None or tails:
            needed = "--report" if report_path is not None else tails[0]
            raise ConfigError(f"{needed}: the table must be in memory for it; give --engine memory.")
        record, text = _solve_shards(
            scores, reward, columns, margins, beta, estimator, confidence, engine, prompts_path
        )
    write_json(json_path, record)
    if json_path != "-":
        click.echo(folded(text, sys.stdout))


def _solve_run(run_dir: Path, settings: Config, report_path: str | None, json_path: str | None) -> None:
    """Run up to the solution, and give its page and its record, also of one that is not believed."""
    check_output("--json", json_path)
    check_output("--report", report_path)
    from can_dist.stages.belief import belief_page
    from can_dist.tables.artifacts import write_text
    from can_dist.workspace import BELIEF, SOLUTION

    try:
        artifact = run_until(run_dir, settings, "solve")
    except NotBelieved:
        if report_path is not None:
            write_text(Path(report_path), (run_dir / BELIEF).read_text(encoding="utf-8"))
        raise
    if report_path is not None:
        write_text(Path(report_path), belief_page(artifact).read_text(encoding="utf-8"))
    write_json(json_path, artifact.read_json(SOLUTION))
    if json_path != "-":
        click.echo(str(artifact.path))


def _solve_arrays(
    arrays: Scores,
    columns: Sequence[Column],
    margins: Sequence[Margin],
    beta: float,
    estimator: str,
    confidence: float | None,
    report_path: str | None,
) -> tuple[dict[str, Any], str]:
    """Return the JSON record and the text of the solution; writes the page of diagnostics where asked."""
    import numpy as np

    from can_dist.cli.text import solution_text, tail_lines
    from can_dist.dual import ScoreTable, settle, solve_table

    names = [margin.name for margin in margins]
    settled = settle(columns, margins, arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, beta=beta)
    utilities = [
        column.values([value_N]) if column.tau is not None else value_N
        for column, value_N in zip(settled.columns, arrays.utility_NJ.T, strict=True)
    ]
    table = ScoreTable.build(arrays.reward_N, np.stack(utilities, axis=1), arrays.prompt_N, names=names)
    solution = solve_table(
        table, beta=beta, constraints=settled.constraints, estimator=estimator, confidence=confidence
    )
    if report_path is not None:
        from can_dist.reporting.belief_page import write_diagnostics

        write_diagnostics(table, solution, Path(report_path))
    text = solution_text(solution, [margin.name for margin in margins if margin.equal])
    derived = any(column.of != "mean" for column in columns)
    record = solution.to_dict() | ({"columns": settled.to_dict()} if derived else {})
    return record, "\n".join([text, *tail_lines(settled)])


def _solve_shards(
    scores: Path,
    reward: str,
    columns: Sequence[Column],
    margins: Sequence[Margin],
    beta: float,
    estimator: str | None,
    confidence: float | None,
    engine: str,
    prompts_path: Path | None,
) -> tuple[dict[str, Any], str]:
    """Solve without holding the table: in this process, or as Ray tasks."""
    from can_dist.cli.text import solution_text
    from can_dist.cluster.big_scores import big_scores
    from can_dist.config import Cluster
    from can_dist.dual import solve_table
    from can_dist.tables.scores import read_score_table

    ids = None if prompts_path is None else read_score_table(prompts_path).column("prompt_id")
    with big_scores(
        scores, [reward, *columns], cluster=Cluster() if engine == "ray" else None, prompt_ids=ids
    ) as table:
        solution = solve_table(
            table, beta=beta, constraints=margins, estimator=estimator or "auto", confidence=confidence
        )
    return solution.to_dict(), solution_text(solution, [margin.name for margin in margins if margin.equal])


def _engine(path: Path, *, needs_table: bool) -> str:
    """Return the engine for a table: memory for what is small, for what cannot be streamed, and where no file is."""
    from can_dist.tables.json_rows import is_json
    from can_dist.tables.scores import score_files

    files = score_files(path) if path.exists() and not needs_table else []
    if not files or is_json(files[0]) or sum(file.stat().st_size for file in files) <= MEMORY_BYTES:
        return "memory"
    return "stream"
