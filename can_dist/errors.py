"""Every error a user can cause or meet, each with the exit code the command line returns.

An error takes one message, so that it survives pickling through Ray. The message says what is wrong, where
(file, row, field), what was found, what was expected, and what to do.
"""

from __future__ import annotations


class CanDistError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the process returns."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)


class ConfigError(CanDistError, ValueError):
    """The configuration or the command line cannot mean anything."""

    exit_code = 2


class DataError(CanDistError, ValueError):
    """An input table, a score or a model does not keep its contract."""

    exit_code = 3


class InfeasibleConstraint(CanDistError, ValueError):
    """No policy supported on the score table meets the margins asked for."""

    exit_code = 4


class NumericalError(CanDistError, ArithmeticError):
    """A computation left the finite numbers or did not converge."""

    exit_code = 5


class EnvironmentProblem(CanDistError, RuntimeError):
    """The machine, the cluster or another process is in the way."""

    exit_code = 6


class Interrupted(BaseException):
    """Stopped by a signal after committing what was finished; the same command continues.

    Not an ``Exception``: it is raised wherever the signal finds the process, and code that wraps the exceptions it
    meets (Ray's deserialisation does) must not make an error of it.
    """

    exit_code = 75
