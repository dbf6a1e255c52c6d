"""What an artifact was made from, step by step back to the data."""

from __future__ import annotations

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact


def ancestor(artifact: Artifact, stage: str) -> Artifact:
    """Return the nearest artifact of ``stage`` among the inputs of ``artifact``, their inputs, and so on.

    Raises:
        DataError: there is none.
    """
    level = [artifact]
    while level:
        inputs = [child.input(name) for child in level for name in child.manifest["inputs"]]
        for parent in inputs:
            if parent.stage == stage:
                return parent
        level = inputs
    raise DataError(f"{artifact.path}: not made from a {stage!r} artifact.")
