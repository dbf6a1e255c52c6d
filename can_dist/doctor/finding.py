"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from can_dist.errors import CanDistError


class Severity(IntEnum):
    """How bad a finding is; an error would end a run, a warning may spoil one, a note is worth knowing."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Finding:
    """The state of one subject, and what to do about it ('' when nothing)."""

    severity: Severity
    subject: str
    state: str
    remedy: str = ""


ok = partial(Finding, Severity.OK)
note = partial(Finding, Severity.NOTE)
warning = partial(Finding, Severity.WARNING)
error = partial(Finding, Severity.ERROR)


def refusal(subject: str, problem: CanDistError, severity: Severity = Severity.ERROR) -> Finding:
    """Return the finding for an error of ours: what it says is wrong, without the mark at its end, and its remedy."""
    return Finding(severity, subject, problem.message.rstrip(".:;\n"), problem.remedy or "Correct it.")
