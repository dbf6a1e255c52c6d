"""Guard models (Llama Guard, ShieldGemma, Granite Guardian and their like) as scorers: how sure one is of 'safe'.

A guard reads a conversation in its own chat template and answers with a verdict word. The score comes from the two
verdict words' logits right after the prompt, so nothing is generated: ln P(safe)/P(unsafe), or P(safe) of the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from can_dist.config import Guard
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.formatter import TEMPLATE_ERRORS, Message, check_chat_template, render_chat
from can_dist.modeling.last_token import LastToken, choose_text_layout
from can_dist.modeling.loading import check_causal_lm, check_vocabulary, context_length, load_causal_lm
from can_dist.modeling.precision import device
from can_dist.scoring.protocol import Response
from can_dist.scoring.token_budget import Passes, say
from can_dist.scoring.whole_texts import check_lengths, outputs_of_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PROBE = Response("probe", [{"role": "user", "content": "Hello."}], "Hello, how can I help?", [])
LEAST_SHARE = 0.5
"""Of the probability of all tokens, what a guard gives to its two verdicts at least where they are expected."""


class GuardScorer:
    """The guard's belief that the response is safe, in its conversation; higher is safer."""

    def __init__(self, spec: Guard, precision: str) -> None:
        self.spec = spec
        self.where = f"scorer {spec.model!r}"
        self.tokenizer = check_guard(spec)
        model = load_causal_lm(spec, precision).eval().to(device())
        if doubt := verdict_doubt(model, self.tokenizer, spec):
            say(self.where, doubt)
        model.set_output_embeddings(VerdictHead(model, verdict_ids(self.tokenizer, spec)))
        self.read = LastToken(model, "logits")
        self.max_length = min(spec.max_length or 10**9, context_length(model))
        layout = choose_text_layout(self.read, functools.partial(say, self.where))
        self.passes = Passes(self.where, layout, spec.tokens_per_pass)

    @torch.inference_mode()
    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores, one per response, in order; a text longer than the model's context is refused."""
        texts = [guard_ids(self.tokenizer, self.spec, response) for response in responses]
        check_lengths(self.where, responses, texts, self.max_length)
        device, pad_id = self.read.model.device, self.tokenizer.pad_token_id
        logits_R2 = outputs_of_texts(self.passes, self.read, responses, texts, device, pad_id).double().numpy()
        log_odds: np.ndarray = logits_R2[:, 0] - logits_R2[:, 1]
        return log_odds if self.spec.output == "log_odds" else 1 / (1 + np.exp(-log_odds))


class VerdictHead(torch.nn.Module):
    """The two rows of the output layer that the verdict needs, in float32; (..., H) to (..., 2): safe, unsafe.

    In the layer's place, so that what a model does to its logits (Gemma caps, Granite scales them) is done to these.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        super().__init__()
        layer = model.get_output_embeddings()
        rows = list(ids)
        bias = getattr(layer, "bias", None)
        self.register_buffer("weight", layer.weight.detach()[rows].float())
        self.register_buffer("bias", None if bias is None else bias.detach()[rows].float())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the two verdicts."""
        return torch.nn.functional.linear(hidden.float(), self.get_buffer("weight"), self.bias)  # type: ignore[arg-type]


@torch.inference_mode()
def verdict_doubt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: Guard) -> str:
    """Return what the guard would rather write than either verdict about a probe, or '' where it would write one."""
    try:
        ids = guard_ids(tokenizer, spec, PROBE)
    except DataError:  # a template may demand what the probe lacks; of the conversations it is said where they are read
        return ""
    if len(ids) > context_length(model):
        return ""
    p_V = model(torch.tensor([ids], device=model.device)).logits[0, -1].double().softmax(dim=-1)
    share = float(p_V[list(verdict_ids(tokenizer, spec))].sum())
    if share >= LEAST_SHARE:
        return ""
    likely = tokenizer.decode([int(p_V.argmax())])
    return (
        f"does not expect its verdict: {spec.safe_word!r} and {spec.unsafe_word!r} have {share:.2g} of the probability "
        f"after a probe, the likeliest is {likely!r} ({float(p_V.max()):.2g}). The scores may mean nothing: see "
        "before_verdict, the two words and template_options."
    )


def check_guard(spec: Guard) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a guard, checked to have a chat template and one token for each verdict.

    Raises:
        ConfigError: It has no chat template, several without a default, or one that does not read an option; or a
            verdict is no single token, or both are the same.
        DataError: Its files are incomplete or damaged.
    """
    tokenizer, _ = check_vocabulary(spec)
    check_causal_lm(spec)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"guard {spec.model!r}: its tokenizer has no chat template, which says how the conversation is shown.",
            "Add the one its makers publish as chat_template.jinja.",
        )
    check_chat_template(tokenizer, spec.template_options, "guard")
    safe, unsafe = verdict_ids(tokenizer, spec)
    if safe == unsafe:
        raise ConfigError(
            f"guard {spec.model!r}: safe_word {spec.safe_word!r} and unsafe_word {spec.unsafe_word!r} are the same "
            "token.",
            "Give the words its model card names.",
        )
    return tokenizer


def verdict_ids(tokenizer: PreTrainedTokenizerBase, spec: Guard) -> tuple[int, int]:
    """Return the token ids of the safe and the unsafe verdict."""
    return _one_token(tokenizer, spec, "safe_word"), _one_token(tokenizer, spec, "unsafe_word")


def _one_token(tokenizer: PreTrainedTokenizerBase, spec: Guard, field: str) -> int:
    word = getattr(spec, field)
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(
            f"guard {spec.model!r}: {field} {word!r} is {len(ids)} tokens {pieces}, expected one known to the "
            "tokenizer.",
            "Give the first token of the verdict as its model card writes it; a leading space counts.",
        )
    return ids[0]


def guard_ids(tokenizer: PreTrainedTokenizerBase, spec: Guard, response: Response) -> list[int]:
    """Return the token ids of a conversation as the guard reads it, up to the place of its verdict.

    Raises:
        DataError: The chat template refuses the conversation.
    """
    text = guard_text(tokenizer, spec, response.messages, response.text, f"response {response.response_id!r}")
    ids, whole = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, text + spec.before_verdict))
    if whole[: len(ids)] == ids:
        return list(whole)
    # the tokenizer joins it to the prompt's end ("\n\n" twice is one token of Llama 3); the guard writes it after
    return [*ids, *tokenizer(spec.before_verdict, add_special_tokens=False).input_ids]


def guard_text(
    tokenizer: PreTrainedTokenizerBase, spec: Guard, messages: Sequence[Message], text: str, name: str
) -> str:
    """Return a conversation as the guard reads it, up to where it begins to write; ``name`` is for messages.

    Raises:
        DataError: The chat template refuses the conversation.
    """
    whole = [*messages, {"role": "assistant", "content": text}]
    try:
        return render_chat(tokenizer, whole, add_generation_prompt=True, **spec.template_options)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"guard {spec.model!r}: its chat template refuses {name}: {error}.",
            "See template_options, and which roles and turns the template takes.",
        ) from None


def text_of_guard(spec: Guard) -> Callable[[Sequence[Message], str], str]:
    """Return what writes a conversation with its response as the guard reads it."""
    tokenizer = check_guard(spec)
    return lambda messages, text: guard_text(
        tokenizer, spec, messages, text, f"a conversation of {', '.join(turn['role'] for turn in messages)}"
    )
