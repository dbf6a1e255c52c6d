"""The command line. Heavy packages are imported inside the commands, so help and configuration errors are quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from can_dist.errors import CanDistError, ConfigError, DataError, Interrupted

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or configuration, 3 bad data, 4 infeasible, 5 numerical, 6 environment, "
    "75 interrupted (run again)."
)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="can-dist")
def cli() -> None:
    """Make a language model safer by a stated amount in one fine-tuning run."""


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every stage takes: the configuration, the run directory, overrides."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key, e.g. constraints.safety.margin=2.",
    )(command)
    command = click.option(
        "--run", "run_dir", required=True, type=click.Path(path_type=Path), help="Run directory; made if absent."
    )(command)
    command = click.option("--config", "config_option", metavar="FILE", help="The same as the argument CONFIG.")(
        command
    )
    return click.argument("config", required=False)(command)


def _config_path(config: str | None, config_option: str | None) -> str:
    if (config is None) == (config_option is None):
        raise ConfigError("give the configuration file once: can-dist VERB CONFIG --run DIR.")
    return str(config or config_option)


def _run_until(
    config: str | None, config_option: str | None, run_dir: Path, overrides: tuple[str, ...], until: str
) -> None:
    from can_dist.config import load_config

    settings = load_config(_config_path(config, config_option), overrides)
    from can_dist.pipeline import run_pipeline

    artifact = run_pipeline(run_dir, settings, until)
    click.echo(str(artifact.path))


@cli.command()
@run_options
def run(config: str | None, config_option: str | None, run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Run the whole method: generate, score, solve, label, train, evaluate. Run again to continue or to change."""
    _run_until(config, config_option, run_dir, overrides, "evaluate")


def _stage_command(stage: str, text: str) -> None:
    @cli.command(stage, help=text)
    @run_options
    def command(config: str | None, config_option: str | None, run_dir: Path, overrides: tuple[str, ...]) -> None:
        _run_until(config, config_option, run_dir, overrides, stage)


_stage_command("generate", "Sample K responses per prompt from the reference.")
_stage_command("score", "Score the responses, and their log-probability under the reference.")
_stage_command("label", "Label pairs of responses with λ*.")
_stage_command("train", "Fine-tune the reference once on the labelled pairs.")
_stage_command("evaluate", "Measure the policy on held-out prompts and write the report.")


@cli.command()
@click.argument("config", required=False)
@click.option("--config", "config_option", metavar="FILE", help="The same as the argument CONFIG.")
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Run directory, with --config.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a configuration key.")
@click.option("--scores", type=click.Path(path_type=Path), help="A Parquet, Arrow or JSONL table with prompt_id.")
@click.option("--reward", help="Column of the reward.")
@click.option(
    "--constraint", "constraints", multiple=True, metavar="COL:margin=B", help="Or COL:threshold=T. May be repeated."
)
@click.option("--beta", type=float, help="KL weight β.")
@click.option("--json", "json_path", metavar="PATH|-", help="Write the solution as JSON; - for standard output.")
def solve(
    config: str | None,
    config_option: str | None,
    run_dir: Path | None,
    overrides: tuple[str, ...],
    scores: Path | None,
    reward: str | None,
    constraints: tuple[str, ...],
    beta: float | None,
    json_path: str | None,
) -> None:
    """Solve the dual of a score table (--scores ...), or of a run (CONFIG --run DIR)."""
    if scores is None:
        if run_dir is None:
            raise ConfigError(
                "solve needs --scores FILE --reward COL --constraint COL:margin=B --beta X, or CONFIG --run DIR."
            )
        _run_until(config, config_option, run_dir, overrides, "solve")
        return
    if config or config_option or run_dir or overrides:
        raise ConfigError("solve takes either --scores and its options, or CONFIG --run DIR, not both.")
    given = {"--reward": reward, "--constraint": constraints or None, "--beta": beta}
    if reward is None or beta is None or not constraints:
        missing = [name for name, value in given.items() if value is None]
        raise ConfigError(f"solve --scores also needs {', '.join(missing)}.")
    if json_path not in (None, "-") and not Path(str(json_path)).absolute().parent.is_dir():
        raise ConfigError(f"--json {json_path}: no such directory {Path(str(json_path)).parent}. Make it first.")
    from can_dist.dual import solve_dual
    from can_dist.tables.scores import read_score_table, score_arrays

    margins = [_parse_constraint(text) for text in constraints]
    arrays = score_arrays(read_score_table(scores), reward, [margin.name for margin in margins], str(scores))
    solution = solve_dual(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, beta=beta, constraints=margins)
    text = json.dumps(solution.to_dict(), indent=1, allow_nan=False)
    if json_path == "-":
        click.echo(text)
        return
    if json_path is not None:
        from can_dist.tables.artifacts import atomic_file

        with atomic_file(Path(json_path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    click.echo(_solution_text(solution))


def _parse_constraint(text: str) -> Any:
    from can_dist.dual import Margin

    name, colon, demand = text.rpartition(":")
    kind, equals, value = demand.partition("=")
    if not (name and colon and equals) or kind not in ("margin", "threshold"):
        raise ConfigError(f"--constraint {text}: expected COLUMN:margin=NUMBER or COLUMN:threshold=NUMBER.")
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"--constraint {text}: {value!r} is not a number.") from None
    return Margin(name, margin=number if kind == "margin" else None, threshold=number if kind == "threshold" else None)


def _solution_text(solution: Any) -> str:
    lines = [f"status    {solution.status.name}: {solution.status.value}"]
    for name, lam in solution.lam.items():
        gain = solution.predicted["improvement"][name]
        lines.append(
            f"{name:9} lambda* {lam:.6g} (SE {solution.lam_se[name]:.2g}), margin {solution.margin[name]:.4g} over the "
            f"reference mean {solution.centre[name]:.4g}, predicted {gain['mean']:+.4g} (SE {gain['se']:.2g})"
        )
    predicted, diagnostics = solution.predicted, solution.diagnostics
    lines.append(f"reward    predicted {predicted['reward_improvement']:+.4g}; KL {predicted['kl']:.4g} nats")
    lines.append(
        f"weights   effective responses per prompt: median {diagnostics['ess']['median']:.1f} of "
        f"{diagnostics['responses_per_prompt']['median']:.0f}; KKT residual {solution.kkt_residual:.1e}"
    )
    return "\n".join([*lines, f"verdict   {diagnostics['verdict']}"])


@cli.command("config")
@click.argument("config", required=False)
@click.option("--schema", is_flag=True, help="Print every key with its type, default and meaning.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
def config_command(config: str | None, schema: bool, overrides: tuple[str, ...]) -> None:
    """Check CONFIG and print it resolved, or print all keys (--schema)."""
    from can_dist.config import Config, dump_yaml, load_config
    from can_dist.config_keys import format_keys

    if schema:
        click.echo(format_keys(Config))
    elif config is not None:
        click.echo(dump_yaml(load_config(config, overrides)), nl=False)
    else:
        raise ConfigError("config needs a FILE to check, or --schema to list all keys.")


@cli.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
def verify(run_dir: Path) -> None:
    """Check the digest of every file of a run, and that each artifact was made from what it says."""
    from can_dist.tables.artifacts import verify_run

    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory.")
    count, problems = verify_run(run_dir)
    if problems:
        raise DataError(f"{run_dir}: {len(problems)} problem(s) in {count} artifacts.\n  " + "\n  ".join(problems))
    if not count:
        raise DataError(f"{run_dir}: holds no finished artifact.")
    click.echo(f"{run_dir}: {count} artifacts, every digest and every input as recorded.")


@cli.command()
@click.option(
    "--run", "run_dir", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Run directory."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the demo.")
def demo(run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Make a small world and run MoCAN on it: no network, no GPU, no download, a few minutes."""
    from can_dist.demo import run_demo

    run_demo(run_dir, overrides)


def main() -> None:
    """Run the command line; every error of ours is one message and its exit code."""
    sys.path.append(str(Path.cwd()))  # a scorer given as module:function lies beside the configuration
    try:
        cli.main(standalone_mode=False)
    except (CanDistError, Interrupted) as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; finished work is kept, run again to continue.", err=True)
        sys.exit(Interrupted.exit_code)
