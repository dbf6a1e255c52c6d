"""What an artifact was made from, step by step back to the data."""

from __future__ import annotations

from collections.abc import Iterator

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact


def ancestors(artifact: Artifact) -> Iterator[Artifact]:
    """Yield an artifact, its inputs, their inputs, and so on, nearest first and each once."""
    known, level = {artifact.path.name}, [artifact]
    while level:
        yield from level
        parents: list[Artifact] = []
        for child in level:
            for name, made_from in child.manifest["inputs"].items():
                if made_from["artifact"] not in known:  # a loop's rounds are reached by exponentially many ways
                    known.add(made_from["artifact"])
                    parents.append(child.input(name))
        level = parents


def ancestor(artifact: Artifact, stage: str) -> Artifact:
    """Return the nearest artifact of ``stage`` among the inputs of ``artifact``, their inputs, and so on.

    Raises:
        DataError: there is none.
    """
    for made_from in ancestors(artifact):
        if made_from is not artifact and made_from.stage == stage:
            return made_from
    raise DataError(f"{artifact.path}: not made from a {stage!r} artifact.")
