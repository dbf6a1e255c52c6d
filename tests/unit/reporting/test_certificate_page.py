"""The page of a certificate: every number of the record, for people; nothing in it runs or is fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from can_dist.measuring.certificate import CERTIFIED, NOT_CERTIFIED, NOT_ENOUGH, Demand, answer_of, judge, sentences
from can_dist.reporting.certificate_page import render_certificate
from can_dist.reporting.model_card import model_card

VALUE_P = np.random.default_rng(3).normal(0.5, 1.0, 144)
HOSTILE = "<script>alert('a')</script>"


def record(*demands: Demand) -> dict[str, Any]:
    rows = [judge(f"score{number}", demand, VALUE_P, 0.01) for number, demand in enumerate(demands)]
    measured: dict[str, Any] = dict.fromkeys(("seed", "precision", "models", "scorers"), "x")
    measured["sampling"] = {"stop": [HOSTILE], "temperature": 1.0}
    made: dict[str, Any] = {
        "format_version": 1,
        "answer": answer_of(rows),
        "policy": {"artifact": "train-0123456789abcdef", "digest": "d" * 64},
        "num_prompts": 144,
        "num_responses": 4,
        "num_cut": 0,
        "sealed_prompts": "e" * 64,
        "look": {"number": 2, "delta": 0.05, "error": 0.0076, "ledger": "f" * 64},
        "constraints": rows,
        "artifacts": {"policy": "train-0123456789abcdef"},
        "versions": {"can-dist": "1"},
        "measurement": measured,
    }
    return made | {"sentences": sentences(made)}


@pytest.mark.parametrize(
    ("demands", "answer", "mark"),
    [
        ((Demand(-1.0, True), Demand(-1.0, False)), CERTIFIED, "met"),
        ((Demand(-1.0, True), Demand(0.45, True)), NOT_ENOUGH, "within"),
        ((Demand(0.5, True, 0.1), Demand(9.0, True)), NOT_CERTIFIED, "unmet"),
    ],
)
def test_page_says_answer_bounds_and_what_was_measured(demands: tuple[Demand, ...], answer: str, mark: str) -> None:
    made = record(*demands)
    page = render_certificate(made)
    assert f'<strong class="{mark}">{answer}</strong>' in page
    for sentence in made["sentences"][1:]:
        assert sentence in page
    for row in made["constraints"]:
        assert f'<th scope="row" dir="auto">{row["name"]}</th>' in page
        assert f"{row['low']:.2f}".replace("-", "−") in page
    assert "This is look 2" in page
    assert ("may be unseen" in page) == (answer == CERTIFIED)
    assert made["policy"]["digest"] in page
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert render_certificate(made) == page


def test_model_card_has_the_sentences_and_says_nothing_without_a_certificate() -> None:
    made = record(Demand(-1.0, True))
    facts = {"title": "t", "method": "", "base": "", "is_hub_model": False, "beta": 1.0, "lam": None, "made_from": []}
    card = model_card(facts, None, adapter=False, certificate=made)
    first, *others = made["sentences"]
    assert f"## Certificate\n\n**{first}**\n" in card
    for sentence in others:
        assert f"\n- {sentence}\n" in card
    assert "ertificate" not in model_card(facts, None, adapter=False)
