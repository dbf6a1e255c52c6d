"""One row of somebody else's data to a prompt or a pair: the formats known, and what each demands of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from can_dist.errors import DataError
from can_dist.tables.foreign.messages import (
    LAST_TURN,
    Messages,
    check_ends_before_answer,
    check_text,
    read_message,
    read_messages,
    read_turns,
)
from can_dist.tables.json_rows import Row
from can_dist.tables.misfits import bad, is_nothing


@dataclass(frozen=True)
class Prompt:
    """A prompt: messages that end before an assistant's turn."""

    messages: Messages


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; a label is 0 (a), 1 (b) or -1 (none), a safety label may be None."""

    messages: Messages
    a: str
    b: str
    better: int = 0
    safer: int = 0
    safe_a: bool | None = None
    safe_b: bool | None = None

    @property
    def conflict(self) -> bool:
        """Whether the response called safer is labelled unsafe and the other one safe."""
        safe = (self.safe_a, self.safe_b)
        return self.safer >= 0 and safe[self.safer] is False and safe[1 - self.safer] is True


@dataclass(frozen=True)
class Rating:
    """A response with people's rating of it by itself; ``safe`` may be None."""

    text: str
    rating: float
    safe: bool | None = None


@dataclass(frozen=True)
class Rated:
    """Responses to one prompt that were rated one by one; ``criterion`` is what a higher rating means."""

    messages: Messages
    responses: tuple[Rating, ...]
    criterion: Literal["better", "safer"]


@dataclass(frozen=True)
class SetAside:
    """A row that is well formed but holds no usable prompt or pair, and why."""

    reason: str


@dataclass(frozen=True)
class Answered:
    """Responses to one prompt, without labels; ``texts`` may hold empty ones."""

    messages: Messages
    texts: tuple[str, ...]


Parsed = Pair | Prompt | Rated | Answered | SetAside
"""What a row may be."""


@dataclass(frozen=True)
class Format:
    """A format: the columns that identify it, and the function that parses a row (given where it is, for messages)."""

    key: str
    title: str
    needs: tuple[str, ...]
    parse: Callable[[Row, str], Parsed]
    one_of: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    about: tuple[str, ...] = ()  # published columns that tell of the row or its responses, not of what is asked
    pairs: bool = True
    names_criteria: bool = True  # says by what a response is better, not only which was chosen
    better_first: bool = False  # by construction response a is the better one
    message_lists: bool = True  # its texts may also be lists of messages

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns the format uses where they are there."""
        return (*self.needs, *self.one_of, *self.also)

    def needs_text(self) -> str:
        """Return the columns needed, for a message."""
        return ", ".join(self.needs) + (f", and {' or '.join(self.one_of)}" if self.one_of else "")

    def title_of(self, kind: str) -> str:
        """Return the title of a variant, for the announcement."""
        if self.key == "preference-implicit":
            return "HH-RLHF pairs" if kind == "hh-rlhf" else "TRL preference with implicit prompt"
        return self.title + (" (message lists)" if kind.endswith("-conversational") else "")

    def kind(self, row: Row) -> str:
        """Return ``key``, or the key of its variant that the row's types tell."""
        if self.key == "preference-implicit":
            return "hh-rlhf" if isinstance(row["chosen"], str) else "preference-implicit"
        if not self.message_lists:
            return self.key
        lists = any(isinstance(row[name], list) for name in self.needs)
        return f"{self.key}-conversational" if lists else self.key


# ------------------------------------------------------------------------------------------------------ prompts


def _prompt(row: Row, place: str) -> Prompt:
    return Prompt(read_messages(row.get("prompt"), place, "prompt"))


def _prompt_messages(row: Row, place: str) -> Prompt:
    value = row.get("messages")
    if isinstance(value, str):
        check_text(value, place, "messages")
    if not isinstance(value, list):
        raise bad(place, "messages", value, "a list of messages", "Correct the row, or remove it.")
    return Prompt(read_messages(value, place, "messages"))


def _answered(row: Row, place: str) -> Answered:
    """``prompt`` and ``responses``, a list of texts; '' is a response."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        raise bad(place, "responses", responses, "a list of texts", "Correct the row, or remove it.")
    for index, text in enumerate(responses):
        if not isinstance(text, str):
            raise bad(place, f"responses[{index}]", text, "a string", "Correct the row, or remove it.")
        check_text(text, place, f"responses[{index}]")
    return Answered(read_messages(row.get("prompt"), place, "prompt"), tuple(responses))


def _instruction(row: Row, place: str) -> Prompt:
    return Prompt(_joined(row, place))


def _joined(row: Row, place: str) -> Messages:
    """Return Alpaca's prompt: the instruction, and on a line of its own the input, where there is one."""
    instruction, given = row.get("instruction"), row.get("input")
    if is_nothing(given):
        return read_messages(instruction, place, "instruction")
    if not isinstance(given, str) or not isinstance(instruction, str):
        expected = "a text beside an instruction that is a text"
        raise bad(place, "input", given, expected, "Write the input into the instruction.")
    for name, text in (("instruction", instruction), ("input", given)):
        read_messages(text, place, name)
    return [{"role": "user", "content": f"{instruction}\n{given}"}]


# --------------------------------------------------------------------------------------------- chosen and rejected


def _explicit(row: Row, place: str) -> Pair | SetAside:
    return _beside(row, place, read_messages(row.get("prompt"), place, "prompt"))


def _alpaca_pair(row: Row, place: str) -> Pair | SetAside:
    return _beside(row, place, _joined(row, place))


def _beside(row: Row, place: str, prompt: Messages) -> Pair | SetAside:
    """``chosen, rejected`` beside a prompt; lists may hold the answer alone, or the dialogue with the prompt first."""
    if isinstance(_same_type(row, place)[0], str):
        a, b = texts(row, place, "chosen", "rejected")
        if a.startswith("\n\nHuman:") and b.startswith("\n\nHuman:"):
            do = "Drop the column prompt, which these dialogues hold, or cut it off them."
            raise bad(place, "chosen", a, "the response alone, beside a column prompt", do)
        return Pair(prompt, a, b)
    answers = [_dialogue(row[name], place, name) for name in ("chosen", "rejected")]
    if all(len(answer) == 1 for answer in answers):
        return Pair(prompt, answers[0][0]["content"], answers[1][0]["content"])
    if any(answer[0]["role"] == "assistant" for answer in answers):
        return SetAside("a response has several turns")
    pair = _last_turns(*answers)
    if isinstance(pair, Pair):
        users = [message["content"] for message in pair.messages if message["role"] == "user"]
        if pair.messages != prompt and not (len(prompt) == 1 and prompt[0]["content"] in users):
            raise bad(place, "chosen", pair.messages, "a dialogue that starts with the prompt", "Correct the row.")
        check_ends_before_answer(pair.messages, place, "chosen")
    return pair


def _implicit(row: Row, place: str) -> Pair | SetAside:
    """``chosen, rejected`` with the prompt in front of both: message lists, or HH-RLHF dialogues as text."""
    chosen, rejected = _same_type(row, place)
    if isinstance(chosen, list):
        pair = _last_turns(_dialogue(chosen, place, "chosen"), _dialogue(rejected, place, "rejected"))
        if isinstance(pair, Pair):
            check_ends_before_answer(pair.messages, place, "chosen")
        return pair
    for name in ("chosen", "rejected"):
        check_text(row[name], place, name)
        if LAST_TURN not in row[name]:
            do = "Add a column prompt, or write dialogues as lists of messages."
            raise bad(place, name, row[name], "a dialogue with turns '\\n\\nHuman:' and '\\n\\nAssistant:'", do)
    (prompt, _, a), (other, _, b) = chosen.rpartition(LAST_TURN), rejected.rpartition(LAST_TURN)
    if "\n\nHuman:" in a or "\n\nHuman:" in b:
        return SetAside("the dialogue does not end with the assistant's turn")
    if prompt != other:
        return SetAside("the dialogues part before the last turn")
    if not prompt.strip():
        raise bad(place, "chosen", chosen, "a turn of Human before the answer", "Remove the row.")
    messages = read_turns(prompt, place, "chosen")
    if messages[-1]["role"] != "user" or not messages[-1]["content"]:
        return SetAside("the prompt does not end with a user's turn")
    return Pair(messages, a.strip(), b.strip())


def _same_type(row: Row, place: str) -> tuple[Any, Any]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise bad(place, name, value, "a string or a list of messages", "Correct the row, or remove it.")
    if isinstance(chosen, str) != isinstance(rejected, str):
        types = f"chosen is {_type(chosen)}, rejected is {_type(rejected)}"
        raise DataError(
            f"{place}, fields 'chosen' and 'rejected': found different types ({types}), expected the same.\n",
            "Write both as text, or both as lists of messages.",
        )
    return chosen, rejected


def _type(value: object) -> str:
    return "a string" if isinstance(value, str) else "a list"


def _dialogue(value: list[object], place: str, field: str) -> Messages:
    messages = [read_message(item, place, f"{field}[{i}]") for i, item in enumerate(value)]
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1] if messages else messages
        raise bad(place, field, last, "a last message of role assistant", "Add the response, or remove the row.")
    return messages


def _last_turns(chosen: Messages, rejected: Messages) -> Pair | SetAside:
    if chosen[:-1] != rejected[:-1]:
        return SetAside("the dialogues part before the last turn")
    if not chosen[:-1] or chosen[-2]["role"] == "assistant":
        return SetAside("the prompt does not end with a user's turn")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def texts(row: Row, place: str, *names: str) -> tuple[str, ...]:
    """Return the texts of some columns of a row, checked."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise bad(place, name, row.get(name), "a string", "Correct the row, or remove it.")
        check_text(row[name], place, name)
    return tuple(row[name] for name in names)


# ------------------------------------------------------------------------------------------------ PKU-SafeRLHF


def _pku(row: Row, place: str) -> Pair:
    a, b = texts(row, place, "response_0", "response_1")
    return Pair(
        read_messages(row.get("prompt"), place, "prompt"),
        a,
        b,
        better=_label(row, place, "better_response_id"),
        safer=_label(row, place, "safer_response_id"),
        safe_a=safe_flag(row, place, "is_response_0_safe"),
        safe_b=safe_flag(row, place, "is_response_1_safe"),
    )


def _label(row: Row, place: str, name: str) -> int:
    value = row.get(name)
    if value is None:
        return -1
    if isinstance(value, bool) or value not in (0, 1):
        raise bad(place, name, value, "0, 1 or null", "Correct the row, or remove it.")
    return int(value)


def safe_flag(row: Row, place: str, name: str) -> bool | None:
    """Return a flag that may be null, checked."""
    value = row.get(name)
    if value is not None and value not in (0, 1):
        raise bad(place, name, value, "true, false or null", "Correct the row, or remove it.")
    return None if value is None else bool(value)


PREFERENCE = ("chosen", "rejected")

FORMATS = (
    Format(
        "pku-saferlhf",
        "PKU-SafeRLHF pairs",
        ("prompt", "response_0", "response_1"),
        _pku,
        one_of=("better_response_id", "safer_response_id"),
        also=("is_response_0_safe", "is_response_1_safe"),
        about=("prompt_source",),
    ),
    Format(
        "preference",
        "TRL preference",
        ("prompt", *PREFERENCE),
        _explicit,
        about=("messages",),  # UltraFeedback binarized: the prompt with the chosen response
        names_criteria=False,
        better_first=True,
    ),
    Format(
        "alpaca-preference",
        "Alpaca preference",
        ("instruction", *PREFERENCE),
        _alpaca_pair,
        also=("input",),
        names_criteria=False,
        better_first=True,
    ),
    Format(
        "preference-implicit",
        "TRL preference with implicit prompt, or HH-RLHF",
        PREFERENCE,
        _implicit,
        names_criteria=False,
        better_first=True,
    ),
    Format("prompt", "TRL prompt-only", ("prompt",), _prompt, pairs=False),
    Format("messages", "TRL prompt-only messages", ("messages",), _prompt_messages, pairs=False, message_lists=False),
    Format(
        "instruction",
        "AlpacaEval instructions",
        ("instruction",),
        _instruction,
        also=("input",),
        about=("dataset",),  # AlpacaEval's: which collection an instruction is from
        pairs=False,
    ),
)

ANSWERED = Format(
    "responses",
    "brought responses",
    ("prompt", "responses"),
    _answered,
    about=("k", "sample"),
    pairs=False,
    message_lists=False,
)
"""What ``generate.responses`` reads; not among the formats of prompts and preferences."""
