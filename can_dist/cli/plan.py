"""``can-dist plan``: the memory that training needs on each rank, and the work of a run, before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

import click

from can_dist.cli.options import config_options, read_config
from can_dist.training.plan import Plan, make_plan, rank_memory
from can_dist.training.workload import ASSUMED_PROMPT_TOKENS, Workload, count_work, hours, read_rates

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
    "--tokens-per-second",
    "speed",
    metavar="STEP=NUMBER,...",
    help="Of one actor or rank (generate, score, train): hours.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, in bytes.")
def plan(
    config: str | None,
    config_option: str | None,
    overrides: tuple[str, ...],
    memory: str | None,
    speed: str | None,
    as_json: bool,
) -> None:
    """Print what training needs of each rank's memory, the largest pack that fits, and the work of the whole run.

    Reads no weights and no data.
    """
    from can_dist.doctor.preflight import check_sources

    settings = read_config(config, config_option, overrides)
    check_sources(settings)
    rates = read_rates(speed) if speed else {}
    memory_bytes = rank_memory(settings, memory)
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves there
        estimate = make_plan(settings, memory_bytes)
        work = count_work(settings, estimate)
    took = hours(work, settings, rates)
    record = {**asdict(estimate), "work": asdict(work), "hours": took}
    click.echo(json.dumps(record, indent=2) if as_json else f"{plan_text(estimate)}\n{work_text(work, took)}")


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


def work_text(work: Workload, took: dict[str, float]) -> str:
    """Return the work of a run, every response at its longest, and the hours by the rates that were stated."""
    splits = " + ".join(f"{count:,} {split}" for split, count in work.prompts.items())
    assumed = "; train is a guess, prompts.num_train is not set" if work.is_assumed else ""
    fits = "" if work.fits else "; does not fit: lower generate.batch_prompts, or engine: vllm, which batches by memory"
    disk = ", ".join(f"{name} {size / GB:,.1f}" for name, size in work.disk_bytes.items())
    lines = [
        f"work        {splits} prompts{assumed}; at most, every response at its longest",
        f"generate    {work.tokens['generate']:,} tokens; {work.sequences:,} sequences at once: "
        f"{work.cache_bytes / GB:.1f} GB of keys and values (prompts of {ASSUMED_PROMPT_TOKENS} tokens) beside "
        f"{work.weight_bytes / GB:.1f} of weights{fits}",
        f"score       {work.tokens['score']:,} tokens: {work.columns} columns of {work.responses:,} responses",
        f"train       {work.tokens['train']:,} tokens, each response once an epoch",
        f"disk        {disk} GB",
    ]
    if took:
        each = ", ".join(f"{step} {value:,.1f}" for step, value in took.items())
        lines.append(
            f"hours       {each}: {sum(took.values()):,.1f} by the rates that you state, without loading models"
        )
    return "\n".join(lines)


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
