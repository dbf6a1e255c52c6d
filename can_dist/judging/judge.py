"""Comparisons of two responses by a judge, which sees every pair in both orders; every verdict is kept on disk.

A rerun requests only the missing verdicts. A comparison without a verdict after all attempts is not a tie: it is
counted separately.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anyio.from_thread import start_blocking_portal

from can_dist.config.base import Strict
from can_dist.console import progress
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.judging.endpoint import Answer, JudgeSpec, ask, open_client
from can_dist.judging.prompts import REMINDER, Choice, judge_messages, parse_verdict
from can_dist.tables.artifacts import digest_of, write_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Order = Literal["candidate first", "baseline first"]
Verdict = Literal["win", "tie", "loss"]
Failure = Literal["", "no verdict", "rejected"]

ORDERS: tuple[Order, Order] = ("candidate first", "baseline first")
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
EARLY = 50  # comparisons after which too many without a verdict stop the run, before the rest is paid for


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt: the candidate's and the baseline's."""

    prompt_id: str
    prompt: str
    candidate: str
    baseline: str


class Record(Strict):
    """A kept answer. An answer without a verdict is kept for people to read, and requested again.

    The tokens are the endpoint's count over all requests; None where it does not say.
    """

    choice: Choice | None
    text: str
    rejected: bool
    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Judgement:
    """One comparison in one order.

    Attributes:
        prompt_id: of the comparison.
        order: which response was shown first.
        verdict: of the candidate: win, tie or loss; None without a verdict.
        failure: the reason of a missing verdict: no verdict line after all attempts, or content that was rejected.
        record: the kept answer.
        cached: read from disk, at no cost now.
        length_difference: characters of the candidate's response less those of the baseline's.
    """

    prompt_id: str
    order: Order
    verdict: Verdict | None
    failure: Failure
    record: Record
    cached: bool
    length_difference: int


@dataclass(frozen=True)
class CostEstimate:
    """The cost of judging, before it starts.

    Attributes:
        requests: to send, both orders, when every first answer has a verdict; at most ``attempts`` times as many.
        cached: comparisons with a verdict on disk, which cost nothing.
        prompt_tokens: one per 4 bytes of UTF-8, rounded up, and 4 per message.
        completion_tokens: at most this many, by the request's limit; None without a limit.
    """

    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int | None


def estimate_cost(comparisons: Sequence[Comparison], spec: JudgeSpec, cache: Path) -> CostEstimate:
    """Count the requests and tokens that :func:`judge_pairs` would spend with the same arguments."""
    cached = tokens = 0
    for comparison in comparisons:
        for order in ORDERS:
            messages = _messages(comparison, order, spec)
            if _read(_file(cache, spec, messages)) is not None:
                cached += 1
                continue
            sizes = [len(message["content"].encode()) for message in messages]
            tokens += sum(-(-size // BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for size in sizes)
    requests = len(ORDERS) * len(comparisons) - cached
    limit = spec.request.get("max_completion_tokens", spec.request.get("max_tokens"))
    return CostEstimate(requests, cached, tokens, None if limit is None else requests * int(limit))


def judge_pairs(comparisons: Sequence[Comparison], spec: JudgeSpec, cache: Path) -> list[Judgement]:
    """Ask the judge about every comparison in both orders; return two rows per comparison, in order.

    Every answer is written to ``cache`` under the digest of the model, the request and all texts, atomically, as soon
    as it arrives. An answer with a verdict is never paid for again, whatever address serves the model.

    Args:
        comparisons: the pairs; a prompt may have several.
        spec: the judge.
        cache: directory of the answers; made when it does not exist. It holds texts: treat it like the responses.

    Raises:
        EnvironmentProblem: the endpoint fails, see :func:`can_dist.judging.endpoint.ask`; verdicts so far are kept.
        DataError: more than ``max_failed_share`` of the comparisons have no verdict.
    """
    with start_blocking_portal() as portal:  # a loop of its own: works in a notebook, and ends at once with a signal
        return portal.call(_judge_all, comparisons, spec, cache)


async def _judge_all(comparisons: Sequence[Comparison], spec: JudgeSpec, cache: Path) -> list[Judgement]:
    slots = asyncio.Semaphore(spec.concurrency)
    failed: list[Judgement] = []
    async with open_client(spec) as client:
        jobs = [(comparison, order) for comparison in comparisons for order in ORDERS]
        tasks = [asyncio.ensure_future(_judge(client, spec, cache, slots, *job)) for job in jobs]
        try:
            with progress(f"judge {spec.criterion}", len(jobs), "comparison") as bar:
                for done, finished in enumerate(asyncio.as_completed(tasks), start=1):
                    row = await finished
                    bar.update()
                    failed += [row] if row.verdict is None else []
                    if done >= min(EARLY, len(jobs)):
                        _check_failures(failed, done, spec, cache)
        except EnvironmentProblem as error:
            answered = [task for task in tasks if task.done() and not task.exception()]
            kept = sum(task.result().verdict is not None for task in answered)
            raise EnvironmentProblem(
                f"{error} {kept} of {len(jobs)} verdicts are kept in {cache}; the same call goes on from there."
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


async def _judge(
    client: AsyncOpenAI, spec: JudgeSpec, cache: Path, slots: asyncio.Semaphore, comparison: Comparison, order: Order
) -> Judgement:
    """Return one row, from disk or from the endpoint."""
    messages = _messages(comparison, order, spec)
    file = _file(cache, spec, messages)
    record = kept = _read(file)
    if record is None:
        async with slots:
            record = await _ask_for_verdict(client, spec, messages)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record.model_dump())
    return Judgement(
        prompt_id=comparison.prompt_id,
        order=order,
        verdict=_verdict(record.choice, order) if record.choice else None,
        failure="" if record.choice else "rejected" if record.rejected else "no verdict",
        record=record,
        cached=kept is not None,
        length_difference=len(comparison.candidate) - len(comparison.baseline),
    )


async def _ask_for_verdict(client: AsyncOpenAI, spec: JudgeSpec, messages: list[dict[str, str]]) -> Record:
    """Ask until there is a verdict, with a reminder of the missing line: at temperature 0 a mere repeat fails again."""
    answers: list[Answer] = []
    talk, choice = messages, None
    while choice is None and len(answers) < spec.attempts and not (answers and answers[-1].rejected):
        answers.append(await ask(client, spec, talk))
        choice = parse_verdict(answers[-1].text)
        if answers[-1].text:  # not every endpoint takes an empty message back
            reply = {"role": "assistant", "content": answers[-1].text}
            talk = [*messages, reply, {"role": "user", "content": REMINDER}]
    return Record(
        choice=choice,
        text=answers[-1].text,
        rejected=answers[-1].rejected,
        requests=len(answers),
        prompt_tokens=total([answer.prompt_tokens for answer in answers]),
        completion_tokens=total([answer.completion_tokens for answer in answers]),
    )


def _messages(comparison: Comparison, order: Order, spec: JudgeSpec) -> list[dict[str, str]]:
    pair = (comparison.candidate, comparison.baseline)
    first, second = pair if order == "candidate first" else pair[::-1]
    return judge_messages(spec.criterion, comparison.prompt, first, second)


def _verdict(choice: Choice, order: Order) -> Verdict:
    if choice == "tie":
        return "tie"
    return "win" if (choice == "A") == (order == "candidate first") else "loss"


def _file(cache: Path, spec: JudgeSpec, messages: list[dict[str, str]]) -> Path:
    key = digest_of({"model": spec.model, "request": spec.request, "messages": messages})
    return cache / key[:2] / f"{key}.json"


def _read(file: Path) -> Record | None:
    """Return the kept answer if it has a verdict; None, for a damaged file too, means to ask again."""
    try:
        record = Record.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.choice else None


def total(counts: Sequence[int | None]) -> int | None:
    """Return the sum; None where one of the counts is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _check_failures(failed: Sequence[Judgement], done: int, spec: JudgeSpec, cache: Path) -> None:
    if len(failed) <= spec.max_failed_share * done:
        return
    rejected = sum(row.failure == "rejected" for row in failed)
    raise DataError(
        f"judge {spec.model} at {spec.base_url}: no verdict in {len(failed)} of {done} comparisons, one of them for "
        f"prompt {failed[0].prompt_id!r} ({rejected} rejected by the endpoint with HTTP 400, 413 or 422; "
        f"{len(failed) - rejected} without a last line 'Verdict: A', 'Verdict: B' or 'Verdict: tie' in {spec.attempts} "
        f"attempts). Read its answers in {cache}; give it room to finish, drop what it does not take (judge.request), "
        "or use a stronger model."
    )
