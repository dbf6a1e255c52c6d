"""The plan of a training: bytes of each rank, counted from the model's configuration before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from can_dist.errors import ConfigError

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.config.sections import Train
    from can_dist.training.activations import Pass, Shell
    from can_dist.training.memory import Parameters
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Plan:
    """The memory plan of a rank, as ``can-dist plan`` prints it: bytes, elements and tokens."""

    model: str
    precision: str
    num_ranks: int
    on_gpu: bool
    elements: int
    trained_elements: int
    live_elements: int
    persistent_elements: int
    prefetch_elements: int
    tokens: int
    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    kept_bytes: int
    working_bytes: int
    kept_bytes_per_token: float
    other_kept_bytes_per_token: float
    activation_checkpointing: bool | int
    logits_bytes: int
    head_chunk_bytes: int
    head_chunk_rows: int
    pass_bytes: int
    step_bytes: int
    memory_bytes: int
    spare_bytes: int
    largest_tokens_per_pack: int


def rank_memory(settings: Config, memory: str | None) -> int:
    """Return the bytes of a rank: ``memory``, a GPU's, or the machine's free memory divided by its ranks.

    Raises:
        ConfigError: when the size cannot be read, or there is no GPU to ask.
    """
    if memory is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", memory.strip(), re.IGNORECASE)
        if match is None or match[2].upper() not in UNITS:
            raise ConfigError(f"--memory {memory}: expected a number with MB, GB, TB, MiB, GiB or TiB, e.g. 140GB.")
        return int(float(match[1]) * UNITS[match[2].upper()])
    if settings.cluster.gpus_per_worker > 0:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "plan: cluster.gpus_per_worker asks for GPUs, and this machine has none to ask for its memory. "
                "Give it: --memory 80GB."
            )
        return int(torch.cuda.get_device_properties(0).total_memory * settings.cluster.gpus_per_worker)
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if Path("/proc/meminfo").exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not free:
        raise ConfigError("plan: this system does not say how much memory is free. Give it: --memory 16GB.")
    return free[0] // settings.cluster.num_workers


def make_plan(settings: Config, memory_bytes: int) -> Plan:
    """Count the bytes of a configuration; ``memory_bytes`` is the memory of a rank.

    Raises:
        ConfigError: when the base is to be quantized, which is not counted.
    """
    if settings.train.lora is not None and settings.train.lora.quantize is not None:
        raise ConfigError("plan: train.lora.quantize is not counted. Plan without it: with it, less is needed.")
    on_gpu = settings.cluster.gpus_per_worker > 0
    from can_dist.modeling.logprobs import HEAD_BYTES_ON
    from can_dist.training import memory as m
    from can_dist.training.deepspeed_config import build_ds_config, read_ds_config

    train, num_ranks = settings.train, settings.cluster.num_workers
    head_bytes = HEAD_BYTES_ON["cuda" if on_gpu else "cpu"]
    precision = settings.precision if settings.precision != "auto" else "bf16" if on_gpu else "fp32"
    ds_config = build_ds_config(read_ds_config(train.ds_config), train, precision)
    zero = m.Zero.of(ds_config, num_ranks=num_ranks, on_gpu=on_gpu, precision=precision)
    sizes, vocabulary, here, other, line = _count_passes(settings, precision, on_gpu, head_bytes)
    states = m.states(sizes, zero)
    step = m.peak_of_the_step(states, sizes, zero)
    rows = max(1, head_bytes // (m.FP32 * vocabulary))
    return Plan(
        model=settings.reference.model,
        precision=precision,
        num_ranks=num_ranks,
        on_gpu=on_gpu,
        elements=sizes.total,
        trained_elements=sum(sizes.trained),
        live_elements=m.live(sizes, zero),
        persistent_elements=m.persistent(sizes, zero),
        prefetch_elements=min(zero.prefetch_bucket, sizes.total),
        tokens=here.tokens,
        device_bytes=states.device,
        host_bytes=states.host,
        disk_bytes=states.disk,
        kept_bytes=here.kept,
        working_bytes=here.peak - here.kept,
        kept_bytes_per_token=here.kept / here.tokens,
        other_kept_bytes_per_token=other.kept / other.tokens,
        activation_checkpointing=train.activation_checkpointing,
        logits_bytes=m.FP32 * here.tokens * vocabulary,
        head_chunk_bytes=m.FP32 * rows * vocabulary,
        head_chunk_rows=rows,
        pass_bytes=m.peak_of_a_pass(states, here.peak),
        step_bytes=step,
        memory_bytes=memory_bytes,
        spare_bytes=int(memory_bytes * m.SPARE),
        largest_tokens_per_pack=m.largest_budget(
            memory_bytes, {point.tokens: m.peak_of_a_pass(states, point.peak) for point in line}, step
        ),
    )


MOST_COUNTED = 2**13
"""Most tokens of a pack that is counted to draw the line: on a CPU it is counted response by response."""

FEW_LAYERS = (2, 3)
"""Numbers of layers that are counted where all are alike: what one more takes is the same from there on."""


def _count_passes(
    settings: Config, precision: str, on_gpu: bool, head_bytes: int
) -> tuple[Parameters, int, Pass, Pass, tuple[Pass, Pass]]:
    """Return the sizes, the vocabulary, a pass as configured and with the other checkpointing, and two on a line."""
    from can_dist.training.activations import Shell

    train = settings.train
    opposite = train.model_copy(update={"activation_checkpointing": not train.activation_checkpointing})
    shell = Shell(settings.reference, train, precision, head_bytes)
    num_layers = shell.alike_layers()

    def shells(options: Train) -> dict[int, Shell]:
        if num_layers <= max(FEW_LAYERS) or int(options.activation_checkpointing) > 1:
            return {0: shell if options is train else Shell(settings.reference, options, precision, head_bytes)}
        return {few: Shell(settings.reference, options, precision, head_bytes, few) for few in FEW_LAYERS}

    def count(of: dict[int, Shell], tokens: int) -> Pass:
        varlen = on_gpu and precision == "bf16"
        counted = [each.count(tokens, settings.generate.max_new_tokens, varlen=varlen) for each in of.values()]
        if len(counted) == 1:
            return counted[0]
        if (whole := _with_layers(num_layers, *counted)) is not None:
            return whole
        every = shell if of is these else Shell(settings.reference, opposite, precision, head_bytes)
        return every.count(tokens, settings.generate.max_new_tokens, varlen=varlen)

    vocabulary, tokens = int(shell.config.vocab_size), train.tokens_per_pack
    these = shells(train)
    here = count(these, tokens)
    # with at least two chunks of the head in the smaller of two packs, the peak is a straight line; with fewer, for a
    # vocabulary of some hundred words, a token is counted with its logits, and the largest pack as less than it is
    many = max(tokens, min(head_bytes // vocabulary, MOST_COUNTED))
    line = (count(these, many // 2), here if many == tokens else count(these, many))
    return shell.parameters(), vocabulary, here, count(shells(opposite), tokens), line


def _with_layers(num_layers: int, few: Pass, more: Pass) -> Pass | None:
    """Return a pass of ``num_layers`` alike layers by those of ``FEW_LAYERS``; None where the peak does not follow."""
    layer, higher = more.kept - few.kept, more.peak - few.peak
    if layer != higher:  # something else than what the layers keep is the highest with so few
        return None
    rest = (num_layers - FEW_LAYERS[1]) * layer
    return replace(more, kept=more.kept + rest, peak=more.peak + rest)
