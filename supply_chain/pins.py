"""The pins of ``constraints.txt``: the one list that hashes, licences, bill of materials and audit are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Pin:
    """One line of ``constraints.txt``; ``name`` is in the one spelling that indexes use."""

    name: str
    version: str
    line: str

    @property
    def is_for_this_python(self) -> bool:
        """Whether the line's marker holds here."""
        marker = Requirement(self.line).marker
        return marker is None or marker.evaluate()


def read_pins(path: Path = CONSTRAINTS) -> list[Pin]:
    """Return the pins in the order of the file."""
    pins = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [specifier] = requirement.specifier
            pins.append(Pin(canonicalize_name(requirement.name), specifier.version, line))
    return pins
