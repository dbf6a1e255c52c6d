"""The attention of packs on a GPU: packs against every sequence alone, values and gradients, in bf16 and float32."""

from __future__ import annotations

import packed_attention
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("texts", ["pairs", "16 of a prompt", "one token"])
@pytest.mark.parametrize("name", list(packed_attention.architectures(DEVICE)))
def test_packs_are_every_sequence_alone(name: str, texts: str) -> None:
    config, groups = packed_attention.architectures(DEVICE)[name], packed_attention.texts(DEVICE)[texts]
    result = packed_attention.compare(config, groups, DEVICE)
    assert result["ok"], result
