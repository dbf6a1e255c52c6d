"""``can-dist init``: looks at what it is given, and writes the configuration that fits it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from can_dist.cli.options import LOCAL_PATH, check_output, given
from can_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from can_dist.config import DataSource
    from can_dist.doctor.case import Data

LEAST_PROMPTS = 10
NUM_TEST, NUM_VALIDATION, LEAST_VALIDATION = 64, 128, 32
NUM_RESPONSES, MAX_NEW_TOKENS = 16, 128
RATE_AT_7B, WIDTH_OF_7B = 1e-6, 4096
LARGEST_BATCH, LEAST_STEPS = 32, 40
NAMED = {"helpful": "reward", "safe": "safety"}


@click.command()
@click.argument("file", metavar="FILE", type=LOCAL_PATH)
@click.option("--data", required=True, metavar="FILE|ID", help="Prompts, pairs, responses, or a table of scores.")
@click.option("--reference", metavar="MODEL", help="The model to be made safer: a directory or hub id.")
@click.option("--reward", metavar="MODEL", help="A score model, or module:function; higher is better.")
@click.option("--safety", metavar="MODEL", help="A score model, guard or module:function; higher is safer.")
@click.option("--cost", metavar="MODEL", help="The same, of which more is worse; instead of --safety.")
@click.option("--template", help="For models without a chat template, e.g. 'USER: {prompt} ASSISTANT:'.")
@click.option("--split", default="train", show_default=True, help="Split of the data.")
@click.option("--subset", help="Subset of a data set of the hub.")
@click.option("--revision", help="Revision (a commit) of a data set of the hub.")
@click.option("--force", is_flag=True, help="Write over FILE.")
def init(
    file: Path,
    data: str,
    reference: str | None,
    reward: str | None,
    safety: str | None,
    cost: str | None,
    template: str | None,
    split: str,
    subset: str | None,
    revision: str | None,
    force: bool,
) -> None:
    """Look at the data and models named, and write FILE: a configuration that fits them, with every key explained.

    With --reward and --safety (or --cost) it learns from score models; with pairs that people labelled as helpful and
    as safe it needs no score model. For a table of scores it prints the command that solves it.
    """
    if file.exists() and not force:
        raise ConfigError(f"{file}: is there already.", "Give another name, or --force to write over it.")
    check_output("FILE", str(file))
    if safety is not None and cost is not None:
        raise ConfigError("--safety and --cost name the same score, once as gain and once as loss.", "Leave out one.")
    models = {"--reference": reference, "--reward": reward, "--safety": safety, "--cost": cost}
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.config import DataSource
        from can_dist.doctor.case import look_at_data
        from can_dist.tables.artifacts import write_text

        source = DataSource(source=data, split=split, subset=subset, revision=revision)
        seen = look_at_data(source)
        click.echo(seen.announcement, err=True)
        if seen.kind == "scores":
            command = solve_command(data, given(models))
        else:
            write_text(file, configuration(file, seen, source, models, template))
            click.echo(f"{file}: written. Read it, then:", err=True)
            command = f"can-dist doctor --config {file} --run RUN"
    click.echo(command)


HEAD = """\
# Written by `can-dist init`; every key is explained, and `can-dist config {file}` prints those left at their defaults.
#   can-dist doctor --config {file} --run RUN       looks at machine, models and data
#   can-dist run {file} --run RUN --until solve     ends before training, with a page that says whether to believe it
#   can-dist run {file} --run RUN                   the whole method, to the report
"""


def configuration(
    file: Path, seen: Data, source: DataSource, models: Mapping[str, str | None], template: str | None
) -> str:
    """Return the text of the configuration for data and models; every model is looked at, without its weights."""
    from can_dist.config import validate_config
    from can_dist.config.commented import commented_yaml
    from can_dist.doctor.case import language_model, score_model

    reference, reward, safety, cost = models.values()
    check_case(seen, source.source, reference, reward, safety or cost)
    raw, notes = settings(seen, source.model_dump(exclude_defaults=True), by_people=reward is None)
    raw["reference"], longest, width = language_model(str(reference), template)
    raw["generate"]["max_new_tokens"] = min(MAX_NEW_TOKENS, max(longest // 2, 1))
    raw["train"]["learning_rate"] = learning_rate(width)
    notes["train.learning_rate"] = (
        f"Peak learning rate of AdamW, by the model's width: {RATE_AT_7B:g} × {WIDTH_OF_7B} / {width} "
        "(docs/start.md). The log says how much of the way the training went; where that is little, take a higher one."
    )
    if reward is not None:
        raw["reward"] = score_model(reward, template, is_cost=False)
        raw["constraints"]["safety"]["scorer"] = score_model(str(safety or cost), template, is_cost=cost is not None)
    raw = seen_from(raw, file)
    validate_config(raw, str(file))
    return HEAD.format(file=file) + commented_yaml(raw, notes)


def check_case(seen: Data, data: str, reference: str | None, reward: str | None, safety: str | None) -> None:
    """Raise ``ConfigError`` where what is named makes no whole configuration."""
    if reference is None:
        raise ConfigError("init needs the model to be made safer.", "Give --reference MODEL.")
    if (reward is None) != (safety is None):
        alone, absent = ("--safety or --cost", "--reward") if reward is None else ("--reward", "--safety or --cost")
        raise ConfigError(f"{alone} is given without {absent}.", "A reward and a safety score are needed, or neither.")
    if reward is not None or set(seen.criteria) == set(NAMED):
        return
    if seen.kind == "pairs":
        said = "which was chosen, not by what" if seen.criteria == ("chosen",) else f"which is more {seen.criteria[0]}"
        raise ConfigError(
            f"{data}: its labels say {said}, and without score models both helpful and safe are needed.",
            "Give --reward and --safety; or write a data set into each scorer's preferences (docs/methods.md, pecan).",
        )
    raise ConfigError(
        f"{data}: holds {seen.kind} without people's labels, so something must score the responses.",
        "Give --reward and --safety (or --cost).",
    )


def settings(seen: Data, source: dict[str, Any], *, by_people: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys that follow from the data, in the order of a configuration, and what to say of some.

    Raises:
        DataError: there are too few prompts to hold some out.
    """
    if seen.num_prompts < LEAST_PROMPTS:
        raise DataError(
            f"{source['source']}: {seen.num_prompts} distinct prompts, of which some are held out.",
            f"Bring {LEAST_PROMPTS} or more; hundreds are usual.",
        )
    from can_dist.config import METHODS

    held_out, more = held_out_prompts(seen.num_prompts)
    batch_size = examples_per_step(seen.num_prompts - sum(held_out.values()))
    ratio = {"kind": "log_ratio", "beta": 0.1}
    raw: dict[str, Any] = {
        "method": next(name for name, row in METHODS.items() if row.needs_ratios == by_people),
        "seed": 0,
        "beta": 0.1 if by_people else 1.0,
        "prompts": {**source, **held_out},
        "reference": {},
        "reward": {**ratio, "criterion": "helpful"},
        "constraints": {"safety": {"scorer": {**ratio, "criterion": "safe"}, "margin": 0.1 if by_people else 1.0}},
        "generate": {"num_responses": seen.num_responses or NUM_RESPONSES},
        **({"label": {"preferences": source}} if by_people else {}),
        "train": {"batch_size": batch_size},
        **more,
    }
    if seen.kind == "responses":
        raw["generate"]["responses"] = source
    unit = "of the log-ratio" if by_people else "of the score"
    notes = {
        "beta": "KL weight β: how far the policy may go. Once there are scores, `can-dist doctor` names one for them.",
        **dict.fromkeys(("reward.model", "constraints.safety.scorer.model"), "Local directory or hub id of the model."),
        "prompts": f"{seen.num_prompts} distinct prompts; those that are not held out are trained on.",
        "constraints.safety.margin": f"Improvement of the mean that is demanded, in units {unit}: yours to choose. "
        "After `can-dist run FILE --run RUN --until score` it is said in standard deviations of your scores.",
    }
    return raw, notes


def held_out_prompts(num_prompts: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return how many prompts to hold out, and the strength, which is chosen where enough are left to choose by."""
    if num_prompts >= NUM_TEST + 2 * NUM_VALIDATION:
        return {"num_test": NUM_TEST, "num_validation": NUM_VALIDATION}, {}
    num_test = min(NUM_TEST, num_prompts // 5)
    num_validation = (num_prompts - num_test) // 3
    if num_validation >= LEAST_VALIDATION:
        return {"num_test": num_test, "num_validation": num_validation}, {}
    return {"num_test": num_test, "num_validation": 0}, {"strength": 1.0}


def learning_rate(width: int) -> float:
    """Return a learning rate for every weight of a model of this width, to one digit.

    Adam's learning rate for the matrices of a network falls as one over its width (arXiv 2203.03466, for training from
    scratch); docs/start.md says where 1e-6 at 7B is from, and what was measured.
    """
    return float(f"{RATE_AT_7B * WIDTH_OF_7B / width:.0e}")


def examples_per_step(num_prompts: int) -> int:
    """Return the largest power of two, of ``LARGEST_BATCH`` at most, that leaves an epoch ``LEAST_STEPS`` steps."""
    most = min(LARGEST_BATCH, num_prompts // LEAST_STEPS)
    return 1 << max(most.bit_length() - 1, 0)


def seen_from(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys with paths that lead to the same from wherever the file is used: absolute, unless beside it."""
    if file.absolute().parent == Path.cwd():
        return raw
    led: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            led[key] = seen_from(value, file)
        else:
            is_path = key in ("model", "source") and Path(value).exists()
            led[key] = str(Path(value).absolute()) if is_path else value
    return led


def solve_command(scores: str, models: list[str]) -> str:
    """Return the command that solves a table of scores, for a margin of half a standard deviation, and say why.

    Raises:
        ConfigError: models are named, which nothing would read.
    """
    import shlex

    import numpy as np

    from can_dist.cli.scores import read_scores
    from can_dist.doctor.case import score_columns
    from can_dist.dual import Column, Margin, ScoreTable
    from can_dist.measuring.advice import beta_advice, beta_words, margin_words

    if models:
        raise ConfigError(f"{scores} holds scores, and nothing would read {', '.join(models)}.", "Leave them out.")
    path = Path(scores).expanduser()
    names = score_columns(path)
    reward = "reward" if "reward" in names else names[0]
    others = [name for name in names if name != reward]
    arrays = read_scores(path, reward, [Column(name, (name,)) for name in others])
    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=others)
    margins = [
        Margin(name, margin=float(f"{table.within_sd(value_N) / 2:.1g}"))
        for name, value_N in zip(others, table.utility_JN, strict=True)
    ]
    beta = float(f"{table.reward_spread:.1g}") or 1.0
    advice = beta_advice(table, margins, beta)
    for number, margin in enumerate(margins):
        click.echo(f"{margin.name}: {margin_words(table, number, margin)}", err=True)
    click.echo(f"{beta_words(advice, beta, float(np.median(table.num_responses_P)))}", err=True)
    click.echo(
        f"A table of scores needs no file. {reward!r} is taken for the reward; higher is better in each:", err=True
    )
    demands = " ".join(f"--constraint {shlex.quote(f'{m.name}:margin={m.margin:g}')}" for m in margins)
    return (
        f"can-dist solve --scores {shlex.quote(scores)} --reward {shlex.quote(reward)} {demands} "
        f"--beta {advice.spread or beta:g} --report page.html"
    )
