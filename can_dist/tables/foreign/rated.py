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

from can_dist.tables.foreign.messages import Messages, read_messages
from can_dist.tables.foreign.rows import Format, Pair, Rated, Rating, SetAside, safe_flag, texts
from can_dist.tables.json_rows import Row
from can_dist.tables.misfits import bad

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


def _beavertails(row: Row, place: str) -> Rated:
    (text,) = texts(row, place, "response")
    safe = safe_flag(row, place, "is_safe")
    if safe is None:
        raise bad(place, "is_safe", safe, "true or false", "Correct the row, or remove it.")
    messages = read_messages(row.get("prompt"), place, "prompt")
    return Rated(messages, (Rating(text, float(safe), safe),), "safer")


def _helpsteer(row: Row, place: str) -> Rated:
    (text,) = texts(row, place, "response")
    return Rated(_turns(row, place), (Rating(text, _number(row, place, "helpfulness")),), "better")


def _helpsteer2_pair(row: Row, place: str) -> Pair:
    a, b = texts(row, place, "response_1", "response_2")
    return Pair(_turns(row, place), a, b, better=_better(row, place, "preference_strength"), safer=-1)


def _helpsteer3_pair(row: Row, place: str) -> Pair:
    a, b = texts(row, place, "response1", "response2")
    messages = read_messages(row.get("context"), place, "context")
    return Pair(messages, a, b, better=_better(row, place, "overall_preference"), safer=-1)


def _ultrafeedback(row: Row, place: str) -> Rated | SetAside:
    completions = row.get("completions")
    if not isinstance(completions, list):
        raise bad(place, "completions", completions, "a list of completions", "Correct the row, or remove it.")
    ratings = []
    for index, completion in enumerate(completions):
        member = f"completions[{index}]"
        text = completion.get("response") if isinstance(completion, dict) else None
        if not isinstance(text, str):
            raise bad(place, f"{member}.response", text, "a string", "Correct the row, or remove it.")
        if (rating := _mean_rating(completion.get("annotations"), place, member)) is not None:
            ratings.append(Rating(text, rating))
    if not ratings:
        return SetAside("no completion has a rating")
    return Rated(read_messages(row.get("instruction"), place, "instruction"), tuple(ratings), "better")


def _mean_rating(annotations: object, place: str, member: str) -> float | None:
    """The mean over the aspects that were rated ('N/A' was not), or None."""
    if not isinstance(annotations, dict) or not set(ASPECTS) <= annotations.keys():
        expected = f"annotations with {', '.join(ASPECTS)}"
        raise bad(place, f"{member}.annotations", annotations, expected, "Correct the row, or remove it.")
    entries = [str(entry.get("Rating")) for name in ASPECTS if isinstance(entry := annotations[name], dict)]
    numbers = [float(value) for value in entries if value.strip() in ("1", "2", "3", "4", "5")]
    return sum(numbers) / len(numbers) if numbers else None


def _turns(row: Row, place: str) -> Messages:
    """The prompt of a HelpSteer row; further turns are marked by ``<extra_id_1>User`` and ``<extra_id_1>Assistant``."""
    value = row.get("prompt")
    if not isinstance(value, str) or "<extra_id_1>" not in value:
        return read_messages(value, place, "prompt")
    first, *rest = _MARK.split(value)
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return read_messages([{"role": _ROLES[name], "content": text} for name, text in turns], place, "prompt")


def _number(row: Row, place: str, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise bad(place, name, value, "a number", "Correct the row, or remove it.")
    return float(value)


def _better(row: Row, place: str, name: str) -> int:
    value = _number(row, place, name)
    if abs(value) > STRONGEST:
        expected = f"a number from -{STRONGEST} to {STRONGEST}"
        raise bad(place, name, row[name], expected, "Correct the row, or remove it.")
    return -1 if value == 0 else int(value > 0)


RATED_FORMATS = (
    Format(
        "beavertails",
        "BeaverTails ratings",
        ("prompt", "response", "is_safe"),
        _beavertails,
        about=("category",),
        better_first=True,
    ),
    Format(
        "helpsteer",
        "HelpSteer ratings",
        ("prompt", "response", "helpfulness"),
        _helpsteer,
        about=("correctness", "coherence", "complexity", "verbosity"),
        better_first=True,
    ),
    Format(
        "helpsteer2-preference",
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2_pair,
        about=("split",),
    ),
    Format(
        "helpsteer3-preference",
        "HelpSteer3 preferences",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3_pair,
        about=("domain", "language"),
        message_lists=False,
    ),
    Format(
        "ultrafeedback",
        "UltraFeedback ratings",
        ("instruction", "completions"),
        _ultrafeedback,
        about=("source",),
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

    def add(self, key: str, rated: Rated, place: str) -> None:
        """Add the responses of one row to those of its prompt."""
        before = self.prompts.get(key)
        responses = (*before.responses, *rated.responses) if before else rated.responses
        self.prompts[key] = Rated(rated.messages, responses, rated.criterion)
        self.rows.setdefault(key, []).extend([place] * len(rated.responses))

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
            for index, place in enumerate(self.rows[key]):
                if place not in used:
                    used.add(place)
                    yield place, reasons.get(index, SAME)


def _reasons(responses: tuple[Rating, ...]) -> dict[int, str]:
    """Why a response takes part in no pair whatever the others are, by its place."""
    flags = Counter((response.text, response.safe) for response in responses)
    reasons, seen = {}, set()
    for index, response in enumerate(responses):
        if response.safe is not None and flags[response.text, not response.safe]:
            reasons[index] = BOTH
        elif (response.text, response.rating) in seen:
            reasons[index] = AGAIN
        seen.add((response.text, response.rating))
    return reasons


def _partners(responses: tuple[Rating, ...]) -> list[tuple[int, int]]:
    """The places of best and worst, second best and second worst, ... as long as their ratings differ."""
    out = _reasons(responses)
    places = [index for index in range(len(responses)) if index not in out]
    places.sort(key=lambda index: -responses[index].rating)  # stable: of equals the first
    outer = zip(places[: len(places) // 2], reversed(places), strict=False)
    return [(high, low) for high, low in outer if responses[high].rating > responses[low].rating]
