"""A user's Python function as a scorer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from can_dist.config import PythonCallable
from can_dist.errors import DataError
from can_dist.modeling.loading import import_callable
from can_dist.scoring.protocol import Response


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
        return np.asarray(scores, dtype=np.float64)
