"""The sections of ``gpu.sh``: what one GPU is asked in nine minutes, in order of value, each in its time box.

Every section is a process of its own and leaves one line of JSON at once, also when it fails or its time is up: then
with what it had written. The next section goes on. Exit code 0: all sections passed; 1: some did not; 6: no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_report import READERS, Reader
from machine import gpu, machine
from train_job import Job

HERE = Path(__file__).parent
ROOT = HERE.parent
LIMIT_S = 540.0
START_S = 10.0  # the wheels are unpacked, the GPU is looked at
SPARE_S = 5.0  # to end a section that is late, and to write its line
ROOM = 50 * 10**9  # bytes of the models, and of the classifier that is made of the large one
LARGE_GPU = 130e9  # bytes that 7B in full needs, with activation checkpointing


@dataclass(frozen=True)
class Setup:
    """What is measured on a device.

    Attributes:
        device: 'cuda' or 'cpu'.
        large: The large model, trained in full.
        adapters: A model that is trained by adapters beside it; '' for none.
        small: The small model, trained without activation checkpointing.
        pairs: Pairs of a training.
        batch: Pairs of a step.
        context: Tokens that a pair may have.
        tokens_per_pack: Ours.
        packs: Other sizes of packs, for the large model.
        micro_batches: TRL's, of the large model.
        search: TRL's, of the small one.
        works: Lengths of the pairs of the small one.
        prompts: Prompts that are scored, 16 responses each.
        rounds: Rounds in turn of the small one.
        patience: What the time boxes are multiplied by: on a CPU, which may be busy, they are not the point.
    """

    device: str
    large: str
    adapters: str
    small: str
    pairs: int
    batch: int
    context: int
    tokens_per_pack: int
    packs: tuple[int, ...]
    micro_batches: tuple[int, ...]
    search: tuple[int, ...]
    works: tuple[str, ...]
    prompts: int
    rounds: int
    patience: float


WORKS = ("pku-like", "hh-like", "tldr-like")
PACKS, SEARCH = (2048, 8192, 16384), (8, 16, 32)
LARGE = Setup("cuda", "random-7b", "", "random-1b", 256, 64, 2048, 16384, PACKS, (8, 16), SEARCH, WORKS, 48, 3, 1.0)
MEDIUM = Setup(
    "cuda", "random-3b", "random-7b", "random-1b", 256, 64, 2048, 16384, PACKS, (8, 16), SEARCH, WORKS, 48, 3, 1.0
)
ON_CPU = Setup("cpu", "random-tiny", "", "random-tiny", 8, 4, 256, 1024, (256,), (1, 2), (1, 2), WORKS[:1], 2, 2, 10.0)


@dataclass(frozen=True)
class Section:
    """A section: its name, seconds it may take, its command, the file that it writes, and how that is read."""

    name: str
    box_s: float
    command: Sequence[str]
    output: Path
    reader: Reader


def sections(setup: Setup, work: Path) -> list[Section]:
    """Return the sections in order of value; ``work`` is where models and results lie."""
    python, device = sys.executable, ["--device", setup.device]

    def script(name: str, box_s: float, file: str, *options: str, reader: str = "json") -> Section:
        output = work / f"{name}.json"
        command = [python, str(HERE / file), *device, "--output", str(output), *options]
        return Section(name, box_s, command, output, READERS[reader])

    def training(name: str, box_s: float, jobs: Sequence[Job], reader: str) -> Section:
        output = work / f"{name}.jsonl"
        listed = json.dumps([{**asdict(job), "output": str(output)} for job in jobs])
        return Section(name, box_s, [python, str(HERE / "train_side.py"), listed], output, READERS[reader])

    models = list(dict.fromkeys(name for name in (setup.large, setup.adapters, setup.small) if name))
    junit, bench = work / "kernels.xml", work / "kernels-bench.json"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(ROOT / "kernels/tests")]
    write = [python, str(HERE / "models.py"), *models, *device, "--directory", str(work / "models")]
    return [
        script("ceilings", 20, "ceilings.py"),
        script("attention", 60, "packed_attention.py"),
        Section("kernels", 30, tests, junit, READERS["junit"]),
        Section("kernels-bench", 15, [python, str(ROOT / "kernels/bench.py"), *device, "--json", str(bench)], bench,
                READERS["json"]),
        script("heads", 10, "heads.py"),
        Section("models", 20, write, work / "models", READERS["folder"]),
        training("train-large", 80, large_jobs(setup, work), "ours"),
        training("train-large-trl", 95, trl_jobs(setup, work), "peer"),
        training("train-small", 115, small_jobs(setup, work), "turns"),
        script("scoring", 45, "score_vs_pipeline.py", "--model", str(work / "models" / setup.large), "--shapes",
               "hh-like", "--num-prompts", str(setup.prompts), "--rounds", "1", "--batches", "16", "--context",
               str(setup.context)),
        training("packs", 35, pack_jobs(setup, work), "ours"),
    ]  # fmt: skip


def job(setup: Setup, work: Path, side: str, model: str, shape: str, **options: Any) -> Job:
    """Return a training of a setup."""
    return Job(
        side=side,
        work=shape,
        model=str(work / "models" / model),
        output="",
        num_pairs=setup.pairs,
        batch_size=setup.batch,
        context=setup.context,
        device=setup.device,
        tokens_per_pack=options.pop("tokens_per_pack", setup.tokens_per_pack),
        **options,
    )


def large_jobs(setup: Setup, work: Path) -> list[Job]:
    """Ours: the large model in full, and a larger one by adapters where the GPU cannot hold it in full."""
    options: dict[str, Any] = {"activation_checkpointing": True}
    jobs = [job(setup, work, "ours", setup.large, "hh-like", **options)]
    if setup.adapters:
        jobs.append(job(setup, work, "ours", setup.adapters, "hh-like", lora=True, **options))
    return jobs


def trl_jobs(setup: Setup, work: Path) -> list[Job]:
    """TRL's: the same, with each micro-batch."""
    options: dict[str, Any] = {"activation_checkpointing": True}
    return [
        job(setup, work, "trl", setup.large, "hh-like", micro_batch=size, **options) for size in setup.micro_batches
    ]


def small_jobs(setup: Setup, work: Path) -> list[Job]:
    """Both in turn: every work with each micro-batch of TRL, then again, so that a stop costs rounds, not works."""
    jobs = []
    for number in range(setup.rounds):
        for shape in setup.works:
            turn = [job(setup, work, "ours", setup.small, shape)]
            for size in setup.search:
                # in our order once: then the losses of every step must agree
                strategy = "sequential" if number == 0 and size == setup.search[0] else "group_by_length"
                turn.append(job(setup, work, "trl", setup.small, shape, micro_batch=size, strategy=strategy))
            jobs += turn[:: -1 if number % 2 else 1]
    return jobs


def pack_jobs(setup: Setup, work: Path) -> list[Job]:
    """Ours with packs of several sizes; a step of the largest is profiled, and liger's kernels are tried beside it."""
    options: dict[str, Any] = {"activation_checkpointing": True}
    jobs = [job(setup, work, "ours", setup.large, "hh-like", tokens_per_pack=setup.packs[-1], profile=True, **options)]
    if setup.device == "cuda" and find_spec("liger_kernel"):
        jobs.append(replace(jobs[0], kernels="liger", profile=False))
    smaller = [
        job(setup, work, "ours", setup.large, "hh-like", tokens_per_pack=size, **options) for size in setup.packs[:-1]
    ]
    return jobs + smaller


def run(section: Section, seconds: float, log: Path) -> dict[str, Any]:
    """Run a section for at most so many seconds; return its line."""
    began = time.monotonic()
    if seconds < 1:
        return {"section": section.name, "status": "no time left", "seconds": 0.0}
    with log.open("w") as output:
        process = subprocess.Popen(
            section.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={
                **os.environ,
                "TMPDIR": str(log.parent),
                "PYTHONPATH": search_path(),
                "TOKENIZERS_PARALLELISM": "false",
            },
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            status = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {seconds:.0f} s"
    line: dict[str, Any] = {"section": section.name, "status": status, "seconds": time.monotonic() - began}
    if section.output.exists():
        try:
            line["result"] = section.reader(section.output)
        except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            line["status"] = f"{status}; its result cannot be read: {type(error).__name__}: {error}"
    if status != "ok":
        line["log"] = log.read_text(errors="replace")[-2000:]
    return line


def search_path() -> str:
    """Return PYTHONPATH with the folders of the repository that sections import from."""
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def work_place() -> Path | None:
    """Return memory to keep models in, where there is enough; None for the usual place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > ROOM else None


def no_gpu() -> str:
    """Say why there is no GPU to be measured."""
    try:
        import torch
    except ModuleNotFoundError:
        return f"{sys.executable} has no torch: name a Python that has one, as in make gpu PYTHON=.venv/bin/python"
    if shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"torch {torch.__version__}, {built}, sees no GPU here, though nvidia-smi is there"
    return f"torch {torch.__version__} sees no GPU here"


def choose_setup(device: str) -> Setup:
    """Return what this device can be asked."""
    if device == "cpu":
        return ON_CPU
    return LARGE if gpu()["gpu_gb"] * 1e9 >= LARGE_GPU else MEDIUM


def result_name(setup: Setup) -> str:
    """Return the name of the results of a device: 'gpu_nvidia-h200', 'gpu_script_on_cpu'."""
    if setup.device == "cpu":
        return "gpu_script_on_cpu"
    return f"gpu_{'-'.join(gpu()['gpu'].lower().split())}"


def append(path: Path, line: dict[str, Any]) -> None:
    """Write a line to the disk before anything else can fail."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Run the sections one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--output", type=Path, help="folder of the results; default $OUT, else benchmarks/results")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds in all")
    parser.add_argument("--began", type=float, default=time.time(), help="when gpu.sh began, in seconds of the epoch")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not gpu():
        print(f"gpu.sh: {no_gpu()}; nothing was measured. To check the script itself: benchmarks/gpu.sh --device cpu")
        sys.exit(6)
    setup = choose_setup(arguments.device)
    folder = arguments.output or Path(os.environ.get("OUT") or HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f"{result_name(setup)}.jsonl"
    lines.unlink(missing_ok=True)
    device = machine("torch", "transformers", "deepspeed", "trl")
    name = device.get("gpu", "none: a CPU")
    append(lines, {"gpu": name, "section": "machine", "status": "ok", "result": device, "setup": asdict(setup)})
    failed = False
    with tempfile.TemporaryDirectory(dir=work_place() if setup.device == "cuda" else None) as work:
        for section in sections(setup, Path(work)):
            if arguments.sections and section.name not in arguments.sections:
                continue
            left = setup.patience * arguments.limit - (time.time() - arguments.began) - SPARE_S
            line = run(section, min(setup.patience * section.box_s, left), Path(work) / f"{section.name}.log")
            append(lines, {"gpu": name, **line})
            failed |= line["status"] != "ok"
            print(f"{section.name}: {line['status']}, {line['seconds']:.0f} s", flush=True)
    print(f"results: {lines}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
