"""Sampling with one random stream per (prompt, k), so that a response depends on nothing but its own seed.

argmax(logits/T + Gumbel noise) is an exact draw from softmax(logits/T). The noise of a row comes from that row's own
generator, so the draw is the same whichever rows share the batch, whichever actor does the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from can_dist.config.sections import Generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RowGumbel(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to the scores, each row from its own generator."""

    def __init__(self, seeds: Sequence[int], device: str | torch.device) -> None:
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return scores_BV plus noise; −ln of an exponential variable is a Gumbel variable."""
        exponential_BV = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in enumerate(self.generators):
            exponential_BV[row].exponential_(generator=generator)
        return scores.float() - exponential_BV.log()


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its decoded response holds a stop string.

    transformers' own criterion reads stop strings off the vocabulary and fails on tokenizers that split at spaces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Return a boolean per row of the batch."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def row_seed(seed: int, prompt_id: str, index: int) -> int:
    """Return the 63-bit seed of response ``index`` of a prompt."""
    content = f"{seed}\x00{prompt_id}\x00{index}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: Generate,
    end_ids: Sequence[int],
) -> list[tuple[list[int], str]]:
    """Sample one response per row; return (token ids with the end token, finish reason 'stop' or 'length').

    The model's own generation defaults (top_k, penalties) are not used: only what ``options`` says.
    """
    length = max(len(ids) for ids in prompt_ids)
    ids_BT = torch.full((len(prompt_ids), length), tokenizer.pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(prompt_ids):
        ids_BT[row, length - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, length - len(ids) :] = 1
    processors = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    processors.append(RowGumbel(seeds, model.device))
    generation = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    # generate() fills what a GenerationConfig leaves unset from the model's own
    model.generation_config = generation
    output_BT = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=generation,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, options.stop, length)] if options.stop else []),
    )
    return [_finish(row, end_ids, options, tokenizer) for row in output_BT[:, length:].tolist()]


def _finish(
    row: list[int], end_ids: Sequence[int], options: Generate, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str]:
    ends = [position for position, token in enumerate(row) if token in end_ids]
    if ends:
        return row[: ends[0] + 1], "stop"
    if options.stop:
        for position in range(1, len(row) + 1):
            if any(stop in tokenizer.decode(row[:position]) for stop in options.stop):
                return row[:position], "stop"
    return row, "length"
