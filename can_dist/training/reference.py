"""A few log-probabilities by the engine: the stored reference's against live ones, and those of an exported policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from can_dist.errors import NumericalError
from can_dist.modeling.logprobs import response_logp
from can_dist.modeling.packs import Group
from can_dist.training.batches import Example

PROBE_EXAMPLES = 4
# relative to the norm of the stored values, or to AT_LEAST_NATS where the norm is less
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
AT_LEAST_NATS = 25.0


@torch.no_grad()
def probe(engine: Any, examples: Sequence[Example], layout: str) -> tuple[list[Group], list[float]]:
    """Return the first examples with one response each, and ln π(y|x) of these, computed by all ranks alike."""
    engine.eval()
    groups: list[Group] = [(example.prompt_ids, [example.responses[0]]) for example in examples[:PROBE_EXAMPLES]]
    return groups, [float(response_logp(engine, [group], layout, engine.device)) for group in groups]


def check_reference(engine: Any, examples: Sequence[Example], layout: str, precision: str, table: Path) -> None:
    """Compare stored reference log-probabilities with those of an engine that is still the reference.

    The loss at the start misses a difference that a small β scales down, and one that both responses of a pair share.

    Raises:
        NumericalError: when they differ by more than rounding; ``table`` is the artifact that holds them.
    """
    stored_R = [example.logp_ref[0] for example in examples[:PROBE_EXAMPLES]]
    _, live_R = probe(engine, examples, layout)
    if math.dist(live_R, stored_R) <= TOLERANCE[precision] * max(AT_LEAST_NATS, math.hypot(*stored_R)):
        return
    rows = zip(examples, stored_R, live_R, strict=False)
    listed = ", ".join(f"{example.example_id}: {stored:.4f} stored, {live:.4f} live" for example, stored, live in rows)
    raise NumericalError(
        f"{table}: the stored reference log-probabilities are not those of this model on these tokens, in nats of the "
        f"first response: {listed}. Score the responses again, by this reference."
    )
