"""Which attention computes packs: the choice on every torch we allow, and our calls of the kernels, by stand-ins."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packed_models import HEADS, LLAMA, SMALL, alone, gradients, make_groups, make_model, relative_error
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, MistralConfig

from can_dist.errors import EnvironmentProblem
from can_dist.modeling import attention, segments
from can_dist.modeling.attention import Machine, choose_attention
from can_dist.modeling.logprobs import ResponseModel, choose_layout, response_logp

ROOT = Path(__file__).parents[3]
BF16 = torch.bfloat16
Offsets = torch.Tensor

# ------------------------------------------------------------------------------------ stand-ins of torch's varlen_attn


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Offsets, keys: Offsets, scale: float | None, left: int
) -> torch.Tensor:
    """What the kernel computes, in plain torch: causal from the bottom right, ``left`` keys before a query's own."""
    parts, share = [], q.shape[1] // k.shape[1]
    for a, b, c, d in zip(rows[:-1], rows[1:], keys[:-1], keys[1:], strict=True):
        num_queries, num_keys = int(b - a), int(d - c)
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        if left >= 0:
            mask = mask.triu(num_keys - num_queries - left)
        heads = (
            x.transpose(0, 1) for x in (q[a:b], k[c:d].repeat_interleave(share, 1), v[c:d].repeat_interleave(share, 1))
        )
        parts.append(scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("has neither scale nor window: is not called")


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0, "causal"
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    return varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


VARLEN: dict[str, Callable | None] = {
    "2.6.0": None,
    "2.9.1": None,
    "2.10.0": varlen_2_10,
    "2.11.0": varlen_2_11,
    "2.13.0": varlen_2_13,
    "2.15.0": varlen_2_13,
}
PACKED = ("2.11.0", "2.13.0", "2.15.0")


def gpu(version: str = "2.13.0", **changes: object) -> Machine:
    varlen = VARLEN[version]
    parameters = None if varlen is None else frozenset(inspect.signature(varlen).parameters)
    return dataclasses.replace(Machine("cuda", (9, 0), version, parameters, None), **changes)


@pytest.fixture
def on_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A torch that has the stand-in of a version, which serves float32 on the CPU too: numbers can be compared."""
    version = request.param
    machine = gpu(version)
    monkeypatch.setattr(segments, "torch_varlen", lambda: VARLEN[version])
    monkeypatch.setattr(
        segments, "attention_for", lambda device, dtype, widths=(): choose_attention(machine, BF16, widths)
    )
    return version


def test_the_stand_in_has_the_signature_of_the_torch_that_is_installed() -> None:
    varlen = attention.torch_varlen()
    if varlen is None:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn")
    nearest = varlen_2_13 if "enable_gqa" in inspect.signature(varlen).parameters else varlen_2_11
    known = inspect.signature(nearest).parameters.keys()
    assert known <= inspect.signature(varlen).parameters.keys()


def test_the_stand_ins_have_the_parameters_in_the_wheels_of_torch() -> None:
    read = json.loads((ROOT / "benchmarks" / "results" / "varlen_attn.json").read_text(encoding="utf-8"))
    for version, stand_in in VARLEN.items():
        parameters = None if stand_in is None else list(inspect.signature(stand_in).parameters)
        assert parameters == read[version], version


@pytest.mark.parametrize("on_torch", PACKED, indirect=True)
@pytest.mark.parametrize("heads", [4, 2, 1], ids=lambda heads: f"{heads} heads of the keys")
@pytest.mark.parametrize("window", [None, 4])
def test_our_call_of_the_kernel_is_the_same_attention(on_torch: str, heads: int, window: int | None) -> None:
    config = MistralConfig(**SMALL, **HEADS, num_key_value_heads=heads, sliding_window=window)
    lm, groups = make_model(config), make_groups()
    expected = alone(lm, groups)
    expected_gradients = gradients(lm, expected)
    logp_R = response_logp(ResponseModel(lm), groups, "shared", "cpu")
    assert relative_error(logp_R, expected) < 1e-5
    for name, gradient in gradients(lm, logp_R).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-4, name


@pytest.mark.parametrize("on_torch", PACKED, indirect=True)
def test_packs_are_kept_and_the_kernel_is_named(on_torch: str) -> None:
    model, said = ResponseModel(make_model(LLAMA)), []
    assert choose_layout(model, model, said.append) == "shared"
    assert said == [
        f"packs that share prompts, attention by varlen_attn of torch {on_torch} (flash-attn is not installed)"
    ]


@pytest.mark.parametrize("on_torch", ["2.10.0"], indirect=True)
def test_a_torch_without_a_usable_kernel_keeps_packs_by_segments(on_torch: str) -> None:
    model, said = ResponseModel(make_model(LLAMA)), []
    assert choose_layout(model, model, said.append) == "shared"
    (sentence,) = said
    assert sentence == (
        "packs that share prompts, attention by sdpa, segment by segment, of torch 2.10.0 (the varlen_attn of this "
        "torch takes no scale and no window_size, and flash-attn is not installed; install torch 2.11 or later, or "
        "flash-attn: pip install 'can-dist[gpu]')"
    )


@pytest.mark.parametrize("on_torch", ["2.13.0"], indirect=True)
def test_a_kernel_that_does_not_take_our_arguments_ends_the_run_and_pads_nothing(
    on_torch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "torch_varlen", lambda: varlen_2_10)
    model, said = ResponseModel(make_model(LLAMA)), []
    with pytest.raises(EnvironmentProblem, match=r"varlen_attn of torch 2.13.0 .* unexpected keyword argument 'scale'"):
        choose_layout(model, model, said.append)
    assert said == []


@pytest.mark.parametrize("on_torch", ["2.13.0"], indirect=True)
def test_heads_that_no_kernel_takes_are_computed_by_segments(on_torch: str) -> None:
    config = LlamaConfig(
        **SMALL, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=10
    )
    model, said = ResponseModel(make_model(config)), []
    assert choose_layout(model, model, said.append) == "shared"
    assert "attention by sdpa, segment by segment" in said[0]
    assert "a head has 10 numbers, the kernels for packs take multiples of 8 up to 256" in said[0]


# ------------------------------------------------------------------------------------------------------- the sentence


WITH_FLASH = {"flash_version": "2.8.3"}
FOR_ANOTHER = {**WITH_FLASH, "flash_error": "flash_attn_2_cuda.so: undefined symbol: _ZN3c10"}
BROKEN = {**WITH_FLASH, "flash_error": "libcudart.so.11.0: cannot open shared object file"}
NO_KERNEL = "this torch has no varlen_attn, and flash-attn is not installed; install torch 2.11 or later, or flash-attn"


@pytest.mark.parametrize(
    ("machine", "dtype", "widths", "sentence"),
    [
        (gpu("2.6.0"), BF16, (64, 64), f"sdpa, segment by segment, of torch 2.6.0 ({NO_KERNEL}"),
        (gpu("2.9.1"), BF16, (64, 64), f"sdpa, segment by segment, of torch 2.9.1 ({NO_KERNEL}"),
        (gpu("2.11.0"), BF16, (64, 64), "varlen_attn of torch 2.11.0 (flash-attn is not installed)"),
        (gpu("2.13.0"), BF16, (128, 128), "varlen_attn of torch 2.13.0 (flash-attn is not installed)"),
        (gpu("2.15.0"), torch.float16, (256, 256), "varlen_attn of torch 2.15.0 (flash-attn is not installed)"),
        (gpu("2.9.1", **WITH_FLASH), BF16, (64, 64), "flash-attn 2.8.3 (it is installed)"),
        (
            gpu(**FOR_ANOTHER),
            BF16,
            (64, 64),
            "varlen_attn of torch 2.13.0 (flash-attn 2.8.3 is for another torch and cannot be imported: "
            "flash_attn_2_cuda.so: undefined symbol: _ZN3c10)",
        ),
        (
            gpu("2.9.1", **FOR_ANOTHER),
            BF16,
            (64, 64),
            "sdpa, segment by segment, of torch 2.9.1 (this torch has no varlen_attn, and flash-attn 2.8.3 is for "
            "another torch and cannot be imported: flash_attn_2_cuda.so: undefined symbol: _ZN3c10; install torch 2.11 "
            "or later, or build flash-attn for this torch: pip install --force-reinstall --no-deps "
            "--no-build-isolation flash-attn)",
        ),
        (
            gpu(**BROKEN),
            BF16,
            (64, 64),
            "varlen_attn of torch 2.13.0 (flash-attn 2.8.3 cannot be imported: libcudart.so.11.0: cannot open shared "
            "object file)",
        ),
        (
            gpu(capability=(7, 5), **WITH_FLASH),
            BF16,
            (64, 64),
            "sdpa, segment by segment, of torch 2.13.0 (the kernels for packs need compute capability 8.0, this GPU "
            "has 7.5)",
        ),
        (gpu(**WITH_FLASH), BF16, (288, 288), "sdpa, segment by segment, of torch 2.13.0 (a head has 288 numbers, "),
        (gpu(**WITH_FLASH), BF16, (60, 60), "sdpa, segment by segment, of torch 2.13.0 (a head has 60 numbers, "),
        (
            gpu(),
            BF16,
            (192, 128),
            "sdpa, segment by segment, of torch 2.13.0 (queries and values have heads of 192 and 128 numbers)",
        ),
        (
            gpu(**WITH_FLASH),
            torch.float32,
            (64, 64),
            "sdpa, segment by segment, of torch 2.13.0 (the kernels for packs take bf16 and fp16, not float32)",
        ),
    ],
)
def test_one_sentence_says_which_attention_and_why(
    machine: Machine, dtype: torch.dtype, widths: tuple[int, ...], sentence: str
) -> None:
    assert str(choose_attention(machine, dtype, widths)).startswith(f"attention by {sentence}")


def test_a_flash_attn_for_another_torch_is_named_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(
        'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\\nmore")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention._flash_attn() == ("of unknown version", "flash_attn_2_cuda.so: undefined symbol: _ZN3c10")
