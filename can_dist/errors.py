"""Every error a user can cause or meet, each with the exit code the command line returns.

The message names the file, row or field, the value there and the value expected. The remedy says what to do.
"""

from __future__ import annotations


class CanDistError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the process returns.

    Args:
        message: What is wrong, and where. One that ends in a line break has its remedy printed on a line of its own.
        remedy: What to do, in sentences of their own; printed after the message. Both survive pickling.

    Examples:
        >>> error = DataError("prompts.jsonl, row 3: no field 'prompt'.", "Name the field in prompts.columns.")
        >>> print(error)
        prompts.jsonl, row 3: no field 'prompt'. Name the field in prompts.columns.
        >>> error.remedy
        'Name the field in prompts.columns.'
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        space = "  " if message.endswith("\n") else " "
        super().__init__(f"{message}{space}{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class ConfigError(CanDistError, ValueError):
    """The configuration or the command line is not valid."""

    exit_code = 2


class DataError(CanDistError, ValueError):
    """An input table, a score or a model breaks its contract."""

    exit_code = 3


class InfeasibleConstraint(CanDistError, ValueError):
    """No policy supported on the score table meets the margins."""

    exit_code = 4


class NumericalError(CanDistError, ArithmeticError):
    """A computation gave a number that is not finite, or did not converge."""

    exit_code = 5


class EnvironmentProblem(CanDistError, RuntimeError):
    """The machine, the cluster or another process prevents the work."""

    exit_code = 6


class NotBelieved(CanDistError, RuntimeError):
    """The table of scores cannot vouch for its prediction as far as ``solve.require`` asks; nothing was trained."""

    exit_code = 8


class PartlyRefused(CanDistError, RuntimeError):
    """Of the margins of a sweep some have a policy and others cannot have; the page says which and why."""

    exit_code = 9


REFUSALS = (InfeasibleConstraint, NotBelieved, NumericalError, DataError)
"""Why some margins have no policy. All margins have the same data: what is wrong with them fails for all."""


class Interrupted(BaseException):
    """Stopped by a signal after committing all finished work; the same command continues.

    Not an ``Exception``: a signal handler raises it anywhere, and code that wraps exceptions (Ray's deserialiser
    does) must not turn it into an error.
    """

    exit_code = 75
