"""The sealed prompts of a run: that nothing read them but certificates, and how often those did.

``RUN/sealed.jsonl`` is the ledger of looks. A line is written before anything is generated for a sealed prompt, and
holds the digest of all lines before it: a line that is changed or taken out is seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from can_dist.errors import ConfigError, DataError
from can_dist.stages.held_out import SEALED
from can_dist.tables.artifacts import MANIFEST, STAGE, Artifact, digest_of, load_artifact, read_part, write_text
from can_dist.tables.foreign.messages import prompt_id

LEDGER = "sealed.jsonl"
SPLIT = SEALED[0]
LOOKING = ("generate", "score", "scores", "certify")
"""Stages of a certificate; whatever else was made from responses to sealed prompts has used them."""


@dataclass(frozen=True)
class Look:
    """One look at the sealed prompts of a run directory.

    Attributes:
        number: 1 for the first.
        delta: joint error of all looks of the run, of which this one spends ``error_of``.
        policy: name of the policy's artifact.
        digest: of the policy.
        models: digests of the models that respond.
        measurement: digest of all that decides the numbers: policy, sampling, scorers, kinds of constraints.
        time: when it was taken.
        before: sha256 of the ledger as it was, hexadecimal.
    """

    number: int
    delta: float
    policy: str
    digest: str
    models: list[str]
    measurement: str
    time: str
    before: str

    @property
    def error(self) -> float:
        """What this look may spend."""
        return error_of(self.delta, self.number)


def error_of(delta: float, number: int) -> float:
    """Return the error that look ``number`` may spend: δ·6/(π²i²), whose sum over all i is δ.

    No number of looks has to be known in advance, and none is the last. Of the series that sum to one this leaves 61 %
    to the first look, which is most often the only one; halving, 2⁻ⁱ, would leave it 50 % and the sixth 1.6 %.
    """
    return delta * 6 / (math.pi * number) ** 2


def read_looks(run: Path) -> list[Look]:
    """Return the looks at a run's sealed prompts, in order.

    Raises:
        DataError: The ledger is not as it was written.
    """
    path = run / LEDGER
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    looks = []
    for number, line in enumerate(lines, start=1):
        try:
            look = Look(**json.loads(line))
        except (ValueError, TypeError):
            look = None
        if look is None or (look.number, look.before) != (number, _digest(lines[: number - 1])):
            raise DataError(
                f"{path}, line {number}: not as it was written, so nobody knows how often the sealed prompts were "
                "looked at.",
                "Bring the file back from a copy; without it this run can have no certificate.",
            )
        looks.append(look)
    return looks


def record_look(
    run: Path, policy: Artifact, models: Sequence[str], measurement: Mapping[str, Any], delta: float | None
) -> Look:
    """Return the look that a measurement is, appended to the ledger unless it is there; the caller holds the run.

    Args:
        run: The run directory.
        policy: What is measured.
        models: Digests of the models that respond.
        measurement: All that decides the numbers.
        delta: Joint error of all looks; None: that of the first look, or 0.05.

    Raises:
        ConfigError: ``delta`` is not that of the first look.
        DataError: The ledger is damaged.
    """
    looks = read_looks(run)
    if looks and delta is not None and delta != looks[0].delta:
        raise ConfigError(
            f"--delta {delta:g}: the first look at the sealed prompts of {run} was taken at {looks[0].delta:g}, which "
            "is the joint error of all of them; chosen after a look it would be none.",
            f"Leave --delta out, or give {looks[0].delta:g}.",
        )
    key = digest_of(measurement)
    if known := [look for look in looks if look.measurement == key]:
        return known[0]
    joint = looks[0].delta if looks else (0.05 if delta is None else delta)
    path = run / LEDGER
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if looks else []
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    look = Look(len(looks) + 1, joint, policy.path.name, policy.digest, list(models), key, now, _digest(lines))
    write_text(path, "".join([*lines, json.dumps(asdict(look), ensure_ascii=False) + "\n"]))
    return look


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_unread(run: Path, prompts: Artifact) -> None:
    """Raise ``DataError`` where a sealed prompt, by its id or by what it says, stands in the tables of another stage.

    Every artifact of the run directory is looked at, whoever made it: what a person chose after seeing an older report
    was chosen by these prompts too.
    """
    rows = [row for row in prompts.table.to_pylist() if row["split"] == SPLIT]
    ids, contents = {row["prompt_id"] for row in rows}, {prompt_id(row["messages"]) for row in rows}
    artifacts = [load_artifact(path.parent) for path in sorted(run.glob(f"*/{MANIFEST}"))]
    _check_looks(run)
    looking = _looking(run, artifacts)
    for artifact in artifacts:
        if artifact.stage == "prompts" or artifact.path.name in looking:
            continue
        by_id, by_text = 0, 0
        for key, messages in _prompts_in(artifact):
            by_id += key in ids and not _is_benign(artifact)
            by_text += messages is not None and prompt_id(messages) in contents
        if by_id or by_text:
            how = f"{by_text} by what they say" if by_text else f"{by_id} by their id"
            raise _used(run, len(rows), artifact, how)


def _looking(run: Path, artifacts: Sequence[Artifact]) -> set[str]:
    """Return the names of the artifacts of certificates; raise where another stage read one of them."""
    names = {artifact.path.name for artifact in artifacts if artifact.manifest["identity"].get("split") == SPLIT}
    size = -1
    while size != len(names):
        size = len(names)
        for artifact in artifacts:
            if any(entry["artifact"] in names for entry in artifact.manifest["inputs"].values()):
                if artifact.stage not in LOOKING:
                    raise _used(run, None, artifact, "by the responses to them")
                names.add(artifact.path.name)
    return names


def _check_looks(run: Path) -> None:
    """Raise where responses to sealed prompts, finished or not, are those of no look of the ledger."""
    known = {model for look in read_looks(run) for model in look.models}
    for path in sorted(run.glob(f"generate-*/{STAGE}")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))["identity"]
            is_unknown = about.get("split") == SPLIT and about["model"] not in known
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: damaged.", f"Delete {path.parent} and give the command again.") from None
        if is_unknown:
            raise DataError(
                f"{run / LEDGER}: does not name the look that made {path.parent.name}, so nobody knows how often the "
                "sealed prompts were looked at.",
                "Bring the file back from a copy; without it this run can have no certificate.",
            )


def _used(run: Path, num_sealed: int | None, artifact: Artifact, how: str) -> DataError:
    of = f" of {num_sealed}" if num_sealed else ""
    return DataError(
        f"{run}: its sealed prompts were used by {artifact.path.name} ({how}{of}), so a certificate would say less "
        "than it claims.",
        "Run again in a directory of its own, with prompts.num_sealed from the start and no sealed prompt, nor its id, "
        "in other data.",
    )


def _is_benign(artifact: Artifact) -> bool:
    """Return whether a table holds responses to benign prompts, whose ids are those of another file."""
    prompts = artifact.manifest["inputs"].get("prompts")
    return prompts is not None and artifact.input("prompts").manifest["identity"]["label"] != "prompts"


def _prompts_in(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Yield id and messages (None without such a column) of every prompt of a table once a part."""
    for path in artifact.parts:
        table = read_part(path)
        if "prompt_id" not in table.column_names:
            continue
        keys: list[str] = table.column("prompt_id").to_pylist()
        first = list({key: row for row, key in reversed(list(enumerate(keys)))}.values())
        said: list[Any] = [None] * len(first)
        if "messages" in table.column_names:
            said = table.column("messages").take(pa.array(first, pa.int64())).to_pylist()
        yield from zip([str(keys[row]) for row in first], said, strict=True)
