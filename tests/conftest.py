"""Environment of all tests: an empty home, one thread per process, no hub, helpers importable by Ray's workers."""

import os
from pathlib import Path

import hypothesis
import private_home
import pytest

HERE = Path(__file__).parent
HELPERS = [str(HERE / "helpers" / kind) for kind in ("faults", "runs", "servers", "worlds")]  # as in pyproject.toml
HOME = private_home.move_in()  # before anything imports torch, ray, datasets or matplotlib
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), *HELPERS, os.environ.get("PYTHONPATH")]))

hypothesis.settings.register_profile("can-dist", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("can-dist")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip that says where it was looked for."""
    path = Path(os.environ.get("CAN_DIST_DATA", HERE.parents[1] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set CAN_DIST_DATA")
    return path
