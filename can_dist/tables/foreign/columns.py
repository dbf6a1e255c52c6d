"""Columns beside those of a format: carried into the prompt, refused, or ignored where no two prompts become one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from can_dist.errors import DataError
from can_dist.tables.foreign.messages import MEANT_FOR_TEMPLATES, Messages, bare, check_text, ignored_keys, words
from can_dist.tables.foreign.rows import Format
from can_dist.tables.json_rows import ARRAY_ENDINGS, Row, is_json
from can_dist.tables.misfits import bad, is_nothing, show

SYSTEM = words(
    "system systemprompt systemmessage systeminstruction systeminstructions systemtext systemcontent sysprompt sys"
)
"""Columns (:func:`bare`) whose text becomes the first message."""

_OF_RESPONSES = words("name channel citations files refusal reasoning thinking thought thoughts")
CHANGES_THE_TASK = (MEANT_FOR_TEMPLATES - _OF_RESPONSES) | words(
    "input inputs context contexts document passage history chathistory conversationhistory dialoghistory "
    "dialoguehistory messagehistory previousturns previousmessages developer developerprompt developermessage"
)
"""Columns that change what the model is asked, and that no format here carries unless it reads them."""

_EMPTY_TEXTS = ("[]", "{}", "null", "None", "nan")
_ABOUT_ANY_ROW = words(
    "id idx index uid uuid guid row rowid rownumber number exampleid sampleid questionid responseid pairid "
    "conversationid indexlevel0 unnamed0 output outputs response responses completion completions answer answers "
    "chosen rejected solution generator model models score scores reward rewards rating ratings seed temperature topp "
    "reasoning thinking thought thoughts explanation finishreason usage created createdat"
)
"""Names of a row, and what tells of responses: rows of one prompt may differ in them."""

_ABOUT_RESPONSES = words(
    "chosen rejected response responses completion completions score scores rating ratings reward margin answer "
    "answers generation generations model models preference preferences annotator annotators"
)
"""Words in the names of columns that tell of the responses, in formats that have responses."""


def is_system(name: str) -> bool:
    """Return whether a column holds a system turn, by its name."""
    return bare(name) in SYSTEM


def text_of_system(row: Row, place: str) -> tuple[str, str] | None:
    """Return the column that holds a system turn and its text, or None where there is none or it is empty.

    Raises:
        DataError: the column holds no text, or two such columns hold different ones.
    """
    given = {name: value for name, value in row.items() if is_system(name) and not is_nothing(value)}
    for name, value in given.items():
        if not isinstance(value, str):
            raise bad(place, name, value, "a text: the system turn", "Write the prompt as messages.")
        check_text(value, place, name)
    if not given:
        return None
    if len(set(given.values())) > 1:
        names = list(given)
        raise bad(place, names[1], given[names[1]], f"the text of column {names[0]!r}", "Keep one of the two columns.")
    return next(iter(given.items()))


def with_system(messages: Messages, system: tuple[str, str] | None, place: str) -> Messages:
    """Return the messages with the system turn of a column in front, unless they begin with the same one.

    Raises:
        DataError: the messages begin with another system turn.
    """
    if system is None:
        return messages
    name, text = system
    first = next((message for message in messages if message["role"] in ("system", "developer")), None)
    if first is None:
        return [{"role": "system", "content": text}, *messages]
    if first["content"].strip() != text.strip():
        expected = f"the system turn of the messages, {show(first['content'])}"
        raise bad(place, name, text, expected, "Keep one of the two, or write both into the messages.")
    return messages


def check_task(row: Row, form: Format, messages: Messages, place: str) -> None:
    """Raise ``DataError`` where a column that the format does not read changes what the model is asked.

    A text that stands in the messages already, word for word, changes nothing.
    """
    for name, value in row.items():
        if name in form.reads or bare(name) not in CHANGES_THE_TASK or is_nothing(value):
            continue
        if isinstance(value, str):
            text = value.strip()
            if text in _EMPTY_TEXTS or any(text in message["content"] for message in messages):
                continue
        expected = f"nothing there: {form.title} has no such column, and without it the model is asked something else"
        remedy = (
            f"Write it into the prompt; or, if nothing is lost by it, drop the column:\n    {dropping([name], place)}"
        )
        raise bad(place, name, value, expected, remedy)
    if "messages" in row and "messages" not in form.reads and not is_ignored("messages", form):
        _check_settings(row["messages"], messages, place)


def _check_settings(value: object, messages: Messages, place: str) -> None:
    """Raise ``DataError`` where a column ``messages`` that is not read holds a system turn that the prompt has not."""
    said = {message["content"].strip() for message in messages}
    for index, turn in enumerate(value if isinstance(value, list) else []):
        is_setting = isinstance(turn, dict) and turn.get("role") in ("system", "developer")
        if is_setting and not is_nothing(turn.get("content")) and str(turn["content"]).strip() not in said:
            expected = "a turn of the prompt too: the column 'prompt' is read, not 'messages'"
            do = f"Write the prompt as a list of messages, or drop one of the two:\n    {dropping(['prompt'], place)}"
            raise bad(place, f"messages[{index}]", turn, expected, do)


def dropping(names: Sequence[str], place: str) -> str:
    """Return a command that writes a source again without some columns.

    Args:
        names: of the columns.
        place: file and row; of a hub data set its name in front.
    """
    source = place.rpartition(", row ")[0]
    if is_json(Path(source)):
        rows = ".[] | " if source.lower().endswith(ARRAY_ENDINGS) else ""
        read = f"gunzip -c {shlex.quote(source)} | " if source.lower().endswith(".gz") else ""
        deleted = shlex.quote(f"{rows}del({', '.join('.' + json.dumps(name) for name in names)})")
        return f"{read}jq -c {deleted}{'' if read else ' ' + shlex.quote(source)} > without.jsonl"
    if not Path(source).is_file():
        return f"datasets.load_dataset(...).remove_columns({list(names)}).to_parquet('without.parquet')"
    kind = "read_parquet" if source.endswith(".parquet") else "read_feather"
    written = f"import pandas as pd; pd.{kind}({source!r}).drop(columns={list(names)}).to_parquet('without.parquet')"
    return f"python -c {json.dumps(written)}"


def is_ignored(name: str, form: Format) -> bool:
    """Return whether a column may be passed over unread: it tells of the row or of its responses."""
    if name in form.reads or is_system(name) or bare(name) in CHANGES_THE_TASK:
        return False
    parts = re.split(r"[^a-z]+", name.lower())
    about_responses = _has_responses(form) and not _ABOUT_RESPONSES.isdisjoint(parts)
    return about_responses or name in form.about or bare(name) in _ABOUT_ANY_ROW


def _has_responses(form: Format) -> bool:
    return form.pairs or "responses" in form.needs


@dataclass
class Ignored:
    """What was dropped beside each prompt, so that no two prompts become one by the dropping."""

    first: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)  # content → where, hash by column
    keys: dict[str, None] = field(default_factory=dict)  # keys of messages that were ignored, in order

    def add(self, content: str, row: Row, form: Format, place: str) -> None:
        """Note the columns and message keys that a row's prompt was read without.

        Args:
            content: id of the prompt's content.
            row: as read.
            form: its format.
            place: file and row.

        Raises:
            DataError: an earlier row says the same prompt, and differs in one of them.
        """
        in_messages = ignored_keys(row, [name for name in form.reads if name in MESSAGE_FIELDS])
        self.keys.update(dict.fromkeys(in_messages))
        dropped: Mapping[str, object] = {name: row[name] for name in _unread(row, form)} | in_messages
        marks = {name: hash(repr(_asked(name, value))) for name, value in dropped.items() if not is_nothing(value)}
        first_where, first_marks = self.first.setdefault(content, (place, marks))
        names = [name for name in (*first_marks, *marks) if first_marks.get(name) != marks.get(name)]
        if names:
            columns = list(dict.fromkeys(name for name in names if name not in self.keys))
            drop = f"drop it:\n    {dropping(columns, place)}" if columns else "drop it from the messages."
            raise DataError(
                f"{place}, field '{names[0]}': found {show(dropped.get(names[0]))}, but {first_where} has another "
                "value beside the same prompt, and no reader uses this field: two tasks would become one.\n",
                f"If it belongs to what is asked, write it into the prompt; if not, {drop}",
            )


def _asked(name: str, value: object) -> object:
    """Return what a dropped column says of what is asked: Alpaca's column ``text`` ends with the answer."""
    return value.rpartition(ALPACA_ANSWER)[0] or value if name == "text" and isinstance(value, str) else value


ALPACA_ANSWER = "### Response:"
"""Stands before the answer in Alpaca's column ``text``, which holds the prompt and the answer."""


MESSAGE_FIELDS = ("prompt", "messages", "instruction", "context", "chosen", "rejected")
"""Columns that may hold lists of messages."""


def _unread(row: Row, form: Format) -> Iterable[str]:
    for name in row:
        known = name in form.reads or name == "prompt_id" or is_system(name) or bare(name) in CHANGES_THE_TASK
        if not known and not is_ignored(name, form):
            yield name
