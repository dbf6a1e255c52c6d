"""The public names of the package."""

import subprocess
import sys

import pytest

import can_dist


@pytest.mark.parametrize("name", can_dist.__all__)
def test_every_public_name_loads_and_is_itself(name: str) -> None:
    assert getattr(can_dist, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        can_dist.nothing  # noqa: B018


def test_solver_alone_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from can_dist import solve_dual; sys.exit(bool({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
