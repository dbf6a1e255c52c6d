"""ray_jobs/slurm.sbatch on a real Slurm of two loopback nodes: stopped by the warning signal, requeued, finished."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import loopback_nodes
import psutil
import pytest
from small_run import small_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
# the file asks for GPUs and many cores; the command line has the last word, as for any sbatch file
SMALL = ["--gpus-per-node=0", "--cpus-per-task=3", "--time=20", "--open-mode=append"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    given = small_run(tmp_path, cluster={"num_actors": 2, "cpus_per_actor": 2})
    return write_config(tmp_path / "my.yaml", given)


class Job:
    """A batch job: its state, restarts and log."""

    def __init__(self, config: Path, variables: dict[str, str]) -> None:
        home = config.parent / "home"
        home.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, **variables, "HOME": str(home), "PATH": path}
        self.run = config.parent / "runs" / "mine"
        self.spooled = str(Path(variables["SLURM_CONF"]).parent / "spool")
        self.log = config.parent / "slurm.log"
        script = [str(ROOT / "ray_jobs" / "slurm.sbatch"), str(config), str(self.run)]
        said = self.slurm("sbatch", *SMALL, f"--output={self.log}", *script)
        found = re.fullmatch(r"Submitted batch job (\d+)\n", said)
        assert found, said
        self.id = found[1]

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, cwd=ROOT, env=self.env, check=True, capture_output=True, text=True).stdout

    def fact(self, name: str) -> str:
        return dict(re.findall(r"(\w+)=(\S+)", self.slurm("scontrol", "show", "job", self.id)))[name]

    def warn(self) -> None:
        """Send the script alone SIGTERM, as ``--signal=B:TERM@300`` does; scancel would end the whole job."""
        [script] = [
            one for one in psutil.process_iter(["cmdline"]) if self.spooled in " ".join(one.info["cmdline"] or [])
        ]
        script.send_signal(signal.SIGTERM)

    def wait(self, happened: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.5)


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    missing = loopback_nodes.missing(loopback_nodes.SLURM_PROGRAMS)
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    with loopback_nodes.slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def test_batch_job_stopped_by_the_warning_is_requeued_and_finishes(config: Path, variables: dict[str, str]) -> None:
    job = Job(config, variables)
    job.wait(lambda: list(job.run.glob("generate-*")) != [], 300)
    job.warn()
    job.wait(lambda: job.fact("Restarts") == "1", 120)
    first = job.log.read_text()
    assert "Interrupted: stopped by SIGTERM; finished shards are kept" in first, first[-6000:]
    # Slurm sets the start of a requeued job, two minutes from then, when the last of its processes has ended
    job.wait(lambda: job.fact("JobState") == "PENDING", 120)
    job.slurm("scontrol", "update", f"JobId={job.id}", "StartTime=now")
    job.wait(lambda: job.fact("JobState") in {"COMPLETED", "FAILED", "CANCELLED"}, 1000)
    assert (job.fact("JobState"), job.fact("ExitCode")) == ("COMPLETED", "0:0"), job.log.read_text()[-6000:]
    assert list(job.run.glob("evaluate-*/report.html"))
    assert not list((config.parent / "home" / ".ray").glob("token*")), "the token goes with the job"


def test_cancelled_batch_job_stays_cancelled(config: Path, variables: dict[str, str]) -> None:
    """scancel sends SIGTERM too, and the driver ends as it does after the warning."""
    job = Job(config, variables)
    job.wait(lambda: list(job.run.glob("generate-*")) != [], 300)
    job.slurm("scancel", job.id)
    job.wait(lambda: job.slurm("squeue", "--noheader", f"--jobs={job.id}") == "", 150)
    assert (job.fact("JobState"), job.fact("Restarts")) == ("CANCELLED", "0")
