"""What scorers that read whole texts have in common: the prompt's part is computed once for all its responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from can_dist.errors import DataError
from can_dist.modeling.packs import Pack, common_prefixes, make_text_pack
from can_dist.scoring.protocol import Response
from can_dist.scoring.token_budget import Passes, to_device


def check_lengths(owner: str, responses: Sequence[Response], texts: Sequence[Sequence[int]], max_length: int) -> None:
    """Raise ``DataError`` naming the first response whose text has more tokens than the model takes."""
    for response, ids in zip(responses, texts, strict=True):
        if len(ids) > max_length:
            raise DataError(
                f"{owner}: response {response.response_id!r} has {len(ids)} tokens with its prompt, the model takes "
                f"{max_length}.",
                "Lower generate.max_new_tokens or shorten the prompts.",
            )


def up_to_padding(ids: list[int], pad_id: int | None) -> list[int]:
    """Return a text without the padding tokens at its end, among which may be its end token; never nothing."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]


def outputs_of_texts(
    passes: Passes,
    outputs: Callable[[Pack], torch.Tensor],
    responses: Sequence[Response],
    texts: Sequence[list[int]],
    device: torch.device,
    pad_id: int,
) -> torch.Tensor:
    """Return what ``outputs`` makes of the token ids of each text, (R, L) on the CPU, in the order of the responses."""
    prompts = [tuple((turn["role"], turn["content"]) for turn in response.messages) for response in responses]
    shared = common_prefixes(prompts, texts)
    sizes = [(prefix, len(text) - prefix) for prefix, text in zip(shared, texts, strict=True)]

    def forward(pack: Sequence[Sequence[int]]) -> torch.Tensor:
        groups = [(texts[rows[0]][: shared[rows[0]]], [texts[row][shared[row] :] for row in rows]) for rows in pack]
        return outputs(to_device(make_text_pack(groups, passes.layout, pad_id), device))

    return passes.run(prompts, sizes, forward)
