"""Log-probabilities of a few responses by the engine that trained a policy, compared by whoever opens its files.

Digests tell that the files are those that were written; this tells that what was written is the function that was
trained: no tensor under another's name, no adapter left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from can_dist.errors import DataError
from can_dist.modeling.packs import Group
from can_dist.tables.artifacts import write_json

PROBE = "policy_probe.json"  # beside the policy's directory
# of the log-probabilities, relative to their norm: of a trained model with 3M weights, bf16 is off by 7e-4, and a model
# with the same matrix of two layers exchanged by 0.5
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def write_probe(directory: Path, groups: Sequence[Group], logp_R: Sequence[float], precision: str) -> None:
    """Write what the engine computed: prompts with one response each, as token ids, and ln π(y|x) in nats, (R,)."""
    rows = [
        {"prompt_ids": list(prompt), "response_ids": list(responses[0]), "logp": logp}
        for (prompt, responses), logp in zip(groups, logp_R, strict=True)
    ]
    write_json(directory / PROBE, {"precision": precision, "rows": rows})


@torch.no_grad()
def logp_alone(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Return ln π(response | prompt), nats, of one sequence alone, without packs, by transformers."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return float(logits_TV.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).sum())


def check_probe(model: Any, directory: str, precision: str, logp: Callable[..., float] = logp_alone) -> None:
    """Compare a model, in eval mode, with what the engine that trained it computed; other models have no probe.

    ``directory`` is where it was loaded from; ``logp`` computes ln π(response | prompt) of (model, prompt, response).

    Raises:
        DataError: The log-probabilities are not those of the engine, up to rounding.
    """
    rows, tolerance = _read(directory)
    tolerance = max(tolerance, TOLERANCE[precision])
    expected_R = [expected for _, _, expected in rows]
    computed_R = [logp(model, prompt, response) for prompt, response, _ in rows]
    if not math.dist(computed_R, expected_R) <= tolerance * math.hypot(*expected_R):
        here = Path(directory).parent
        raise DataError(
            f"{directory}: not the policy that was trained: its log-probabilities of {len(computed_R)} responses are "
            f"{_nats(computed_R)} nats, the engine that trained it computed {_nats(expected_R)} ({PROBE}).",
            f"The export went wrong: delete {here} and run again, and report it if it comes back.",
        )


def probe_length(directory: str) -> int:
    """Return the tokens of the longest sequence of a policy's probe; 0 for a model that has none."""
    rows, _ = _read(directory)
    return max((len(prompt) + len(response) for prompt, response, _ in rows), default=0)


def _read(directory: str) -> tuple[list[tuple[list[int], list[int], float]], float]:
    """Return (prompt, response, ln π) of each row of a probe, none without one, and the tolerance of its precision."""
    path = Path(directory).parent / PROBE
    if not path.is_file():
        return [], 0.0
    try:
        probe = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["prompt_ids"], row["response_ids"], float(row["logp"])) for row in probe["rows"]]
        return rows, TOLERANCE[probe["precision"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}: damaged, not what a training wrote.",
            f"Delete {path.parent} and run again.",
        ) from None


def _nats(logp_R: Sequence[float]) -> str:
    return ", ".join(f"{logp:.4f}" for logp in logp_R)
