"""Errors: one printed text, a remedy of its own, and both whole after a pickle."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import can_dist
from can_dist import errors
from can_dist.errors import CanDistError, ConfigError, DataError

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CanDistError)]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("texts", [("lm: no such directory.", "Give another."), ("lm: no such directory. Give it.",)])
def test_an_error_is_printed_as_one_text_and_survives_pickling(kind: Any, texts: tuple[str, ...]) -> None:
    error = kind(*texts)
    assert str(error) == " ".join(texts)
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(copied) is kind
        assert (str(copied), copied.message, copied.remedy) == (str(error), error.message, error.remedy)


def test_the_remedy_is_kept_apart_from_a_message_that_has_sentences_and_dots_of_its_own() -> None:
    error = DataError("a.jsonl: 3 rows. Expected 4 (v1.2. or later).", "Bring row 4.")
    assert error.remedy == "Bring row 4."
    assert error.message == "a.jsonl: 3 rows. Expected 4 (v1.2. or later)."
    assert str(error) == f"{error.message} {error.remedy}"


def test_a_single_message_has_no_remedy() -> None:
    assert ConfigError("beta: 0, expected above 0. Raise it.").remedy == ""


def test_what_a_caught_error_leads_to_keeps_both() -> None:
    with pytest.raises(ValueError, match=r"too few\. Bring more\.") as caught:
        raise DataError("too few.", remedy="Bring more.")
    assert isinstance(caught.value, DataError)
    assert caught.value.remedy == "Bring more."


def test_a_message_that_ends_in_a_line_break_has_its_remedy_on_a_line_of_its_own() -> None:
    error = DataError("a.jsonl, row 3: found 3, expected a text.\n", "Correct the row.")
    assert str(error) == "a.jsonl, row 3: found 3, expected a text.\n  Correct the row."
    assert error.remedy == "Correct the row."
    assert str(DataError(f"prompts: {error.message}", error.remedy)) == f"prompts: {error}", "wrapped, it is the same"


# ------------------------------------------------------------------------------------------- in the whole of the source

PACKAGE = Path(can_dist.__file__).parent
CUTTERS = {"partition", "rpartition", "split", "rsplit", "find", "rfind", "index", "rindex"}
END_OF_SENTENCE = re.compile(r"[.;!?]\s+|[;!?]")
TORCHS_OWN = {"scoring/token_budget.py": ". "}
"""The first sentence of torch's error, which holds no remedy that helps here."""
ROOMS = ("cluster", "config", "doctor", "endpoints.py", "modeling", "pipeline.py", "scoring", "tables")
"""Whose errors hold their remedies; the rest is printed as it is and shown by no doctor."""
TWO_SENTENCES = re.compile(r"[.?!…]\s+[A-Z`]")
FACTS = ("Columns found: ", "No row is usable.")
"""Sentences after the first that say what is, and not what to do."""


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in a file with the last name of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def text_of(node: ast.expr) -> str:
    """Return what an expression writes, with … in place of what is not known before it is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def cuts(path: Path) -> Iterator[str]:
    """Yield the ends of sentences at which a file cuts texts."""
    for name, call in calls_of(path):
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)] if name in CUTTERS else []
        texts = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
        yield from (text for text in texts if isinstance(text, str) and END_OF_SENTENCE.fullmatch(text))


def test_no_text_is_cut_into_sentences_to_tell_a_problem_from_its_remedy() -> None:
    places = {str(path.relative_to(PACKAGE)): cut for path in sorted(PACKAGE.rglob("*.py")) for cut in cuts(path)}
    assert places == TORCHS_OWN


def test_an_error_of_several_sentences_holds_its_remedy_apart() -> None:
    kinds, single = {kind.__name__ for kind in ERRORS}, []
    paths = [path for room in ROOMS for path in (sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / room])]
    with_remedy = 0
    for path in paths:
        for name, call in calls_of(path):
            if name in kinds:
                with_remedy += len(call.args) == 2
                text = text_of(call.args[0]) if len(call.args) == 1 else ""
                for fact in FACTS:
                    text = text.replace(f" {fact}", " ")
                if TWO_SENTENCES.search(text):
                    single.append(f"{path}, line {call.lineno}: {text}")
    assert single == []
    assert with_remedy > 150, "the search sees the errors"
