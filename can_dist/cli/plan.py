"""``can-dist plan``: the memory that training needs on each rank, and the run's work, before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from can_dist.cli.options import config_options, read_config
from can_dist.errors import ConfigError, DataError
from can_dist.training.plan import Plan, make_plan, rank_memory

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.doctor.work import Work

GB = 10**9
LABELS = {
    "parameters": "parameters, this rank's share",
    "master": "float32 copy that AdamW updates",
    "optimizer": "AdamW's two averages, float32",
    "gradients": "gradients, this rank's share",
    "swap_buffers": "buffers for states on the disk",
    "buckets": "reduce bucket, and the copy that is reduced",
    "gathered": "gathered parameters",
}


@click.command()
@config_options
@click.option("--memory", metavar="SIZE", help="Memory of a rank, e.g. 140GB; default: what this machine has.")
@click.option(
    "--shape", metavar="FILE", help="The reference's config.json, here: nothing of the reference is asked of a hub."
)
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="STAGE=TOKENS",
    help="Tokens a second of one actor (generate, score) or rank (train), for the hours. May be repeated.",
)
@click.option("--response-length", type=click.IntRange(min=1), help="Mean tokens of a response; default: the most.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, in bytes.")
def plan(
    config: str | None,
    config_option: str | None,
    overrides: tuple[str, ...],
    memory: str | None,
    shape: str | None,
    rates: tuple[str, ...],
    response_length: int | None,
    as_json: bool,
) -> None:
    """Print what training needs of each rank's memory, the largest pack that fits, and the run's tokens and hours.

    Reads no weights.
    """
    from can_dist.doctor.preflight import check_sources
    from can_dist.doctor.work import count_work, parse_rates, reference_shape

    settings, known = read_config(config, config_option, overrides), parse_rates(rates)
    check_sources(settings, by_commit=shape is None)
    if shape is not None:
        settings = _shaped(settings, Path(shape))
    memory_bytes = rank_memory(settings, memory)
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves there
        try:
            estimate = make_plan(settings, memory_bytes)
        except DataError as error:
            if Path(settings.reference.model).expanduser().is_dir():
                raise
            raise DataError(f"{error}", "Without reach of the hub give its config.json: --shape FILE.") from None
        work = count_work(settings, estimate, reference_shape(settings), known, response_length)
    if as_json:
        click.echo(json.dumps({**asdict(estimate), "work": asdict(work)}, indent=2))
    else:
        click.echo(f"{plan_text(estimate)}\n\n{work_text(work)}")


def _shaped(settings: Config, shape: Path) -> Config:
    """Return the settings with the reference of a ``config.json``."""
    if shape.name != "config.json" or not shape.is_file():
        raise ConfigError(f"--shape {shape}: expected a model's config.json, a file of that name.")
    here = settings.reference.model_copy(update={"model": str(shape.parent), "revision": None})
    return settings.model_copy(update={"reference": here})


def work_text(work: Work) -> str:
    """Return the work of a run as lines: tokens and hours of each stage, the host's, disk and actors."""
    size = f"{'at most ' if work.is_most else ''}{work.response_tokens:,}"
    lines = [f"work        {work.responses:,} responses of {size} tokens each; tokens of prompts are not counted"]
    lines += [f"  {stage:10}{_stage_text(work, stage)}" for stage in work.tokens]
    lines.append(f"  host      {work.host_hours:.2g} h of the driver's CPU, beside what starts and loads")
    if work.unknown:
        lines.append(f"  not counted: {'; '.join(work.unknown)}")
    lines.append(f"disk        {', '.join(f'{name} {size / GB:,.1f} GB' for name, size in work.disk_bytes.items())}")
    held = [
        f"{kind} {f'{size / GB:,.1f} GB' if size is not None else 'not in reach'}"
        for kind, size in work.actor_bytes.items()
    ]
    cache = "what vLLM takes" if work.cache_bytes is None else f"{work.cache_bytes / GB:,.1f} GB without prompts"
    lines.append(f"actors      weights: {', '.join(held)}; keys and values of what is decoded at once: {cache}")
    return "\n".join(lines)


def _stage_text(work: Work, stage: str) -> str:
    tokens = work.tokens[stage]
    if tokens is None:
        return "not counted"
    on = f"{tokens / 1e6:,.1f} M tokens on {work.devices[stage]} {'rank' if stage == 'train' else 'actor'}(s)"
    if stage not in work.hours:
        return f"{on}; for hours give --rate {stage}=TOKENS/s of each"
    (low, high), (slow, fast) = work.hours[stage], work.rates[stage]
    if stage in work.stated:
        return f"{on}: {high:,.2g} h at {fast:,.0f} tokens/s of each"
    return f"{on}: {low:,.2g} to {high:,.2g} h, at {fast:,.0f} to {slow:,.0f} tokens/s of each, by a model"


def plan_text(estimate: Plan) -> str:
    """Return a plan as a table of GB (10⁹ bytes) per rank, and its verdict."""
    kind = "GPU" if estimate.on_gpu else "CPU"
    some = estimate.trained_elements < estimate.elements
    trained = f", {estimate.trained_elements / 1e6:,.1f} M of them trained" if some else ""
    lines = [
        f"{estimate.model}: {estimate.elements / 1e9:,.3f} G parameters{trained}; {estimate.precision}, ZeRO-3 on "
        f"{estimate.num_ranks} {kind} rank{'s' * (estimate.num_ranks > 1)}, packs of {estimate.tokens:,} tokens",
        f"{'per rank':52}{'GB':>10}",
    ]
    lines += [_row(LABELS[name], size) for name, size in estimate.device_bytes.items()]
    every = int(estimate.activation_checkpointing)  # 0: none, 1: all
    used = "without" if every == 0 else "with"
    layers = f" (one layer in {every})" if every > 1 else ""
    lines += [
        _row(f"activations {used} checkpointing{layers}", estimate.kept_bytes),
        _row("head and backward pass at work", estimate.working_bytes),
        _row("highest, in a pass", estimate.pass_bytes),
        _row("highest, in the update of the weights", estimate.step_bytes),
    ]
    lines += [_row(f"host memory: {LABELS[name]}", size) for name, size in estimate.host_bytes.items()]
    lines += [_row(f"disk: {LABELS[name]}", size) for name, size in estimate.disk_bytes.items()]
    other = "without" if estimate.activation_checkpointing else "with"
    return "\n".join(
        [
            *lines,
            _gathered(estimate),
            f"activations {estimate.kept_bytes_per_token / 1e3:,.1f} kB per token {used} checkpointing{layers}, "
            f"{estimate.other_kept_bytes_per_token / 1e3:,.1f} kB {other}",
            f"head        logits of the pack would take {estimate.logits_bytes / GB:.2f} GB in float32; at most "
            f"{estimate.head_chunk_rows:,} rows, {estimate.head_chunk_bytes / GB:.2f} GB, exist at a time",
            f"memory      {estimate.memory_bytes / GB:,.1f} GB per rank, {estimate.spare_bytes / GB:,.1f} of it kept "
            "free for what is not counted (fragmentation, communication)",
            _verdict(estimate),
        ]
    )


def _gathered(estimate: Plan) -> str:
    if estimate.num_ranks == 1:
        return "gathered    nothing: the only rank has every parameter whole"
    return (
        f"gathered    at most {estimate.live_elements / 1e6:,.0f} M parameters at once, "
        f"{estimate.persistent_elements / 1e6:,.1f} M of them always, {estimate.prefetch_elements / 1e6:,.0f} M ahead"
    )


def _row(label: str, size: int) -> str:
    return f"  {label:50}{size / GB:>10.3f}"


def _verdict(estimate: Plan) -> str:
    largest, room = estimate.largest_tokens_per_pack, estimate.memory_bytes - estimate.spare_bytes
    if largest == 0:
        return "verdict     nothing fits: use more ranks, train.activation_checkpointing, train.lora, or offload"
    fits = "fits" if max(estimate.pass_bytes, estimate.step_bytes) <= room else "does not fit"
    return f"verdict     train.tokens_per_pack={estimate.tokens:,} {fits}; the largest that does is {largest:,}"
