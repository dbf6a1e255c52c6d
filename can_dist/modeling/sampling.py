"""Sampling with one random stream per (prompt, k), so that a response depends on nothing but its own seed.

argmax(logits/T + Gumbel noise) is an exact draw from softmax(logits/T). The noise of a row comes from that row's own
generator, so the draw is the same whichever rows share the batch and whichever actor does the work, but for the last
bits of the logits, which differ between batches: of two tokens within a rounding of each other either may be drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from can_dist.modeling.decoding import decode, serves

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RowGumbel(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to the scores, each row from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return scores_BV, float32, plus noise; −ln of an exponential variable is a Gumbel variable."""
        exponential_BV = torch.empty_like(scores)
        for row, generator in zip(exponential_BV, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential_BV.log_()


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
    *,
    told: Callable[[int], None] = lambda _: None,
) -> list[tuple[list[int], str]]:
    """Sample one response per row; return (token ids with the end token, finish reason 'stop' or 'length').

    Neighbouring rows with the same prompt share its reading. The model's own generation defaults (top_k, penalties) are
    not used: only what ``options`` says. A model that ``decode`` does not take samples by its own ``generate``, in
    batches of as many rows. ``told`` is called with every number of responses that have ended.
    """
    generators = [torch.Generator(device=model.device).manual_seed(seed) for seed in seeds]
    max_rows = rows_at_once(options, max(len(ids) for ids in prompt_ids))
    if not serves(model):
        starts = range(0, len(prompt_ids), max_rows)
        tokens: list[list[int]] = []
        for batch in (slice(start, start + max_rows) for start in starts):
            tokens += _generate(model, tokenizer, prompt_ids[batch], generators[batch], options, end_ids)
            told(len(tokens[batch]))
        return [_finish(row, end_ids, options, tokenizer) for row in tokens]

    def choose(rows: Sequence[int], logits_BV: torch.Tensor) -> list[int]:
        scores_BV = warp(None, logits_BV.float())
        chosen: list[int] = RowGumbel([generators[row] for row in rows])(None, scores_BV).argmax(dim=-1).tolist()
        return chosen

    def ended(row: Sequence[int]) -> bool:
        end = row[-1] in end_ids or len(row) == options.max_new_tokens or _stops(tokenizer, row, options)
        if end:
            told(1)
        return end

    warp = _warpers(options)
    tokens = decode(model, prompt_ids, max_rows, choose, ended)
    return [_finish(row, end_ids, options, tokenizer) for row in tokens]


def rows_at_once(options: Generate, longest_prompt: int) -> int:
    """Return how many responses are decoded at once: those of ``batch_prompts``, within ``tokens_at_once``."""
    wanted = options.batch_prompts * options.num_responses
    return max(1, min(wanted, options.tokens_at_once // (longest_prompt + options.max_new_tokens)))


def _warpers(options: Generate) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return warpers


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    options: Generate,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Return the tokens of one response per row, with the padding behind it, by ``generate``'s greedy decoding."""
    length = max(len(ids) for ids in prompt_ids)
    ids_BT = torch.full((len(prompt_ids), length), tokenizer.pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(prompt_ids):
        ids_BT[row, length - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, length - len(ids) :] = 1
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
        logits_processor=LogitsProcessorList([*_warpers(options), RowGumbel(generators)]),
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, options.stop, length)] if options.stop else []),
    )
    tokens: list[list[int]] = output_BT[:, length:].tolist()
    return tokens


def _stops(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], options: Generate) -> bool:
    if not options.stop:
        return False
    text = tokenizer.decode(row)
    return any(stop in text for stop in options.stop)


def _finish(
    row: list[int], end_ids: Sequence[int], options: Generate, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str]:
    """Return the tokens up to the first end token or stop string; behind a stop string may be padding, an end token."""
    end = next((position for position, token in enumerate(row, start=1) if token in end_ids), None)
    if _stops(tokenizer, row[:end], options):
        end = next(end for end in range(1, len(row) + 1) if _stops(tokenizer, row[:end], options))
    return (row, "length") if end is None else (row[:end], "stop")
