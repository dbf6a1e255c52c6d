"""Which versions Triton's interpreter works with: measured, not promised by anybody."""

from __future__ import annotations

FAILS = ("3.6", (2, 5))
"""Triton, and numpy from: 17 of these tests failed in the interpreter. Compiled kernels are not affected."""
WORKS = "triton 3.9 with numpy 2.4"


def interpreter_problem(triton_version: str, numpy_version: str) -> str:
    """Return why these versions are not interpreted with; '' when nothing is known against them."""
    triton, numpy = FAILS
    if not triton_version.startswith(f"{triton}.") or tuple(map(int, numpy_version.split(".")[:2])) < numpy:
        return ""
    return f"the interpreter of triton {triton_version} fails with numpy {numpy_version}; it works in {WORKS}"
