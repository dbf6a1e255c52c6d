"""The one formatter: every stage turns conversations into tokens through this file, so all see the same string.

A response's tokens are what the model would have sampled: they follow the prompt that asks for a response, and end
with the token at which generation stops. What a chat template writes elsewhere (an empty block of thought before a
past turn, a newline after its end token) belongs to whole conversations only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from can_dist.config import Model, SequenceClassifier
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import end_token_ids, generation_config, has_own_marks, load_tokenizer
from can_dist.tables.artifacts import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What a chat template takes for today (Llama's take it where they have no clock): a text must not change overnight."""
FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{TEMPLATE_DATE.strftime(f'%{code}')}')" for code in "aAbBcdfHIjmMpSUwWxXyYzZ")
    + " }}{% endmacro +%}"
)
"""Put before a template, takes the place of transformers' clock, which no argument replaces."""
TOKENISATION = 2
"""Version of the tokens of a response that comes as text (1: with whatever the template wrote around it)."""
PLACEHOLDER = "zqresponsezq"
"""Stands for a response while a template is asked what it writes around one; no template changes its letters."""
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a chat template raises for a conversation that it does not take."""
ALIKE = 8
"""Characters before a response that tell whether a prompt and a whole conversation introduce it in the same way."""


@dataclass(frozen=True)
class Frame:
    """What stands around the responses to one conversation, rendered once for all of them.

    Attributes:
        prompt: the text that asks for a response.
        ids: its tokens, without a plain template's token of the beginning.
        num_tokens: its tokens with that.
        lead: white space before a response.
        end: what ends one.
    """

    prompt: str
    ids: list[int]
    num_tokens: int
    lead: str
    end: str


class Formatter:
    """Turns messages and responses into token ids by the chat template, or by a plain ``'... {prompt} ...'`` template.

    Special tokens come from the chat template. A plain template gets the tokenizer's beginning-of-sequence token if
    the tokenizer itself would add it and the template does not spell it out; the response ends with the
    end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        end_ids: Sequence[int] = (),
    ) -> None:
        """``options`` are the chat template's; ``end_ids`` end a response beside the tokenizer's own end token."""
        if template is None:
            check_chat_template(tokenizer, options)
        self.tokenizer = tokenizer
        self.template = template
        self.options = dict(options)
        self.end_ids = sorted({tokenizer.eos_token_id, *end_ids} - {None})
        self._bos = _added_bos(tokenizer)

    @cached_property
    def _end_tokens(self) -> list[str]:
        """The texts of the tokens that end a response."""
        return [token for index in self.end_ids if (token := str(self.tokenizer.decode([index])))]

    @property
    def digest(self) -> str:
        """Digest of the template, the plain one or the tokenizer's, with its options where there are some."""
        template = self.template or self.tokenizer.chat_template
        return digest_of([template, self.options] if self.options else template)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids up to the point where the model's response begins."""
        if self.template is not None:
            return self._with_bos(self._encode(self.plain_prompt(messages)))
        return self._encode(self._render(messages, add_generation_prompt=True))

    def response_ids(self, messages: Sequence[Message], text: str, *, is_complete: bool = True) -> list[int]:
        """Return the token ids of a response given as text, as the model would have sampled it.

        Args:
            messages: The conversation that the response answers.
            text: The response; white space at its ends is not part of it.
            is_complete: Whether it ends with the end token; False for a response that was cut.

        Raises:
            DataError: The template refuses the conversation, writes no response, or no end token after one.
        """
        return self.framed_ids([(self.frame(messages), text, is_complete)])[0]

    def frame(self, messages: Sequence[Message]) -> Frame:
        """Return what stands around the responses to a conversation; raises as :meth:`response_ids`."""
        return self.frames([messages])[0]

    def frames(self, conversations: Sequence[Sequence[Message]]) -> list[Frame]:
        """Return :meth:`frame` of conversations, encoded together."""
        written = [self._written_around(messages) for messages in conversations]
        ids_of_each = self._encode_all([prompt for prompt, _, _ in written])
        return [
            Frame(prompt, ids, len(ids if self.template is None else self._with_bos(ids)), lead, end)
            for (prompt, lead, end), ids in zip(written, ids_of_each, strict=True)
        ]

    def _written_around(self, messages: Sequence[Message]) -> tuple[str, str, str]:
        """Return the text that asks for a response, and what is written before and after one."""
        if self.template is not None:
            return self.plain_prompt(messages), "", str(self.tokenizer.eos_token)
        prompt = self._render(messages, add_generation_prompt=True)
        return (prompt, *self._around_response(messages, prompt))

    def framed_ids(self, responses: Sequence[tuple[Frame, str, bool]]) -> list[list[int]]:
        """Return :meth:`response_ids` of frames, texts and whether they are complete, encoded together."""
        written = [frame.lead + text.strip() + (frame.end if complete else "") for frame, text, complete in responses]
        prompts = [frame.prompt for frame, _, _ in responses]
        texts = [prompt + response for prompt, response in zip(prompts, written, strict=True)]
        wholes = self._encode_all(texts)
        starts = [frame.ids for frame, _, _ in responses]
        # where the tokenizer joins prompt and response, the response is encoded on its own
        return [
            whole[len(ids) :] if whole[: len(ids)] == ids else self._encode(response)
            for ids, whole, response in zip(starts, wholes, written, strict=True)
        ]

    def read_back(self, token_ids: Sequence[int], text: str) -> str | None:
        """Return what the tokens of a response read as where that is another text, white space aside; else None."""
        read = self.text_of(token_ids)
        return None if "".join(read.split()) == "".join(text.split()) else read

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response's tokens: without the token that ended it, and without special tokens."""
        said = token_ids[:-1] if token_ids and token_ids[-1] in self.end_ids else token_ids
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    def full_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        """Return the token ids of the whole conversation, as a score model reads it."""
        if self.template is None:
            return self._encode(self._whole(messages, text))
        filled = self.plain_prompt(messages) + text
        if self.tokenizer.eos_token_id is None:  # an encoder, whose tokenizer puts marks of its own around a text
            ids: list[int] = self.tokenizer(filled).input_ids
            return ids
        return [*self._with_bos(self._encode(filled)), self.tokenizer.eos_token_id]

    def full_text(self, messages: Sequence[Message], text: str) -> str:
        """Return the whole conversation as a score model reads it, as text."""
        return self._whole(messages, text) if self.template is None else self.plain_prompt(messages) + text

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return the text up to the point where the model's response begins."""
        if self.template is not None:
            return self.plain_prompt(messages)
        return self._render(messages, add_generation_prompt=True)

    def plain_prompt(self, messages: Sequence[Message]) -> str:
        """Return the plain template's text up to the response, without special tokens."""
        assert self.template is not None
        if len(messages) != 1 or messages[0]["role"] != "user":
            kind = f"{len(messages)} messages" if len(messages) != 1 else f"one message of {messages[0]['role']!r}"
            raise DataError(
                f"a conversation of {kind} does not fit the plain template {self.template!r}.",
                "Use a tokenizer with a chat template, or single-turn prompts.",
            )
        return self.template.replace("{prompt}", messages[0]["content"])

    def frames_responses(self) -> bool:
        """Tell whether a response stands in more than white space, its end token and what asks for it."""
        if self.template is not None:
            return False
        messages = [{"role": "user", "content": PLACEHOLDER[::-1]}]
        prompt = self.prompt_text(messages)
        lead, end = self._around_response(messages, prompt)
        return self._whole(messages, PLACEHOLDER) != prompt + lead + PLACEHOLDER + end

    def _around_response(self, messages: Sequence[Message], prompt: str) -> tuple[str, str]:
        """Return the white space that the template writes before a response, and what ends one: up to its end token.

        ``prompt`` is the text that asks for the response. Anything but white space that stands before a response in
        the whole conversation alone is the template's, not the model's: a block of thought that nobody thought.
        """
        before, is_written, after = self._whole(messages, PLACEHOLDER).partition(PLACEHOLDER)
        if not is_written:
            raise DataError(
                f"model {self.tokenizer.name_or_path!r}: its chat template does not write the assistant's turn after "
                f"{_roles(messages)}.",
                "Give a template that does.",
            )
        self._check_asks(messages, prompt, before)
        begin, expected = before.rstrip(), prompt.rstrip()
        is_alike = begin[-ALIKE:] == expected[-ALIKE:]
        space, asked_space = before[len(begin) :], prompt[len(expected) :]
        lead = space.removeprefix(asked_space) if is_alike and space.startswith(asked_space) else ""
        return lead, self._end_of_response(after)

    def check_asks(self, messages: Sequence[Message]) -> None:
        """Raise ``DataError`` where the chat template takes no ``add_generation_prompt`` and should."""
        if self.template is not None:
            return
        before = self._whole(messages, PLACEHOLDER).partition(PLACEHOLDER)[0]
        self._check_asks(messages, self.prompt_text(messages), before)

    def _check_asks(self, messages: Sequence[Message], prompt: str, before: str) -> None:
        """Compare what asks for a response with what stands before one; raise as :meth:`check_asks`."""
        is_alike = before.rstrip()[-ALIKE:] == prompt.rstrip()[-ALIKE:]
        if not is_alike and prompt == self._render(messages, add_generation_prompt=False):
            raise DataError(
                f"model {self.tokenizer.name_or_path!r}: its chat template begins a response with {before[-40:]!r}, "
                "and does not write that where it is asked for one (add_generation_prompt): prompts would end before "
                "the assistant's turn.",
                "Correct the template.",
            )

    def _end_of_response(self, after: str) -> str:
        """Return what follows a response up to the first token that ends one."""
        tokens = self._end_tokens
        places = [after.find(token) + len(token) for token in tokens if token in after]
        if not places:
            raise DataError(
                f"model {self.tokenizer.name_or_path!r}: after a response its chat template writes {after!r}, which "
                f"holds none of the tokens that end one ({', '.join(tokens)}): no response could be told to end.",
                "Correct the template, or add its end token to eos_token_id in generation_config.json.",
            )
        return after[: min(places)]

    def _whole(self, messages: Sequence[Message], text: str) -> str:
        return self._render([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return render_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **self.options)
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"model {self.tokenizer.name_or_path!r}: its chat template refuses a conversation of "
                f"{_roles(messages)}: {error}.",
                "See which roles and turns the template takes, and remove or rewrite these prompts.",
            ) from None

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else [*self._bos, *ids]

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        ).input_ids
        return ids


def open_formatter(spec: Model) -> Formatter:
    """Return the formatter of a model: of its tokenizer, its template with its options, and its end tokens."""
    tokenizer = load_tokenizer(spec)
    ends_texts = not isinstance(spec, SequenceClassifier)
    end_ids = end_token_ids(generation_config(spec), tokenizer) if ends_texts else ()
    return Formatter(tokenizer, spec.template, spec.template_options, end_ids)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], kind: str = "model") -> None:
    """Raise ``ConfigError`` unless a tokenizer has one chat template, or a default one, that reads the options."""
    owner = f"{kind} {tokenizer.name_or_path!r}"
    template = tokenizer.chat_template
    if not template:
        pair = " Or set text_pair: true, for a model that reads question and answer as two texts." * has_own_marks(
            tokenizer
        )
        raise ConfigError(
            f"{owner}: its tokenizer has no chat template.",
            f"Set template for it, for example 'USER: {{prompt}} ASSISTANT:'.{pair}",
        )
    if isinstance(template, dict) and "default" not in template:
        raise ConfigError(
            f"{owner}: its tokenizer has several chat templates and none called default: "
            f"{', '.join(sorted(template))}.",
            f"Copy the one to use, such as additional_chat_templates/{min(template)}.jinja, to chat_template.jinja in "
            "the model's directory.",
        )
    written = str(tokenizer.get_chat_template())
    if unread := [option for option in options if not re.search(rf"\b{re.escape(option)}\b", written)]:
        raise ConfigError(
            f"{owner}: its chat template does not read template_options {', '.join(unread)}.",
            "Correct the name, or leave it out.",
        )


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """Return the text that a tokenizer's chat template makes of messages, on ``TEMPLATE_DATE`` whatever the day."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_CLOCK + template
    return str(tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options))


def text_identity(model: Model) -> dict[str, Any]:
    """Return what decides, beside its files, how the texts of a model are written; for the identity of a stage."""
    named: dict[str, Any] = {"template": model.template}
    if model.template_options:
        named["template_options"] = dict(model.template_options)
    if model.template is not None and model.template[:1] in ("<", "["):  # no token of a beginning looks otherwise
        tokenizer = load_tokenizer(model)
        if _added_bos(tokenizer) and model.template.startswith(str(tokenizer.bos_token)):
            named["beginning"] = "once"  # before, the tokenizer's own stood before it
    return named


def response_identity(model: Model) -> dict[str, Any]:
    """Return ``text_identity``, and the version of the tokens of responses that come as text, where it matters."""
    tokens = {"tokenisation": TOKENISATION} if open_formatter(model).frames_responses() else {}
    return {**text_identity(model), **tokens}


def ending_identity(model: Model) -> dict[str, Any]:
    """Return what decides the texts of sampled responses where a token that ends them is not special; else nothing."""
    try:
        tokenizer = load_tokenizer(model)
        ends = end_token_ids(generation_config(model), tokenizer)
    except DataError:  # what cannot be opened samples nothing; a finished stage needs it no more
        return {}
    is_text = any(tokenizer.decode([index], skip_special_tokens=True) for index in ends)
    return {"ending": "no part of the text"} if is_text else {}


def convention(model: Model) -> dict[str, Any]:
    """Return what a manifest says of how a model's texts are written: the plain template, if any, and a digest."""
    formatter = open_formatter(model)
    options = {"options": formatter.options} if formatter.options else {}
    return {"plain": model.template, "digest": formatter.digest, **options}


def require_convention(model: Model, written: Mapping[str, Any] | None, origin: str) -> dict[str, Any]:
    """Check that a model writes text by the convention of an artifact, and return it.

    Args:
        model: The model that is to read or continue the artifact's texts.
        written: The convention that the artifact's manifest records; None where it records none (older artifacts).
        origin: The artifact, for messages.

    Raises:
        DataError: The conventions differ; both are named.
    """
    own = convention(model)
    if written is None or written["digest"] == own["digest"]:
        return own
    raise DataError(
        f"{origin}: made with {_shown(written)}, but model {model.model!r} writes texts with {_shown(own)}: the same "
        "tokens would be other texts.",
        "Give every stage of a run the same template and tokenizer.",
    )


def _shown(written: Mapping[str, Any]) -> str:
    if written["plain"] is not None:
        return f"the template {written['plain']!r}"
    options = f", template_options {written['options']}" if written.get("options") else ""
    return f"a tokenizer's chat template (digest {written['digest'][:12]}{options})"


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token that a tokenizer adds to a text by itself, or nothing."""
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if adds else []


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)
