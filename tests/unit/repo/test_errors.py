"""Errors: one printed text, a remedy of its own, and both whole after a pickle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

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
