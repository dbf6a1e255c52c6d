"""Data sets that rate responses one by one, or by strength of preference: BeaverTails, UltraFeedback, HelpSteer 1 to 3.

People (in UltraFeedback GPT-4) judged each response by itself, so pairs have to be made: the best of a prompt's
responses with the worst, the second best with the second worst, and so on while the ratings differ. Each response is
in one pair at most, so no prompt outweighs the others by the square of its responses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from can_dist.tables.foreign.rows import (
    Format,
    Messages,
    Pair,
    Rated,
    Rating,
    SetAside,
    bad,
    read_messages,
    safe_flag,
    texts,
)
from can_dist.tables.foreign.sources import Row

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
"""What UltraFeedback rates from 1 to 5; a response's rating here is their mean."""
STRONGEST = 3
"""HelpSteer's preferences go from -3, response 1 is much better, to 3, response 2 is."""
SAME = "no response to the same prompt is rated otherwise"
BOTH = "the same response is flagged both safe and unsafe"
AGAIN = "the same response with the same rating again"
_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}


# ---------------------------------------------------------------------------------------------------------- rows


def _beavertails(row: Row, where: str) -> Rated:
    (text,) = texts(row, where, "response")
    safe = safe_flag(row, where, "is_safe")
    if safe is None:
        raise bad(where, "is_safe", safe, "true or false", "Correct the row, or remove it.")
    messages = read_messages(row.get("prompt"), where, "prompt")
    return Rated(messages, (Rating(text, float(safe), safe),), "safer")


def _helpsteer(row: Row, where: str) -> Rated:
    (text,) = texts(row, where, "response")
    return Rated(_turns(row, where), (Rating(text, _number(row, where, "helpfulness")),), "better")


def _helpsteer2_pair(row: Row, where: str) -> Pair:
    a, b = texts(row, where, "response_1", "response_2")
    return Pair(_turns(row, where), a, b, better=_better(row, where, "preference_strength"), safer=-1)


def _helpsteer3_pair(row: Row, where: str) -> Pair:
    a, b = texts(row, where, "response1", "response2")
    messages = read_messages(row.get("context"), where, "context")
    return Pair(messages, a, b, better=_better(row, where, "overall_preference"), safer=-1)


def _ultrafeedback(row: Row, where: str) -> Rated | SetAside:
    completions = row.get("completions")
    if not isinstance(completions, list):
        raise bad(where, "completions", completions, "a list of completions", "Correct the row, or remove it.")
    ratings = []
    for index, completion in enumerate(completions):
        place = f"completions[{index}]"
        text = completion.get("response") if isinstance(completion, dict) else None
        if not isinstance(text, str):
            raise bad(where, f"{place}.response", text, "a string", "Correct the row, or remove it.")
        if (rating := _mean_rating(completion.get("annotations"), where, place)) is not None:
            ratings.append(Rating(text, rating))
    if not ratings:
        return SetAside("no completion has a rating")
    return Rated(read_messages(row.get("instruction"), where, "instruction"), tuple(ratings), "better")


def _mean_rating(annotations: object, where: str, place: str) -> float | None:
    """The mean over the aspects that were rated ('N/A' was not), or None."""
    if not isinstance(annotations, dict) or not set(ASPECTS) <= annotations.keys():
        expected = f"annotations with {', '.join(ASPECTS)}"
        raise bad(where, f"{place}.annotations", annotations, expected, "Correct the row, or remove it.")
    found = [str(entry.get("Rating")) for name in ASPECTS if isinstance(entry := annotations[name], dict)]
    numbers = [float(value) for value in found if value.strip() in ("1", "2", "3", "4", "5")]
    return sum(numbers) / len(numbers) if numbers else None


def _turns(row: Row, where: str) -> Messages:
    """The prompt of a HelpSteer row; further turns are marked by ``<extra_id_1>User`` and ``<extra_id_1>Assistant``."""
    value = row.get("prompt")
    if not isinstance(value, str) or "<extra_id_1>" not in value:
        return read_messages(value, where, "prompt")
    first, *rest = _MARK.split(value)
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return read_messages([{"role": _ROLES[name], "content": text} for name, text in turns], where, "prompt")


def _number(row: Row, where: str, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise bad(where, name, value, "a number", "Correct the row, or remove it.")
    return float(value)


def _better(row: Row, where: str, name: str) -> int:
    value = _number(row, where, name)
    if abs(value) > STRONGEST:
        expected = f"a number from -{STRONGEST} to {STRONGEST}"
        raise bad(where, name, row[name], expected, "Correct the row, or remove it.")
    return -1 if value == 0 else int(value > 0)


RATED_FORMATS = (
    Format("beavertails", "BeaverTails ratings", ("prompt", "response", "is_safe"), _beavertails, better_first=True),
    Format("helpsteer", "HelpSteer ratings", ("prompt", "response", "helpfulness"), _helpsteer, better_first=True),
    Format(
        "helpsteer2-preference",
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2_pair,
    ),
    Format(
        "helpsteer3-preference",
        "HelpSteer3 preferences",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3_pair,
        message_lists=False,
    ),
    Format(
        "ultrafeedback",
        "UltraFeedback ratings",
        ("instruction", "completions"),
        _ultrafeedback,
        better_first=True,
        message_lists=False,
    ),
)


# --------------------------------------------------------------------------------------------------------- pairs


@dataclass
class RatedPrompts:
    """The rated responses of a source by prompt, and what became of its rows."""

    prompts: dict[str, Rated] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)  # where each response of a prompt is from

    def add(self, key: str, rated: Rated, where: str) -> None:
        """Add the responses of one row to those of its prompt."""
        before = self.prompts.get(key)
        responses = (*before.responses, *rated.responses) if before else rated.responses
        self.prompts[key] = Rated(rated.messages, responses, rated.criterion)
        self.rows.setdefault(key, []).extend([where] * len(rated.responses))

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Yield prompt and pair, prompts in the order of their first row, the higher rating as response a."""
        for key, rated in self.prompts.items():
            for high, low in _partners(rated.responses):
                a, b = rated.responses[high], rated.responses[low]
                labels = {"better": -1, "safer": -1, rated.criterion: 0}
                yield key, Pair(rated.messages, a.text, b.text, safe_a=a.safe, safe_b=b.safe, **labels)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield where and why, for every row without a response in a pair."""
        for key, rated in self.prompts.items():
            used = {self.rows[key][index] for pair in _partners(rated.responses) for index in pair}
            reasons = _reasons(rated.responses)
            for index, where in enumerate(self.rows[key]):
                if where not in used:
                    used.add(where)
                    yield where, reasons.get(index, SAME)


def _reasons(responses: tuple[Rating, ...]) -> dict[int, str]:
    """Why a response takes part in no pair whatever the others are, by its place."""
    flags = Counter((one.text, one.safe) for one in responses)
    reasons, seen = {}, set()
    for index, one in enumerate(responses):
        if one.safe is not None and flags[one.text, not one.safe]:
            reasons[index] = BOTH
        elif (one.text, one.rating) in seen:
            reasons[index] = AGAIN
        seen.add((one.text, one.rating))
    return reasons


def _partners(responses: tuple[Rating, ...]) -> list[tuple[int, int]]:
    """The places of best and worst, second best and second worst, ... as long as their ratings differ."""
    out = _reasons(responses)
    places = [index for index in range(len(responses)) if index not in out]
    places.sort(key=lambda index: -responses[index].rating)  # stable: of equals the first
    outer = zip(places[: len(places) // 2], reversed(places), strict=False)
    return [(high, low) for high, low in outer if responses[high].rating > responses[low].rating]
