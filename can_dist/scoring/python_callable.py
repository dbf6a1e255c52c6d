"""A user's Python function as a scorer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from can_dist.config import PythonCallable
from can_dist.console import advance
from can_dist.errors import ConfigError, DataError
from can_dist.scoring.protocol import Response
from can_dist.tables.artifacts import file_digest


class CallableScorer:
    """Calls ``function(conversations, responses)`` in batches and expects one number per response."""

    def __init__(self, spec: PythonCallable) -> None:
        self.spec = spec
        self.function = import_callable(spec.function)

    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores, one per response, in order."""
        scores: list[float] = []
        for start in range(0, len(responses), self.spec.batch_size):
            batch = responses[start : start + self.spec.batch_size]
            values = self.function([list(r.messages) for r in batch], [r.text for r in batch])
            try:
                values = [float(value) for value in values]
            except (TypeError, ValueError) as error:
                raise DataError(f"scorer {self.spec.function!r}: must return a list of numbers ({error}).") from None
            if len(values) != len(batch):
                raise DataError(
                    f"scorer {self.spec.function!r}: returned {len(values)} scores for {len(batch)} responses."
                )
            scores += values
            advance(len(batch))
        return np.asarray(scores, dtype=np.float64)


def callable_identity(function: str) -> dict[str, str]:
    """Return what identifies a Python scorer: its name and the digest of its module's file."""
    import_callable(function)
    source = getattr(sys.modules[function.partition(":")[0]], "__file__", None)
    return {"function": function, "source": file_digest(Path(source)) if source else "builtin"}


def import_callable(function: str) -> Any:
    """Import ``module:function``.

    Raises:
        ConfigError: The module cannot be imported, or has no such function.
    """
    module_name, _, name = function.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a file there must not stand in for a module of Python's own
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"scorer {function!r}: cannot import {module_name!r} ({error}).",
            "Start the command where it can be imported.",
        ) from None
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"scorer {function!r}: module {module_name!r} has no function {name!r}.")
    return getattr(module, name)
