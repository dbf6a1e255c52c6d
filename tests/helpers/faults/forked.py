"""Runs in processes that are killed at a chosen change of a directory, and what must hold of what they leave."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

from crash import arm, open_log

from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.verify import verify_run

# one process that has imported everything, from which every run is forked: a run costs half a second instead of ten.
# Not Ray, which reads its authentication from the environment when it is imported
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = [
    "can_dist.modeling.formatter",
    "can_dist.run",
    "can_dist.doctor.status",
    "crash",
    "pandas",
    "pyarrow.pandas_compat",
    "ruamel.yaml",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
]
FORKS.set_forkserver_preload(IMPORTED)


def forked(work: Callable[[Path], None], run: Path, log: Path, at: int, below: str = "") -> list[str]:
    """Do the work in a process that dies at change ``at`` of the run, or of a directory in it; return the changes."""
    log.unlink(missing_ok=True)
    child = FORKS.Process(target=armed, args=(work, run, log, at, below))
    child.start()
    child.join()
    changes = log.read_text().splitlines()
    if at:
        assert (child.exitcode, len(changes)) == (-signal.SIGKILL, at), changes[-1:]
    else:
        assert child.exitcode == 0
    return changes


def armed(work: Callable[[Path], None], run: Path, log: Path, at: int, below: str) -> None:
    descriptor = open_log(log)
    arm(run / below, lambda: (at, descriptor))
    work(run)


def digests(run: Path) -> dict[str, str]:
    """Every committed artifact, loaded and checked, and nothing that is not as it was committed."""
    number, problems = verify_run(run)
    assert problems == []
    found = {path.parent.name: load_artifact(path.parent).digest for path in run.glob(f"*/{MANIFEST}")}
    assert len(found) == number
    return found
