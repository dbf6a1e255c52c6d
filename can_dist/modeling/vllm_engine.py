"""Sampling by vLLM inside a generation actor: one engine, one request per response, each with its own seed.

vLLM shares the prompt's computation among its responses and batches as it goes, so a response's random numbers are its
own, but the logits they meet depend on the batch by rounding, see docs/scorers.md. Not yet run against a real vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from can_dist.config import Generate, Model
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling.loading import torch_dtype


def check_installed() -> None:
    """Raise ``ConfigError`` when vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "generate.engine: vllm needs the package 'vllm', which is not installed. pip install 'can-dist[vllm]' on "
            "every machine that generates, or set generate.engine to transformers."
        )


def open_engine(spec: Model, precision: str, longest: int) -> Any:
    """Return vLLM's ``LLM`` of a model on all GPUs that this process sees; ``longest`` is prompt and response, tokens.

    Raises
    ------
    EnvironmentProblem
        When this process sees no CUDA device.
    """
    import torch

    check_installed()
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "generate.engine: vllm needs a CUDA device, and this actor sees none. Give each actor GPUs "
            "(cluster.gpus_per_actor: 1) on machines that have them, or set generate.engine to transformers."
        )
    # the engine in this process, whose memory ends with it, and whose scheduling repeats
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    num_gpus = torch.cuda.device_count()
    return LLM(
        model=spec.model,
        revision=spec.revision,
        tokenizer_revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        load_format="safetensors",
        dtype=str(torch_dtype(precision)).removeprefix("torch."),
        max_model_len=longest,
        generation_config="vllm",  # nothing of the model's own sampling defaults
        tensor_parallel_size=num_gpus,
        # Ray's placement is the actor's; vLLM would ask it for more
        **({"distributed_executor_backend": "mp"} if num_gpus > 1 else {}),
    )


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
        "skip_special_tokens": False,  # a stop string may be one
    }
    prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
    return prompts, [common | {"seed": seed} for seed in seeds]


def read_output(output: Any, prompt_ids: Sequence[int], end_ids: Sequence[int]) -> tuple[list[int], str]:
    """Return (token ids with the end token, 'stop' or 'length') of vLLM's ``RequestOutput`` to one request.

    Raises
    ------
    EnvironmentProblem
        When it is of another prompt, ended for another reason, or its end token was left out: ln π_ref would be of
        another response.
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
            f"generate.engine: vllm {wrong}. This version of vLLM is not understood; set generate.engine to "
            "transformers, or serve the model and name it in generate.endpoint."
        )
    return tokens, reason


def sample(
    engine: Any, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], options: Generate, end_ids: Sequence[int]
) -> list[tuple[list[int], str]]:
    """Sample one response per row, as :func:`can_dist.modeling.sampling.sample` does."""
    from vllm import SamplingParams

    prompts, params = requests(prompt_ids, seeds, options, end_ids)
    outputs = engine.generate(prompts, [SamplingParams(**one) for one in params], use_tqdm=False)
    return [read_output(output, ids, end_ids) for output, ids in zip(outputs, prompt_ids, strict=True)]
