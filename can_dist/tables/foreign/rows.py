"""One row of somebody else's data to a prompt or a pair: the formats known, and what each demands of a row."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from can_dist.errors import DataError
from can_dist.tables.foreign.sources import Row, show

Messages = list[dict[str, str]]
"""``[{"role": ..., "content": ...}, ...]``."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
_LAST_TURN = "\n\nAssistant:"


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


Parsed = Pair | Prompt | Rated | SetAside
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


def bad(where: str, field: str, found: object, expected: str, do: str) -> DataError:
    """Return the error of a field: where it is, what was found, what was expected, what to do."""
    return DataError(f"{where}, field '{field}': found {show(found)}, expected {expected}.\n  {do}")


# ------------------------------------------------------------------------------------------------------ prompts


def _prompt(row: Row, where: str) -> Prompt:
    return Prompt(read_messages(row.get("prompt"), where, "prompt"))


def _prompt_messages(row: Row, where: str) -> Prompt:
    value = row.get("messages")
    if not isinstance(value, list):
        raise bad(where, "messages", value, "a list of messages", "Correct the row, or remove it.")
    return Prompt(read_messages(value, where, "messages"))


def prompt_with_responses(row: Row, where: str) -> tuple[Messages, list[str]]:
    """Return the prompt of a row and its responses (column ``responses``, a list of texts; '' is a response)."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        raise bad(where, "responses", responses, "a list of texts", "Correct the row, or remove it.")
    for index, text in enumerate(responses):
        if not isinstance(text, str):
            raise bad(where, f"responses[{index}]", text, "a string", "Correct the row, or remove it.")
        _check_encodable(text, where, f"responses[{index}]")
    return read_messages(row.get("prompt"), where, "prompt"), responses


def _instruction(row: Row, where: str) -> Prompt:
    return Prompt(read_messages(row.get("instruction"), where, "instruction"))


def read_messages(value: object, where: str, field: str) -> Messages:
    """Return the messages of a prompt: text, HH-RLHF dialogue text that ends in the answer's mark, or a list."""
    if isinstance(value, list):
        messages = [_message(item, where, f"{field}[{i}]") for i, item in enumerate(value)]
        _check_ends_before_answer(messages, where, field)
        return messages
    if not isinstance(value, str):
        raise bad(where, field, value, "a string or a list of messages", "Correct the row, or remove it.")
    _check_encodable(value, where, field)
    if value.startswith("\n\nHuman:") and value.rstrip().endswith(_LAST_TURN):
        messages = _turns(value.rstrip().removesuffix(_LAST_TURN), where, field)
        _check_ends_before_answer(messages, where, field)
        return messages
    if not value.strip():
        raise bad(where, field, value, "a prompt that is not empty", "Remove the row.")
    return [{"role": "user", "content": value}]


def _message(item: object, where: str, field: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise bad(where, field, item, "a message {role, content}", "Correct the row, or remove it.")
    for name in ("role", "content"):
        if not isinstance(item.get(name), str):
            found = item.get(name, "no such key")
            raise bad(where, f"{field}.{name}", found, f"a string {name}", "Correct the message, or remove the row.")
        _check_encodable(item[name], where, f"{field}.{name}")
    if item["role"] not in _ROLES:
        raise bad(where, f"{field}.role", item["role"], f"one of {', '.join(_ROLES)}", "Rename the role.")
    return {"role": item["role"], "content": item["content"]}


def _check_ends_before_answer(messages: Messages, where: str, field: str) -> None:
    if not messages:
        raise bad(where, field, messages, "at least one message", "Remove the row.")
    last = messages[-1]
    if last["role"] == "assistant":
        expected = "a prompt that ends before the assistant's turn"
        raise bad(where, field, last, expected, "Drop the last message: it is the response.")
    if all(message["role"] != "user" for message in messages):
        raise bad(where, field, messages, "a message of role user", "Add the user's turn, or remove the row.")
    if not last["content"].strip():
        raise bad(where, field, last, "a last message that is not empty", "Remove the row.")


def _check_encodable(text: str, where: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        do = "Write the file again with whole characters."
        raise bad(where, field, text[error.start : error.end], "Unicode text without lone surrogates", do) from error


def _turns(text: str, where: str, field: str) -> Messages:
    """The turns of an HH-RLHF dialogue; white space around a turn belongs to the marks and is dropped.

    A speaker may have two turns in a row (10 of the 4,652 usable test pairs); they stay two messages.
    """
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        expected = "a dialogue that starts with '\\n\\nHuman:'"
        raise bad(where, field, text, expected, "Add the mark, or a column prompt.")
    return [
        {"role": _TURN_ROLES[name], "content": turn.strip()} for name, turn in zip(rest[::2], rest[1::2], strict=True)
    ]


# --------------------------------------------------------------------------------------------- chosen and rejected


def _explicit(row: Row, where: str) -> Pair | SetAside:
    """``prompt, chosen, rejected``; lists may hold the answer alone, or the dialogue with the prompt in front."""
    if isinstance(_same_type(row, where)[0], str):
        a, b = texts(row, where, "chosen", "rejected")
        if a.startswith("\n\nHuman:") and b.startswith("\n\nHuman:"):
            do = "Drop the column prompt, which these dialogues hold, or cut it off them."
            raise bad(where, "chosen", a, "the response alone, beside a column prompt", do)
        return Pair(read_messages(row.get("prompt"), where, "prompt"), a, b)
    answers = [_dialogue(row[name], where, name) for name in ("chosen", "rejected")]
    prompt = read_messages(row.get("prompt"), where, "prompt")
    if all(len(answer) == 1 for answer in answers):
        return Pair(prompt, answers[0][0]["content"], answers[1][0]["content"])
    if any(answer[0]["role"] == "assistant" for answer in answers):
        return SetAside("a response has several turns")
    pair = _last_turns(*answers)
    if isinstance(pair, Pair):
        users = [message["content"] for message in pair.messages if message["role"] == "user"]
        if pair.messages != prompt and not (len(prompt) == 1 and prompt[0]["content"] in users):
            raise bad(where, "chosen", pair.messages, "a dialogue that starts with the prompt", "Correct the row.")
        _check_ends_before_answer(pair.messages, where, "chosen")
    return pair


def _implicit(row: Row, where: str) -> Pair | SetAside:
    """``chosen, rejected`` with the prompt in front of both: message lists, or HH-RLHF dialogues as text."""
    chosen, rejected = _same_type(row, where)
    if isinstance(chosen, list):
        pair = _last_turns(_dialogue(chosen, where, "chosen"), _dialogue(rejected, where, "rejected"))
        if isinstance(pair, Pair):
            _check_ends_before_answer(pair.messages, where, "chosen")
        return pair
    for name in ("chosen", "rejected"):
        _check_encodable(row[name], where, name)
        if _LAST_TURN not in row[name]:
            do = "Add a column prompt, or write dialogues as lists of messages."
            raise bad(where, name, row[name], "a dialogue with turns '\\n\\nHuman:' and '\\n\\nAssistant:'", do)
    (prompt, _, a), (other, _, b) = chosen.rpartition(_LAST_TURN), rejected.rpartition(_LAST_TURN)
    if "\n\nHuman:" in a or "\n\nHuman:" in b:
        return SetAside("the dialogue does not end with the assistant's turn")
    if prompt != other:
        return SetAside("the dialogues part before the last turn")
    if not prompt.strip():
        raise bad(where, "chosen", chosen, "a turn of Human before the answer", "Remove the row.")
    messages = _turns(prompt, where, "chosen")
    if messages[-1]["role"] != "user" or not messages[-1]["content"]:
        return SetAside("the prompt does not end with a user's turn")
    return Pair(messages, a.strip(), b.strip())


def _same_type(row: Row, where: str) -> tuple[Any, Any]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise bad(where, name, value, "a string or a list of messages", "Correct the row, or remove it.")
    if isinstance(chosen, str) != isinstance(rejected, str):
        types = f"chosen is {_type(chosen)}, rejected is {_type(rejected)}"
        raise DataError(
            f"{where}, fields 'chosen' and 'rejected': found different types ({types}), expected the same.\n"
            "  Write both as text, or both as lists of messages."
        )
    return chosen, rejected


def _type(value: object) -> str:
    return "a string" if isinstance(value, str) else "a list"


def _dialogue(value: list[object], where: str, field: str) -> Messages:
    messages = [_message(item, where, f"{field}[{i}]") for i, item in enumerate(value)]
    if not messages or messages[-1]["role"] != "assistant":
        found = messages[-1] if messages else messages
        raise bad(where, field, found, "a last message of role assistant", "Add the response, or remove the row.")
    return messages


def _last_turns(chosen: Messages, rejected: Messages) -> Pair | SetAside:
    if chosen[:-1] != rejected[:-1]:
        return SetAside("the dialogues part before the last turn")
    if not chosen[:-1] or chosen[-2]["role"] == "assistant":
        return SetAside("the prompt does not end with a user's turn")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def texts(row: Row, where: str, *names: str) -> tuple[str, ...]:
    """Return the texts of some columns of a row, checked."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise bad(where, name, row.get(name), "a string", "Correct the row, or remove it.")
        _check_encodable(row[name], where, name)
    return tuple(row[name] for name in names)


# ------------------------------------------------------------------------------------------------ PKU-SafeRLHF


def _pku(row: Row, where: str) -> Pair:
    a, b = texts(row, where, "response_0", "response_1")
    return Pair(
        read_messages(row.get("prompt"), where, "prompt"),
        a,
        b,
        better=_label(row, where, "better_response_id"),
        safer=_label(row, where, "safer_response_id"),
        safe_a=safe_flag(row, where, "is_response_0_safe"),
        safe_b=safe_flag(row, where, "is_response_1_safe"),
    )


def _label(row: Row, where: str, name: str) -> int:
    value = row.get(name)
    if value is None:
        return -1
    if isinstance(value, bool) or value not in (0, 1):
        raise bad(where, name, value, "0, 1 or null", "Correct the row, or remove it.")
    return int(value)


def safe_flag(row: Row, where: str, name: str) -> bool | None:
    """Return a flag that may be null, checked."""
    value = row.get(name)
    if value is not None and value not in (0, 1):
        raise bad(where, name, value, "true, false or null", "Correct the row, or remove it.")
    return None if value is None else bool(value)


FORMATS = (
    Format(
        "pku-saferlhf",
        "PKU-SafeRLHF pairs",
        ("prompt", "response_0", "response_1"),
        _pku,
        one_of=("better_response_id", "safer_response_id"),
        also=("is_response_0_safe", "is_response_1_safe"),
    ),
    Format(
        "preference",
        "TRL preference",
        ("prompt", "chosen", "rejected"),
        _explicit,
        names_criteria=False,
        better_first=True,
    ),
    Format(
        "preference-implicit",
        "TRL preference with implicit prompt, or HH-RLHF",
        ("chosen", "rejected"),
        _implicit,
        names_criteria=False,
        better_first=True,
    ),
    Format("prompt", "TRL prompt-only", ("prompt",), _prompt, pairs=False),
    Format("messages", "TRL prompt-only messages", ("messages",), _prompt_messages, pairs=False, message_lists=False),
    Format("instruction", "AlpacaEval instructions", ("instruction",), _instruction, pairs=False),
)
