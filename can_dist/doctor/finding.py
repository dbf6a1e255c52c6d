"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial


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
