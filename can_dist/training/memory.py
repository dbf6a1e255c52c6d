"""What one rank of ZeRO-3 needs, in bytes, by arithmetic alone. Line numbers are those of DeepSpeed 0.19.8.

Elements are numbers of a tensor, bytes are bytes. What the model's own passes need is not here but in
``activations.py``, which counts it on the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from can_dist.errors import ConfigError
from can_dist.training.extensions import without_mlflow

FP32 = 4
# of a rank's memory, left to what no count sees: fragmentation, NCCL, the CUDA context, the C library's own pools
SPARE = 0.1
AGREEMENT = 0.15  # a plan is within so much of what was measured (on CPU ranks; on a GPU not yet measured)


@dataclass(frozen=True)
class Parameters:
    """Elements of every parameter: those that are trained, and those that are not (the base of adapters)."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...]

    @property
    def total(self) -> int:
        """Elements of the whole model."""
        return sum(self.trained) + sum(self.frozen)


@dataclass(frozen=True)
class Zero:
    """What of a run's DeepSpeed configuration decides memory; bucket and distance in elements, the rest in bytes."""

    num_ranks: int
    on_gpu: bool
    weight_bytes: int
    gradient_bytes: int  # of the partition in which passes add up
    message_bytes: int  # of what is reduced over ranks
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    reuse_distance: int
    sub_group: int
    contiguous_gradients: bool
    parameters_on: str  # device, cpu or nvme
    states_on: str
    swap_buffers: int  # tensors of a sub-group kept in host memory for the disk

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], *, num_ranks: int, on_gpu: bool, precision: str) -> Zero:
        """Read a complete DeepSpeed configuration; what it leaves out has DeepSpeed's defaults.

        Raises:
            ConfigError: When it is not for ZeRO-3.
        """
        with without_mlflow():
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        if zero.stage != 3:
            raise ConfigError(
                f"plan: train.ds_config is for ZeRO-{zero.stage}; only ZeRO-3 is counted. Use another file."
            )
        width = {"bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp32": FP32, "float32": FP32}
        weights = width[precision]
        accumulate = ds_config.get("data_types", {}).get("grad_accum_dtype")  # engine.get_data_types, 1799
        message = ds_config.get("communication_data_type")  # engine.communication_data_type, 1719
        places = [_place(zero.offload_param), _place(zero.offload_optimizer)]
        return cls(
            num_ranks=num_ranks,
            on_gpu=on_gpu,
            weight_bytes=weights,
            gradient_bytes=width[accumulate] if accumulate else weights,
            message_bytes=width[message] if message else weights,
            reduce_bucket=int(zero.reduce_bucket_size),
            prefetch_bucket=int(zero.prefetch_bucket_size),
            persistence_threshold=int(zero.param_persistence_threshold),
            reuse_distance=int(zero.max_reuse_distance),
            sub_group=int(zero.sub_group_size),
            contiguous_gradients=bool(zero.contiguous_gradients),
            parameters_on=places[0],
            states_on=places[1],
            swap_buffers=int(zero.offload_optimizer.buffer_count) if places[1] == "nvme" else 0,
        )


def _place(offload: Any) -> str:
    return "device" if offload is None or offload.device == "none" else str(offload.device)


def share(elements: Sequence[int], num_ranks: int) -> int:
    """Elements of one rank: every tensor is divided alone and padded (partition_parameters._aligned_size, 1690)."""
    return sum(-(-count // num_ranks) for count in elements)


def weights(sizes: Parameters, zero: Zero) -> int:
    """Bytes of this rank's share of all parameters, frozen ones too (stage3.lp_param_buffer, 974)."""
    return zero.weight_bytes * (share(sizes.trained, zero.num_ranks) + share(sizes.frozen, zero.num_ranks))


def master(sizes: Parameters, zero: Zero) -> int:
    """Bytes of the copy that AdamW updates, float32 (stage3._create_fp32_partitions, 1081).

    There is one in fp32 too: the code means to share it, but compares ``tensor.device`` with a string (1162), which
    are never equal.
    """
    return FP32 * share(sizes.trained, zero.num_ranks)


def optimizer(sizes: Parameters, zero: Zero) -> int:
    """Bytes of AdamW's two averages, float32; torch makes them in the first update."""
    return 2 * FP32 * share(sizes.trained, zero.num_ranks)


def gradients(sizes: Parameters, zero: Zero) -> int:
    """Bytes of this rank's share of the gradients, kept over the passes of a step (grad_partitions_flat_buffer, 791).

    With states on the host there is a float32 copy for the optimizer beside it (_offload_grad_partition_at_boundary).
    """
    copy = 0 if zero.states_on == "device" else FP32
    return (zero.gradient_bytes + copy) * share(sizes.trained, zero.num_ranks)


def bucket(sizes: Parameters, zero: Zero) -> int:
    """Bytes of the bucket that collects whole gradients, made whole at the start (782); on a CPU its filled part."""
    size = zero.reduce_bucket if zero.on_gpu else _filled(sizes, zero)
    return zero.message_bytes * size if zero.contiguous_gradients else 0


def buckets(sizes: Parameters, zero: Zero) -> int:
    """Bytes of the bucket, of the copy that is reduced (coalesced_collectives), and of this rank's part of it.

    The part is there once more, and wider, when gradients add up in another dtype than they are reduced in (1944).
    """
    filled = _filled(sizes, zero)
    wider = zero.gradient_bytes * -(-filled // zero.num_ranks) if zero.gradient_bytes != zero.message_bytes else 0
    return bucket(sizes, zero) + zero.message_bytes * filled + wider


def _filled(sizes: Parameters, zero: Zero) -> int:
    return min(zero.reduce_bucket, sum(sizes.trained))


def persistent(sizes: Parameters, zero: Zero) -> int:
    """Elements of the small parameters that stay whole (parameter_offload.mark_persistent_parameters)."""
    return sum(count for count in (*sizes.trained, *sizes.frozen) if count <= zero.persistence_threshold)


def live(sizes: Parameters, zero: Zero) -> int:
    """Elements that are whole at once, at most, during a pass (partitioned_param_coordinator.__params_to_release).

    A parameter is kept whose next use is less than the reuse distance away. Around the turn from the forward to the
    backward pass that is the last half of the distance, since each of its parameters lies on the way twice; the module
    at work and the persistent ones come on top. ``stage3_max_live_parameters`` bounds the prefetch only. One rank
    gathers nothing: its share is the whole (_no_gather_coalesced, 904).
    """
    if zero.num_ranks == 1:
        return 0
    largest = max((*sizes.trained, *sizes.frozen), default=0)
    return min(sizes.total, zero.reuse_distance // 2 + largest + persistent(sizes, zero))


def gathered(sizes: Parameters, zero: Zero) -> int:
    """Bytes of whole parameters, and of the message in which the next ones arrive before they are copied out (761)."""
    if zero.num_ranks == 1:
        whole = zero.weight_bytes * sizes.total  # of weights that wait on the host
        return 0 if zero.parameters_on == "device" else min(whole, zero.weight_bytes * zero.reuse_distance)
    return zero.weight_bytes * (live(sizes, zero) + min(zero.prefetch_bucket, sizes.total))


def step_copy(sizes: Parameters, zero: Zero) -> int:
    """Bytes of the float32 gradient of one sub-group during the update (_prepare_fp32_grad_for_sub_group, 2683)."""
    if zero.states_on != "device":
        return 0
    largest = max(sizes.trained, default=0)
    group = min(share(sizes.trained, zero.num_ranks), zero.sub_group + largest)
    return group * (FP32 if zero.gradient_bytes == FP32 else FP32 + zero.gradient_bytes)


@dataclass(frozen=True)
class States:
    """Bytes of one rank that do not depend on the tokens: by what they are, and where they lie."""

    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    step_copy: int


RESIDENT = ("parameters", "master", "optimizer", "gradients")


def states(sizes: Parameters, zero: Zero) -> States:
    """Put every state where the DeepSpeed configuration puts it; on a CPU rank, host and device are one memory."""
    places: dict[str, dict[str, int]] = {"device": {}, "cpu": {}, "nvme": {}}
    places[zero.parameters_on]["parameters"] = weights(sizes, zero)
    for name, function in (("master", master), ("optimizer", optimizer)):
        places[zero.states_on][name] = function(sizes, zero)
    places["cpu" if zero.states_on == "nvme" else zero.states_on]["gradients"] = gradients(sizes, zero)
    if zero.swap_buffers:
        group = min(share(sizes.trained, zero.num_ranks), zero.sub_group + max(sizes.trained, default=0))
        places["cpu"]["swap_buffers"] = FP32 * group * zero.swap_buffers
    if not zero.on_gpu:
        places["device"] |= places["cpu"]
        places["cpu"] = {}
    places["device"] |= {"buckets": buckets(sizes, zero), "gathered": gathered(sizes, zero)}
    return States(places["device"], places["cpu"], places["nvme"], step_copy(sizes, zero))


def peak_of_a_pass(resting: States, pass_bytes: int) -> int:
    """Bytes on the device at most: everything of the states, and what the model's own passes need at their highest."""
    return sum(resting.device.values()) + pass_bytes


def peak_of_the_step(resting: States, sizes: Parameters, zero: Zero) -> int:
    """Bytes on the device during the update: no activations, the bucket, and the copy of the gradient."""
    kept = sum(resting.device.get(name, 0) for name in (*RESIDENT, "swap_buffers"))
    return kept + bucket(sizes, zero) + resting.step_copy


def largest_budget(memory: int, needs: Mapping[int, int], step: int) -> int:
    """Return how many tokens of a pack fit in ``memory`` × (1 − SPARE); 0 when none do, or the update does not.

    Args:
        memory: Bytes of a rank.
        needs: Bytes at the peak of two packs, by their tokens: a straight line once the head works in chunks.
        step: Bytes at the peak of the update.
    """
    (few, low), (many, high) = sorted(needs.items())
    room = memory * (1 - SPARE)
    if step > room:
        return 0
    return max(0, int(few + (room - low) * (many - few) / (high - low)))
