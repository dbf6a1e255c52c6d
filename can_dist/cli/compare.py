"""The commands that compare methods: ``compare``, ``judge``, and ``run --methods``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import LOCAL_PATH
from can_dist.errors import ConfigError

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.judging.endpoint import JudgeSpec


def run_and_compare(run_dir: Path, config: Config, names: str) -> None:
    """Run every method named in ``names`` (comma-separated) in one run directory, then compare them if several."""
    methods = [name.strip() for name in names.split(",")]
    if len(set(methods)) < len(methods) or not all(methods):
        raise ConfigError(f"--methods {names}: expected one or more different names, such as mocan,dpo_h,dpo_s.")
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.compare import compare as compare_evaluations
        from can_dist.pipeline import run_methods

        evaluations = run_methods(run_dir, config, methods)
        page = compare_evaluations(evaluations, run_dir) if len(methods) > 1 else None
    if page is None:
        click.echo("\n".join(str(evaluation.path) for evaluation in evaluations))
    else:
        _show(page)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=LOCAL_PATH)
@click.option("--out", type=LOCAL_PATH, help="Directory for the comparison; default: the first RUN.")
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Compare methods: gains, margins, KL, cost and wins of all evaluations in RUN, which may also be evaluations.

    Writes compare.html, compare.json and compare.svg. Refuses evaluations that differ in reference, held-out prompts,
    sampling or scorers.
    """
    from can_dist.outcomes.compare import compare as compare_evaluations
    from can_dist.outcomes.compare import find_evaluations

    evaluations = find_evaluations(runs)
    default = evaluations[0].path.parent
    _show(compare_evaluations(evaluations, out or default))


def _show(page: Path) -> None:
    """Print the key numbers as a table, and the page's path."""
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    rows = [("method", record["reward"], *record["methods"][0]["constraints"], "KL", "trainings", "")]
    for method in record["methods"]:
        gains = [_gain(method["gains"][score]) for score in (record["reward"], *method["constraints"])]
        verdicts = "; ".join(row["verdict"] for row in method["constraints"].values())
        rows.append(
            (method["name"], *gains, f"{method['kl']['mean']:.2f}", str(method["cost"]["num_trainings"]), verdicts)
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo(str(page))


def _gain(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"


@click.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
@click.option("--endpoint", required=True, metavar="URL", help="OpenAI-compatible, up to /v1: http://host:8000/v1.")
@click.option("--model", required=True, help="Model name as the endpoint knows it.")
@click.option("--criterion", required=True, type=click.Choice(["helpfulness", "safety"]), help="What is compared.")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the key; default: no key.")
@click.option("--concurrency", type=int, help="Requests in flight at once; default 8.")
@click.option("--estimate", is_flag=True, help="Print what it would cost, and stop.")
def judge(
    run_dir: Path,
    endpoint: str,
    model: str,
    criterion: str,
    key_env: str | None,
    concurrency: int | None,
    estimate: bool,
) -> None:
    """Let a language model compare each evaluated policy's responses in RUN with the reference's, in both orders.

    RUN is a run directory or one evaluation in it. Prints the cost first; verdicts are kept, so a rerun pays only for
    what is missing.
    """
    from can_dist.outcomes.compare import find_evaluations
    from can_dist.outcomes.judge import estimate as estimate_all
    from can_dist.outcomes.judge import judge as ask
    from can_dist.stages.report import method_title

    given = {"base_url": endpoint, "model": model, "criterion": criterion, "api_key_env": key_env}
    spec = _judge_spec(given | ({} if concurrency is None else {"concurrency": concurrency}))
    evaluations = find_evaluations([run_dir])
    cost = estimate_all(evaluations, spec)
    limit = "no limit on" if cost.completion_tokens is None else f"at most {cost.completion_tokens}"
    click.echo(
        f"can-dist: judge: {len(evaluations)} policies, {cost.requests} requests ({cost.cached} verdicts kept from "
        f"before), about {cost.prompt_tokens} prompt tokens, {limit} completion tokens.",
        err=True,
    )
    if estimate:
        return
    for evaluation in evaluations:
        path, summary = ask(evaluation, spec)
        title = method_title(evaluation.info["method"], evaluation.info["variant"])
        click.echo("\n".join([f"{title} against the reference, {criterion} by {model}:", *_lines(summary), str(path)]))


def _judge_spec(given: dict[str, Any]) -> JudgeSpec:
    from pydantic import ValidationError

    from can_dist.judging.endpoint import JudgeSpec

    options = {"base_url": "--endpoint", "api_key_env": "--key-env"}
    try:
        return JudgeSpec(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{options.get(name, f'--{name}')} {problem['input']}: {message}.") from None


def _lines(summary: dict[str, Any]) -> Sequence[str]:
    """Return the summary for people."""

    def rate(interval: dict[str, float]) -> str:
        return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"

    flips = "unknown" if summary["flip_rate"] is None else f"{summary['flip_rate']:.1%}"
    first = "unknown" if summary["first_rate"] is None else f"{summary['first_rate']:.1%}"
    return [
        f"  win rate {rate(summary['win_rate'])} on {summary['num_prompts']} prompts: {summary['wins']} wins, "
        f"{summary['ties']} ties, {summary['losses']} losses over both orders",
        f"  the policy's responses are {summary['length_difference']:+.0f} characters longer on average",
        f"  verdicts that flip with the order {flips}; decided for the one shown first {first} (unbiased: 50%)",
        f"  without a verdict {summary['no_verdict']}, refused by the endpoint {summary['rejected']}",
    ]
