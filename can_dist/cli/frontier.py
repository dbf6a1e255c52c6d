"""``can-dist frontier``: every margin's λ*, reward and KL."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import check_output, given, read_config, run_options, run_until
from can_dist.errors import ConfigError

if TYPE_CHECKING:
    from can_dist.dual import Column, Frontier
    from can_dist.tables.scores import Scores
from can_dist.cli.scores import (
    ScoreCommand,
    missing,
    only_config,
    only_scores,
    parse_column,
    read_scores,
    score_options,
    write_json,
)


@click.command(cls=ScoreCommand)
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
@click.option("--realised", is_flag=True, help="What the finished run CONFIG, a directory, reaches without training.")
@click.option("--report", "report_path", metavar="PATH", help="--realised: write a page with a slider over the margin.")
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
    realised: bool,
    report_path: str | None,
) -> None:
    """Every margin's λ*, reward and KL at once, of a score table (--scores ...) or of a run (CONFIG --run DIR).

    With --realised, of a finished run (RUN --realised): beside them what its policies reach without another training.
    """
    from can_dist.stages.utilities import columns_of

    if realised or report_path is not None:
        others: dict[str, Any] = {
            "--run": run_dir,
            "--config": config_option,
            "--set": overrides,
            "--scores": scores,
            "--csv": csv_path,
        }
        others |= {"--reward": reward, "--beta": beta, "--constraint": constraints, "--points": points}
        _check_realised(realised, given(others | {"--lam-max": lam_max, "--plot": plot_path}))
        write_realised(config, json_path, report_path)
        return
    _check_frontier_options(constraints, lam_max)
    for option, path in (("--csv", csv_path), ("--json", json_path), ("--plot", plot_path)):
        check_output(option, path)
    if plot_path is not None:
        from can_dist.reporting.figures.frontier import check_format

        check_format(Path(plot_path))
    if scores is None:
        if run_dir is None:
            raise ConfigError(
                "frontier needs --scores FILE --reward COL --constraint COL --beta X, or CONFIG --run DIR."
            )
        only_config("frontier", given({"--reward": reward, "--beta": beta}))
        settings = read_config(config, config_option, overrides)
        names, beta = _constraints_of_run(constraints, list(settings.constraints)), settings.beta
        columns = list(columns_of({name: settings.constraints[name] for name in names}))
        _check_tails(columns, lam_max)
        arrays = read_scores(run_until(run_dir, settings, "score").path, "reward", columns)
    else:
        only_scores("frontier", config, config_option, run_dir, overrides)
        if reward is None or beta is None or not constraints:
            named = {"--reward": reward, "--constraint": constraints, "--beta": beta}
            raise ConfigError(f"frontier --scores also needs {', '.join(missing(named))}.")
        columns = [parse_column(text) for text in constraints]
        _check_tails(columns, lam_max)
        arrays = read_scores(scores, reward, columns)
    curve = _trace(arrays, columns, beta, points or (50 if len(columns) == 1 else 400), lam_max)
    _write_frontier(curve, columns, csv_path, json_path, plot_path)


def _check_realised(realised: bool, others: Sequence[str]) -> None:
    if not realised:
        raise ConfigError("--report: the page of what a run reaches.", "Give it with --realised.")
    if others:
        raise ConfigError(f"--realised: reads all of a finished run; leave out {', '.join(others)}.")


def write_realised(run: str | None, json_path: str | None, report_path: str | None) -> None:
    """Print what a finished run reaches without another training; write it as JSON and as a page where asked for."""
    from can_dist.cli.text import reach_text
    from can_dist.tables.artifacts import write_text

    if run is None or not Path(run).is_dir():
        raise ConfigError(f"frontier --realised: {run or 'nothing'} is no run directory.", "Give RUN --realised.")
    for option, path in (("--json", json_path), ("--report", report_path)):
        check_output(option, path)
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.reach import reach

        record = reach(Path(run))
    if report_path is not None:
        from can_dist.reporting.reach_page import render_reach

        write_text(Path(report_path), render_reach(record))
    write_json(json_path, record)
    if json_path != "-":
        click.echo(reach_text(record))


def _check_frontier_options(constraints: Sequence[str], lam_max: float | None) -> None:
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


def _constraints_of_run(chosen: Sequence[str], configured: list[str]) -> list[str]:
    """Return the constraints to trace: those asked for, else all of the configuration if there are one or two."""
    from can_dist.config.explain import nearest

    for name in chosen:
        if name not in configured:
            raise ConfigError(
                f"--constraint {name}: not in the configuration.{nearest(name, configured)} It has "
                f"{', '.join(configured)}."
            )
    if not chosen and len(configured) > 2:
        raise ConfigError(
            f"frontier: the configuration has {len(configured)} constraints ({', '.join(configured)}); choose one or "
            "two with --constraint NAME. The others are then left out, as if they asked for nothing."
        )
    return list(chosen) or configured


def _check_tails(columns: Sequence[Column], lam_max: float | None) -> None:
    """Refuse what a CVaR has no curve over: two constraints, and λ."""
    tails = [column.name for column in columns if column.of == "cvar"]
    if tails and len(columns) > 1:
        raise ConfigError(
            f"{tails[0]}: every margin of a CVaR has its own tau, so a map of two constraints would be a search at "
            "every point.",
            "Give --constraint once, and can-dist solve both margins.",
        )
    if tails and lam_max is not None:
        raise ConfigError(f"--lam-max: the curve of a CVaR ({tails[0]}) goes over margins; leave it out.")


def _trace(arrays: Scores, columns: Sequence[Column], beta: float, num_points: int, lam_max: float | None) -> Frontier:
    import numpy as np

    from can_dist.dual import ScoreTable, frontier_table, predict, tail_frontier

    names = [column.name for column in columns]
    if columns[0].of == "cvar":
        return tail_frontier(
            columns[0], arrays.reward_N, arrays.utility_NJ[:, 0], arrays.prompt_N, beta=beta, num_points=num_points
        )
    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=names)
    if lam_max is None:
        return frontier_table(table, beta=beta, names=names, num_points=num_points)
    if len(names) > 1:
        raise ConfigError("--lam-max ends the curve of one constraint; choose one with --constraint, or leave it out.")
    first, last = (float(predict(table, [lam], beta, [0.0]).improvement_J[0]) for lam in (0.0, lam_max))
    return frontier_table(table, beta=beta, names=names, margins=np.linspace(first, last, num_points))


def _write_frontier(
    curve: Frontier, columns: Sequence[Column], csv_path: str | None, json_path: str | None, plot_path: str | None
) -> None:
    from can_dist.cli.text import frontier_text
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
        from can_dist.reporting.figures.frontier import draw_frontier

        with atomic_file(Path(plot_path)) as temporary:
            draw_frontier(curve, temporary, Path(plot_path).suffix[1:])
    write_json(json_path, curve.to_dict())
    if json_path != "-":
        lines = [f"tail      {made.name}: the mean is that of {made.words}" for made in columns if made.words]
        click.echo("\n".join([frontier_text(curve), *lines]))
