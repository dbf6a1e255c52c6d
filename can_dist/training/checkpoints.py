"""Training checkpoints that are either whole or not there.

Every rank writes its part, all files are digested, and only then rank 0 commits ``COMMIT.json``. The newest commit
whose files still have their digests is resumed from, by any number of ranks; DeepSpeed's ``latest`` is never read. The
checkpoint before the previous one is removed only after a commit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from can_dist.dual.flat import Best
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.tables.artifacts import digest_of, file_digest, write_json
from can_dist.tables.disk import sync
from can_dist.training import ranks
from can_dist.training.extensions import unsafe_below

COMMIT = "COMMIT.json"
LAM = "lam.json"
BEST = "best.json"
TAG = "state"
UNIVERSAL = "universal"
KEEP = 2
BYTES_PER_WEIGHT = 16  # of a trained weight: the weight, its fp32 master copy, and the two moments of Adam


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: Its directory.
        step: Optimizer steps done.
        universal: Whether it was written by another number of ranks, and converted for this one.
        lam: λ that the examples are labelled by from here on, by constraint; empty where none was kept.
        best: The evaluation that later ones are compared with; None where none was kept.
    """

    path: Path
    step: int
    universal: bool
    lam: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None

    @property
    def ds_config(self) -> dict[str, Any]:
        """The keys that DeepSpeed's configuration needs to load it."""
        return {"checkpoint": {"load_universal": True}} if self.universal else {}


def save(
    engine: Any, directory: Path, step: int, lam: Mapping[str, float], best: Best | None, *, adapters_only: bool
) -> None:
    """Write and commit the checkpoint of ``step`` on all ranks, with λ and the best evaluation; keep the two newest.

    Raises:
        EnvironmentProblem: on all ranks, when it does not fit on the disk or a rank could not write its part. The
            checkpoints before it are kept.
    """
    path, first = directory / f"step-{step:06d}", dist.get_rank() == 0
    with ranks.agreed():
        if first:
            directory.mkdir(mode=0o700, exist_ok=True)  # pickles: nobody else may write one
            for stale in directory.glob("step-*"):
                if stale.name >= path.name:  # never committed, or damaged
                    shutil.rmtree(stale)
            weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
            trained = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
            require_space("a checkpoint needs up to", BYTES_PER_WEIGHT * trained, directory, directory)
    with _notes_failures(engine) as failures:
        engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=adapters_only)
    try:
        with ranks.agreed():
            if failures:
                raise EnvironmentProblem(f"{failures[0]}. {_advice(directory)}")
            if first and lam:
                write_json(path / LAM, dict(lam))
            if first and best is not None:
                write_json(path / BEST, best.to_dict())
        digests = _digests(path)
        with ranks.agreed():
            if first:
                _commit(path, step, digests)
    except EnvironmentProblem:
        if first:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if first:
        for old in sorted(directory.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def newest(directory: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, the same on all ranks, or None when none was committed.

    All files are compared with their digests, by all ranks, before any of them reads a pickle. A checkpoint that is not
    whole is reported and passed over.

    Raises:
        EnvironmentProblem: when others can write the checkpoints: DeepSpeed reads them as pickles, which run code.
        DataError: when none of those that were committed is whole any more.
    """
    with ranks.agreed():
        refuse_foreign(directory)
        if dist.get_rank() == 0:
            shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)
    paths = ranks.of_first(
        [(path, (path / COMMIT).is_file()) for path in sorted(directory.glob("step-*"), reverse=True)]
    )
    damaged = []
    for path, committed in paths:
        commit = ranks.of_first(_read_commit(path))
        problem = (
            _damage(path, commit["files"]) if commit else f"its {COMMIT} is {'damaged' if committed else 'missing'}"
        )
        if problem or commit is None:
            ranks.say(f"checkpoint {path.name} is not whole and is passed over: {problem}")
            damaged += [f"{path.name}: {problem}"] if committed else []
        elif commit["world_size"] == dist.get_world_size():
            return Checkpoint(path, commit["step"], universal=False, lam=_lam(path), best=_best(path))
        else:
            return _converted(path, commit)
    if damaged:
        raise DataError(
            f"{directory}: every checkpoint is damaged ({'; '.join(damaged)}). Restore one, or delete {directory} to "
            "train from the start."
        )
    return None


def load(engine: Any, checkpoint: Checkpoint, *, adapters_only: bool) -> None:
    """Load a checkpoint into an engine that was made with its ``ds_config``."""
    engine.load_checkpoint(str(checkpoint.path), tag=TAG, load_module_strict=not adapters_only)
    dist.barrier()
    if checkpoint.universal and dist.get_rank() == 0:
        shutil.rmtree(checkpoint.path)
    ranks.say(f"going on from checkpoint step-{checkpoint.step:06d}")


def refuse_foreign(directory: Path) -> None:
    """Raise ``EnvironmentProblem`` when anyone but this user and root can have written at or below ``directory``."""
    if unsafe := unsafe_below(directory):
        path, reason = unsafe
        raise EnvironmentProblem(
            f"{path}: {reason}, and checkpoints are pickles, which run code. If you trust it, run "
            f"'chmod -R go-w {directory}' and 'chown -R $USER {directory}'; else delete it to start over."
        )


def _converted(path: Path, commit: Mapping[str, Any]) -> Checkpoint:
    """Convert a checkpoint, parameter by parameter, for another number of ranks than wrote it."""
    out = path.parent / UNIVERSAL
    ranks.say(f"{path.name} was written by {commit['world_size']} rank(s) and is converted for {dist.get_world_size()}")
    with ranks.agreed():
        if dist.get_rank() == 0:
            folders = ["--input_folder", str(path / TAG), "--output_folder", str(out / TAG)]
            # a process of its own: it starts others, which must not inherit the process group
            done = subprocess.run(
                [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"],
                env={**os.environ, "DS_ACCELERATOR": "cpu"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
                raise EnvironmentProblem(
                    f"{path}: DeepSpeed could not convert it for {dist.get_world_size()} rank(s): {lines[-1]}. "
                    f"{_free(path)}. Free space, or train with {commit['world_size']} rank(s)."
                )
    return Checkpoint(out, commit["step"], universal=True, lam=_lam(path), best=_best(path))


def _lam(path: Path) -> dict[str, float]:
    """Return λ of a checkpoint whose files have their digests."""
    kept: dict[str, float] = json.loads((path / LAM).read_text(encoding="utf-8")) if (path / LAM).is_file() else {}
    return kept


def _best(path: Path) -> Best | None:
    """Return the best evaluation of a checkpoint whose files have their digests."""
    file = path / BEST
    return Best.from_dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


@contextmanager
def _notes_failures(engine: Any) -> Iterator[list[str]]:
    """Sync each file to the disk and collect failures: a rank that raised at once would leave the others waiting."""
    failures: list[str] = []
    writer = engine.checkpoint_engine
    plain = writer.save

    def save_file(state_dict: Any, path: str) -> None:
        try:
            plain(state_dict, path)
            sync(Path(path))
        except (OSError, RuntimeError) as error:  # torch raises either when the disk is full
            failures.append(_not_written(Path(path), error))

    writer.save = save_file
    engine._copy_recovery_script = lambda _: None  # a file that nothing here reads
    try:
        yield failures
    finally:
        writer.save = plain


@contextmanager
def writing(path: Path, checkpoints: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into the error of a checkpoint that cannot be written.

    Raises:
        EnvironmentProblem: with the path, the cause, the free space, and the checkpoint in ``checkpoints`` that the
            same command goes on from.
    """
    try:
        yield
    except Exception as error:
        # tokenizers raises a plain Exception
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise EnvironmentProblem(f"{_not_written(path, error)}. {_advice(checkpoints)}") from None


def require_space(need: str, needed: float, directory: Path, checkpoints: Path) -> None:
    """Raise ``EnvironmentProblem`` unless ``directory`` has room for ``needed`` bytes; ``need`` begins the message."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise EnvironmentProblem(
            f"{directory}: {need} {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. {_advice(checkpoints)}"
        )


def _not_written(path: Path, error: Exception) -> str:
    return f"{path}: could not be written ({str(error).splitlines()[0]}). {_free(path.parent)}"


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 1e6:.1f} MB are free there"


def _advice(directory: Path) -> str:
    kept = sorted(path.parent.name for path in directory.glob(f"step-*/{COMMIT}"))
    return f"Free space; the same command goes on from {kept[-1] if kept else 'the start'}."


def _commit(path: Path, step: int, digests: Mapping[str, str]) -> None:
    commit = {"step": step, "world_size": dist.get_world_size(), "files": digests}
    write_json(path / COMMIT, {**commit, "digest": digest_of(commit)})


def _read_commit(path: Path) -> dict[str, Any] | None:
    try:
        commit: dict[str, Any] = json.loads((path / COMMIT).read_text(encoding="utf-8"))
        return commit if commit.pop("digest") == digest_of(commit) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digests(path: Path) -> dict[str, str]:
    """Digest the files of a checkpoint, each rank a share of them; the same result on all ranks."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != COMMIT]
    names = ranks.of_first(sorted(str(file.relative_to(path)) for file in files))
    share = {name: _digest(path / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    return dict(sorted(item for digests in ranks.gathered(share) for item in digests.items()))


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        return f"not readable: {error.strerror}"


def _damage(path: Path, committed: Mapping[str, str]) -> str:
    """Return the faults of a checkpoint's files, the same on all ranks, or ''."""
    now = _digests(path)
    wrong = [f"{name} is missing" for name in committed if name not in now]
    wrong += [f"{name} was not committed" for name in now if name not in committed]
    changed = [name for name, digest in now.items() if committed.get(name, digest) != digest]
    wrong += [f"{name} changed since it was committed" for name in changed]
    return "; ".join(wrong[:5])
