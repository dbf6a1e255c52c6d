"""Compare liger-kernel's kernels with transformers' own code: on a GPU, or on a CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python liger_interpreted.py llama

Prints the errors of loss and gradients; ends with an AssertionError where they are larger than the number format's own.
"""

from __future__ import annotations

import copy
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

from can_dist.modeling.liger import use_kernels

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
plain_conversion = interpreter._implicit_cvt


def convert(argument: object) -> object:
    """Make a tensor of a float too, as the compiler does."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return plain_conversion(argument)


@triton.jit
def rsqrt(x):
    """Return 1/√x."""
    return 1 / tl.sqrt(x)


def errors(model: torch.nn.Module, ids_BT: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    """Return the root mean square of the relative errors of the loss and of the gradient of every weight."""
    own = loss_and_gradients(model, ids_BT)
    squares = [((own[name] - true).norm() / true.norm()).item() ** 2 for name, true in truth.items()]
    return (sum(squares) / len(squares)) ** 0.5


def loss_and_gradients(model: torch.nn.Module, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean log-probability of the tokens and its gradients, in float64."""
    model.zero_grad()
    logp = model(ids_BT).logits.to(torch.promote_types(model.dtype, torch.float32)).log_softmax(-1)
    loss = logp[:, :-1].gather(-1, ids_BT[:, 1:, None]).mean()
    loss.backward()
    gradients = {name: weight.grad.double() for name, weight in model.named_parameters()}
    return {"loss": loss.detach().double(), **gradients}


def main(kind: str) -> None:
    """Compare a model of a type: by the compiled kernels on a GPU, else by the interpreter, whose bf16 is no number."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        interpreter._implicit_cvt = convert
        rms_norm.rsqrt = rsqrt  # that of CUDA's library is not interpreted
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS), dtype=torch.float64)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    model = model.to("cuda" if on_gpu else "cpu")
    ids_BT = torch.randint(SIZES["vocab_size"], (2, 12)).to(model.device)
    truth = loss_and_gradients(copy.deepcopy(model), ids_BT)
    bounds = {torch.float32: 1e-4}
    if on_gpu:
        bounds[torch.bfloat16] = 1.5 * errors(copy.deepcopy(model).bfloat16(), ids_BT, truth)
    names = {name for name, _ in model.named_parameters()}
    for dtype, bound in bounds.items():
        changed = copy.deepcopy(model).to(dtype)
        use_kernels(changed)
        assert "Liger" in repr(changed), "the kernels are in use"
        error = errors(changed, ids_BT, truth)
        print(f"{kind}, {dtype}: {error:.1e}, allowed {bound:.1e}", flush=True)
        assert error < bound
    with torch.device("meta"):
        made_later = AutoModelForCausalLM.from_config(model.config)
    assert {name for name, _ in made_later.named_parameters()} == names, "the policy's file has its own names"


if __name__ == "__main__":
    main(sys.argv[1])
