"""A prompt's messages as files spell them: a text, a dialogue with marks, or a list of messages; no part is dropped."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from can_dist.tables.json_rows import Row
from can_dist.tables.misfits import bad, check_encodable, is_nothing

Messages = list[dict[str, str]]
"""``[{"role": ..., "content": ...}, ...]``."""

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_TURN = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def words(text: str) -> frozenset[str]:
    """Return the words of a text, each once."""
    return frozenset(text.split())


MEANT_FOR_TEMPLATES = words(
    "toolcalls toolcall functioncall toolcallid toolresponses toolresults toolplan tools functions name "
    "reasoningcontent reasoning reasoningdetails thinking thinkingcontent thinkingblocks thought thoughts refusal "
    "channel documents "
    "citations images image imageurl videos video audios audio attachments files chattemplatekwargs"
)
"""Names (:func:`bare`) in a message that chat templates write, or that stand for what was said beside the content."""

_PARTS = words("text input_text output_text image image_url input_image audio input_audio video file")
_LIST_OF_OBJECTS = re.compile(r"^(?:array\()?\[*\s*\{.*\}\s*\]*(?:,\s*dtype=object)?\s*\)?$", re.DOTALL)
_KEYS = (("role", "content"), ("from", "value"), ("role", "tool_calls"), ("role", "parts"))
_RENDERED = re.compile(
    r"^\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|system|prompter)\|>|"
    r"(?:BEGINNING OF CONVERSATION: )?(?:USER|User|Human): ).*"
    r"(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|\[/INST\]|"
    r"<\|assistant\|>|\n\s*Assistant:|\sASSISTANT:)\s*(?:<think>\s*)?$",
    re.DOTALL,
)
"""A text that begins with the mark of a turn and ends with the one that asks for a response."""
_PARSE_IT = (
    "It is a conversation written as text, as CSV, SQL and pandas do: parse the column (json.loads, or "
    "ast.literal_eval for Python's spelling) and write the file again"
)


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the id of a prompt: first 16 hex digits of the SHA-256 of ``[[role, content], ...]`` as compact JSON."""
    pairs = [[message["role"], message["content"]] for message in messages]
    text = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bare(name: str) -> str:
    """Return a column's or key's name without case and punctuation, so that toolCalls is tool_calls."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_messages(value: object, place: str, field: str) -> Messages:
    """Return the messages of a prompt: text, HH-RLHF dialogue text that ends in the answer's mark, or a list.

    Args:
        value: what the field holds.
        place: file and row, for messages.
        field: its name.

    Raises:
        DataError: the value is no prompt, or holds more than roles and texts can carry.
    """
    if isinstance(value, list):
        messages = [read_message(item, place, f"{field}[{i}]") for i, item in enumerate(value)]
        check_ends_before_answer(messages, place, field)
        return messages
    if not isinstance(value, str):
        raise bad(place, field, value, "a string or a list of messages", "Correct the row, or remove it.")
    check_text(value, place, field, "If a user typed this, write the prompt as a list of messages.")
    if value.startswith("\n\nHuman:") and value.rstrip().endswith(LAST_TURN):
        messages = read_turns(value.rstrip().removesuffix(LAST_TURN), place, field)
        check_ends_before_answer(messages, place, field)
        return messages
    if _RENDERED.match(value):
        expected = "what somebody said: this is a conversation that a chat template wrote already"
        do = "Write its turns as a list of messages; if a user typed the marks, write the text as one message."
        raise bad(place, field, value, expected, do)
    if not value.strip():
        raise bad(place, field, value, "a prompt that is not empty", "Remove the row.")
    return [{"role": "user", "content": value}]


def read_message(item: object, place: str, field: str) -> dict[str, str]:
    """Return one message, checked; a key that means something to a chat template is refused, not dropped."""
    if not isinstance(item, dict):
        remedy = "Correct the row, or remove it."
        if isinstance(item, str) and is_conversation(item):
            remedy = f"{_PARSE_IT}; with datasets, load_dataset(...).to_json(path)."
        raise bad(place, field, item, "a message {role, content}", remedy)
    for key, value in item.items():
        if bare(key) in MEANT_FOR_TEMPLATES and not is_nothing(value):
            remedy = "Remove the key if nothing is lost by it, write it into the content, or remove the row."
            raise bad(place, f"{field}.{key}", value, "no such key: roles and texts are carried, nothing else", remedy)
    for name in ("role", "content"):
        value = item.get(name, "no such key")
        if name == "content" and isinstance(value, list | dict):
            remedy = "Join the text parts into one text, or remove the row."
            raise bad(place, f"{field}.{name}", value, "a string content: parts and images are not carried", remedy)
        if not isinstance(item.get(name), str):
            raise bad(place, f"{field}.{name}", value, f"a string {name}", "Correct the message, or remove the row.")
        check_encodable(item[name], place, f"{field}.{name}")
    if item["role"] not in ROLES:
        raise bad(place, f"{field}.role", item["role"], f"one of {', '.join(ROLES)}", "Rename the role.")
    if item["role"] != "tool" and is_parts(item["content"]):
        remedy = "Join the text parts into one text, or remove the row."
        raise bad(place, f"{field}.content", item["content"], "a text, not content parts written as one", remedy)
    return {"role": item["role"], "content": item["content"]}


def ignored_keys(row: Row, fields: Sequence[str]) -> dict[str, list[object]]:
    """Return the keys of a row's prompt messages that no template is known to write, with their values."""
    ignored: dict[str, list[object]] = {}
    for field in fields:
        value = row.get(field)
        messages = value if isinstance(value, list) else []
        if field in ("chosen", "rejected"):
            messages = messages[:-1]
        for index, message in enumerate(messages):
            for key, entry in message.items() if isinstance(message, dict) else ():
                if key not in ("role", "content") and not is_nothing(entry):
                    ignored.setdefault(f"{field}[].{key}", []).append((index, entry))
    return ignored


def check_ends_before_answer(messages: Messages, place: str, field: str) -> None:
    """Raise ``DataError`` unless the messages hold a user's turn and end before the assistant's."""
    if not messages:
        raise bad(place, field, messages, "at least one message", "Remove the row.")
    last = messages[-1]
    if last["role"] == "assistant":
        expected = "a prompt that ends before the assistant's turn"
        raise bad(place, field, last, expected, "Drop the last message: it is the response.")
    if all(message["role"] != "user" for message in messages):
        raise bad(place, field, messages, "a message of role user", "Add the user's turn, or remove the row.")
    if not last["content"].strip():
        raise bad(place, field, last, "a last message that is not empty", "Remove the row.")


def check_text(text: str, place: str, field: str, way_out: str = "Or remove the row.") -> None:
    """Raise ``DataError`` for a text that is no Unicode, or that is a conversation written as text."""
    check_encodable(text, place, field)
    if is_conversation(text):
        expected = "a text that somebody wrote, or a list of messages"
        raise bad(place, field, text, expected, f"{_PARSE_IT}. {way_out}")


def read_turns(text: str, place: str, field: str) -> Messages:
    """Return the turns of an HH-RLHF dialogue; white space around a turn belongs to the marks and is dropped.

    A speaker may have two turns in a row (10 of the 4,652 usable test pairs); they stay two messages.
    """
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        expected = "a dialogue that starts with '\\n\\nHuman:'"
        raise bad(place, field, text, expected, "Add the mark, or a column prompt.")
    return [
        {"role": _TURN_ROLES[name], "content": turn.strip()} for name, turn in zip(rest[::2], rest[1::2], strict=True)
    ]


# ------------------------------------------------------------------------------------------------- values as text


def is_conversation(text: str) -> bool:
    """Return whether a text as a whole is a message, or a list of messages, in JSON or as Python prints it."""
    for value in _objects(text):
        if isinstance(value, str):  # NumPy prints arrays without commas, so that no parser reads them
            return any(all(re.search(rf"['\"]{key}['\"]\s*:", text) for key in keys) for keys in _KEYS)
        if not any(all(key in value for key in keys) for keys in _KEYS):
            return False
    return bool(_objects(text))


def is_parts(text: str) -> bool:
    """Return whether a text as a whole is a list of content parts, in JSON or as Python prints it."""
    objects = _objects(text)
    return bool(objects) and all(
        isinstance(value, dict) and value.get("type") in _PARTS and len(value) > 1 for value in objects
    )


def _objects(text: str) -> Sequence[dict[str, object] | str]:
    """Return the dictionaries that a text lists as a whole, or the text itself where it looks so and is unreadable."""
    stripped = text.strip()
    if stripped.startswith('"') and stripped.endswith('"'):  # JSON of JSON
        parsed = next(_parsed(stripped), None)
        stripped = parsed.strip() if isinstance(parsed, str) else stripped
    if not _LIST_OF_OBJECTS.match(stripped):
        return []
    parsed = next(_parsed(stripped), None)
    if parsed is None:
        return [stripped]
    entries: list[Any] = parsed if isinstance(parsed, list) else [parsed]
    while len(entries) == 1 and isinstance(entries[0], list):
        entries = entries[0]
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _parsed(text: str) -> Iterator[object]:
    """Yield the value of a text, as JSON or else as Python; nothing where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of odd escapes
                value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        yield value
        return
