"""The reference and the kernel against float64: values, gradients, and the shapes on which kernels go wrong."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from interpreter import interpreter_problem

from can_kernels import target_log_probs

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1), (1, 7), (5, 4096), (3, 4097), (2, 12300), (4, 31)]  # a block has 4096 words
# of the log-probabilities, and of the gradient relative to its largest entry
TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.bfloat16: (2e-6, 4e-3)}


def fused() -> object:
    pytest.importorskip("triton", reason="triton is not installed: pip install can-kernels[cuda]")
    problem = interpreter_problem(*(importlib.metadata.version(name) for name in ("triton", "numpy")))
    if problem and not CUDA:
        pytest.skip(problem)
    from can_kernels.fused import fused_target_log_probs

    return fused_target_log_probs


def exact(logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, on the numbers that the dtype can hold."""
    x = logits.detach().double().requires_grad_()
    logp = x.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    logp.backward(grad.double())
    return logp.detach(), x.grad


def compare(function: object, logits: torch.Tensor, targets: torch.Tensor) -> None:
    grad = torch.linspace(-2, 2, len(logits), device=logits.device)
    logp64, grad64 = exact(logits, targets, grad)
    leaf = logits.clone().requires_grad_()
    logp = function(leaf * 1, targets)  # the logits of a model are no leaf either
    logp.backward(grad)
    close, close_grad = TOLERANCE[logits.dtype]
    assert logp.dtype == torch.float32
    assert leaf.grad.dtype == logits.dtype
    assert ((logp - logp64).abs() <= close * (1 + logp64.abs())).all()
    # every row of the gradient is at most 2 |g|
    assert ((leaf.grad - grad64).abs() <= close_grad * (1e-3 + grad.abs()[:, None])).all()


def random_case(shape: tuple[int, int], dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] * 100_003 + shape[1])
    logits = scale * torch.randn(shape, generator=generator)
    return logits.to(dtype), torch.randint(shape[1], (shape[0],), generator=generator)


def of_kind(kind: str) -> object:
    return target_log_probs if kind == "torch" else fused()


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.5.1", True), ("3.6.0", "2.4.6", False), ("3.9.0", "2.4.6", False)]
)
def test_versions_that_the_interpreter_fails_with_are_named(triton: str, numpy: str, fails: bool) -> None:
    problem = interpreter_problem(triton, numpy)
    assert bool(problem) == fails
    if fails:
        assert problem.startswith("the interpreter of triton 3.6.0 fails with numpy 2.5.1; it works in triton 3.9 with")


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    function = of_kind(kind)
    logits, targets = random_case(shape, dtype)
    device = "cuda" if CUDA else "cpu"
    compare(function, logits.to(device), targets.to(device))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_lose_nothing_but_their_own_rounding(offset: float) -> None:
    logits, targets = random_case((3, 5000), torch.float32)
    compare(fused(), logits + offset, targets)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_the_reference_rounds_large_logits_by_their_spacing(offset: float) -> None:
    logits, targets = random_case((3, 5000), torch.float32)
    expected, _ = exact(logits + offset, targets, torch.ones(3))
    error = (target_log_probs(logits + offset, targets) - expected).abs().max()
    assert error < 1e-3  # float32 numbers near 1e4 are 9.8e-4 apart


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_one_word_far_above_the_others(kind: str) -> None:
    logits = torch.zeros(2, 4100)
    logits[:, 4099] = 1e4  # in the last, partial block
    compare(of_kind(kind), logits, torch.tensor([4099, 0]))


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_masked_words_count_nothing(kind: str) -> None:
    logits, targets = random_case((2, 9000), torch.float32)
    logits[:, :4096] = float("-inf")  # a whole block
    targets = 4096 + targets % 4904
    logp = of_kind(kind)(logits.clone(), targets)
    expected, _ = exact(logits[:, 4096:], targets - 4096, torch.ones(2))
    assert (logp - expected).abs().max() < 1e-5


def test_no_rows() -> None:
    assert fused()(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_gradient_takes_the_place_of_the_logits_and_only_once() -> None:
    function = fused()
    logits, targets = random_case((2, 50), torch.float32)
    leaf = logits.clone().requires_grad_()
    scaled = leaf * 1
    logp = function(scaled, targets)
    logp.sum().backward(retain_graph=True)
    assert torch.equal(scaled.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="wrote its gradient over the logits"):
        logp.sum().backward()


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_shapes_that_do_not_belong_together_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and targets \(2, 3\): expected \(N, V\) and \(N,\)"):
        of_kind(kind)(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("logits", [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2).T])
def test_what_the_kernel_does_not_take_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected float32 or bfloat16 with words next to each other"):
        fused()(logits, torch.zeros(2, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_real_vocabulary_on_a_gpu(dtype: torch.dtype) -> None:
    logits, targets = random_case((257, 151_936), dtype)
    compare(fused(), logits.cuda(), targets.cuda())
