"""Artifacts: the outputs of stages, addressed by content and committed so that a reader sees all of one or none.

An artifact is a directory ``RUN/<stage>-<key>/``. ``key`` is a digest of the stage's name, the format version, the
configuration that decides the result, and the digests of its inputs. ``STAGE.json`` (written first) says what the
directory is for; ``MANIFEST.json`` (written last, by one process) lists every file with its size and sha256 and is
what makes the artifact exist. Readers open only what the manifest lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from can_dist.errors import DataError
from can_dist.tables.disk import naming, sync
from can_dist.tables.misfits import UNREADABLE

FORMAT_VERSION = 3
MANIFEST = "MANIFEST.json"
STAGE = "STAGE.json"
PART = re.compile(r"part-(\d{5})\.arrow")
DIRECTORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # beside the artifact, never above it
MANIFEST_KEYS = {"stage", "format_version", "identity", "inputs", "files", "info", "digest"}
MANIFEST_ENTRY, FILE_ENTRY = {"stage": str, "identity": dict, "info": dict}, {"file": str, "bytes": int, "sha256": str}


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same directory; fsync and rename it to ``path`` when the block succeeds.

    The file gets the rights of any new file of this user, which the umask decides.
    """
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            temporary.chmod(mode)  # a library may have replaced the file by one of its own
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory beside ``path``; fsync and rename it to ``path`` when the block succeeds."""
    with naming(path), tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.absolute().parent) as scratch:
        built = Path(scratch) / path.name
        built.mkdir()
        yield built
        give_new_rights(built)
        for written in (*built.iterdir(), built):
            sync(written)
        built.rename(path)
    sync(path.absolute().parent)


def give_new_rights(directory: Path) -> None:
    """Give the files below ``directory`` the rights of new files, as the umask decides; some libraries write 0600."""
    probe = directory / f".tmp-{secrets.token_hex(8)}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@dataclass(frozen=True)
class Artifact:
    """A finished stage output. ``digest`` is the sha256 of its manifest file."""

    path: Path
    digest: str
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return str(self.manifest["stage"])

    @property
    def info(self) -> Mapping[str, Any]:
        """The stage's record beside its files (counts, models, statistics)."""
        info: Mapping[str, Any] = self.manifest["info"]
        return info

    @property
    def parts(self) -> list[Path]:
        """Paths of the table's parts, in order."""
        return [self.path / entry["file"] for entry in self.manifest["files"] if PART.fullmatch(entry["file"])]

    @property
    def num_rows(self) -> int:
        """Rows of the table, by the manifest."""
        return sum(entry["rows"] for entry in self.manifest["files"] if "rows" in entry)

    @cached_property
    def table(self) -> pa.Table:
        """The whole table, every part checked against the manifest's size and sha256."""
        self.check()
        return pa.concat_tables([read_part(path) for path in self.parts])

    def part(self, index: int) -> pa.Table:
        """One part of the table, checked."""
        return read_part(self._checked(f"part-{index:05d}.arrow"))

    def input(self, name: str) -> Artifact:
        """Return one of the artifacts it was made from, which lie beside it."""
        return load_artifact(self.path.parent / self.manifest["inputs"][name]["artifact"])

    def files_in(self, folder: str) -> list[str]:
        """Return the names of the listed files below a folder of the artifact, relative to the folder."""
        names = [str(entry["file"]) for entry in self.manifest["files"]]
        return [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]

    def check(self) -> None:
        """Compare every listed file with the manifest; raise ``DataError`` at the first that is not as committed."""
        for entry in self.manifest["files"]:
            check_file(self.path, entry)

    def read_json(self, name: str) -> Any:
        """Return one listed JSON file, checked."""
        return json.loads(self._checked(name).read_text(encoding="utf-8"))

    @cached_property
    def _entries(self) -> dict[str, Mapping[str, Any]]:
        return {entry["file"]: entry for entry in self.manifest["files"]}

    def _checked(self, name: str) -> Path:
        entry = self._entries.get(name)
        if entry is None:
            raise DataError(f"{self.path / MANIFEST}: does not list {name}.", f"Delete {self.path} and run again.")
        check_file(self.path, entry)
        return self.path / name


def check_file(directory: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file with its manifest entry; raise ``DataError`` when it is missing, cut or changed."""
    path, remedy = directory / entry["file"], f"Delete {directory} and run again."
    if directory.resolve() not in path.resolve().parents:
        raise DataError(f"{directory / MANIFEST}: lists {entry['file']!r}, which lies outside the artifact.")
    if not path.is_file():
        raise DataError(f"{path}: listed in the manifest, but missing.", remedy)
    if (size := path.stat().st_size) != entry["bytes"]:
        raise DataError(f"{path}: {size} bytes, the manifest says {entry['bytes']}.", remedy)
    if file_digest(path) != entry["sha256"]:
        raise DataError(f"{path}: the content changed since it was committed.", remedy)


def read_part(path: Path) -> pa.Table:
    """Read one Arrow IPC file (never the stream format, which reads short without an error when cut)."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}).", "Delete its directory, run again.") from None


def load_artifact(directory: Path) -> Artifact:
    """Open a committed artifact by its directory."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory}: no {MANIFEST}, so this is not a finished artifact.")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        files, inputs = manifest["files"], manifest["inputs"].values()
        well_formed = all(isinstance(manifest[key], kind) for key, kind in MANIFEST_ENTRY.items())
        well_formed &= all(isinstance(entry[key], kind) for entry in files for key, kind in FILE_ENTRY.items())
        well_formed &= all(isinstance(entry[key], str) for entry in inputs for key in ("artifact", "digest"))
        well_formed &= all(DIRECTORY.fullmatch(entry["artifact"]) for entry in inputs)
        well_formed &= manifest.keys() <= MANIFEST_KEYS
        own = manifest.pop("digest", None)  # manifests of before have none
        well_formed &= own is None or own == digest_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise DataError(f"{path}: damaged, not a manifest of this program.", f"Delete {directory} and run again.")
    return Artifact(directory, hashlib.sha256(content).hexdigest(), manifest)


@dataclass(frozen=True)
class StageDirectory:
    """A stage's place in the run: its identity is fixed, its files may be absent, partial or complete."""

    path: Path
    stage: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    reason: str

    @property
    def finished(self) -> Artifact | None:
        """The artifact, if it was committed."""
        return load_artifact(self.path) if (self.path / MANIFEST).is_file() else None

    def finished_parts(self) -> set[int]:
        """Return the numbers of the parts whose commit is whole; any other part is removed, to be made again."""
        done = set()
        for path in self._parts():
            try:
                check_file(self.path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            except (DataError, OSError, ValueError, KeyError, TypeError):
                path.unlink()
            else:
                done.add(int(path.stem.removeprefix("part-")))
        return done

    def parts_table(self) -> pa.Table:
        """The parts made so far, before the manifest exists."""
        return pa.concat_tables([read_part(path) for path in self._parts()])

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.path.glob("part-*.arrow") if PART.fullmatch(path.name))

    def commit(
        self,
        files: list[str] | None = None,
        info: Mapping[str, Any] | None = None,
        parts: Collection[int] | None = None,
    ) -> Artifact:
        """Write the manifest over all parts and the named further files; from now on the artifact exists.

        Raises:
            DataError: the parts are not those of ``parts``, where given, or one has lost its sidecar.
        """
        for left_by_a_kill in self.path.glob(".tmp-*"):
            (shutil.rmtree if left_by_a_kill.is_dir() else Path.unlink)(left_by_a_kill)
        entries = []
        for part in self._parts():
            sidecar = part.with_suffix(".json")
            if not sidecar.is_file():
                raise DataError(f"{sidecar}: gone since its part was committed.", "Run again: the part is made again.")
            entries.append(json.loads(sidecar.read_text(encoding="utf-8")))
        if parts is not None:
            self._check_parts({int(entry["file"][5:10]) for entry in entries}, set(parts))
        entries += [_entry(self.path / name, name) for name in sorted(files or [])]
        manifest = {
            "stage": self.stage,
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "inputs": {n: {"artifact": a.path.name, "digest": a.digest} for n, a in self.inputs.items()},
            "files": entries,
            "info": dict(info or {}),
        }
        write_json(self.path / MANIFEST, {**manifest, "digest": digest_of(manifest)})
        return load_artifact(self.path)

    def _check_parts(self, there: set[int], expected: set[int]) -> None:
        missing, strange = sorted(expected - there), sorted(there - expected)
        first = ", ".join(map(str, (missing or strange)[:5]))
        if missing:
            state = f"{len(missing)} of {len(expected)} parts are gone since they were committed: number {first}."
            raise DataError(f"{self.path}: {state}", "Run again: they are made again.")
        if strange:
            state = f"has {len(strange)} part(s) that this stage did not make: number {first}."
            raise DataError(f"{self.path}: {state}", "Remove them and run again.")


def write_part(directory: Path, index: int, table: pa.Table) -> None:
    """Commit part ``index``: sidecar first, then the Arrow file whose presence completes the commit."""
    path = directory / f"part-{index:05d}.arrow"
    with atomic_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_json(path.with_suffix(".json"), {**_entry(temporary, path.name), "rows": table.num_rows})


def _entry(file: Path, name: str) -> dict[str, Any]:
    return {"file": name, "bytes": file.stat().st_size, "sha256": file_digest(file)}


def open_stage(
    run: Path, stage: str, label: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> StageDirectory:
    """Find or create the directory of a stage from what decides its result.

    ``label`` tells stages of the same name apart for people ("reward", "policy on test"); when nothing can be
    reused, the finished artifact of the same stage and label that differs least is compared, to say why.
    """
    whole = {"stage": stage, "label": label, "format_version": FORMAT_VERSION, **identity}
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    path = run / f"{stage}-{artifact_key(whole, digests)}"
    reason = ""
    if not (path / STAGE).is_file():
        reason = _why_not_reused(run, stage, label, whole, inputs)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / STAGE, {"identity": whole, "inputs": digests})
    return StageDirectory(path, stage, whole, inputs, reason)


def find_finished(
    run: Path, stage: str, label: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> Artifact | None:
    """Return the artifact that :func:`open_stage` would find finished, or None; nothing is created."""
    whole = {"stage": stage, "label": label, "format_version": FORMAT_VERSION, **identity}
    path = run / f"{stage}-{artifact_key(whole, {name: artifact.digest for name, artifact in inputs.items()})}"
    return load_artifact(path) if (path / MANIFEST).is_file() else None


def artifact_key(identity: Mapping[str, Any], input_digests: Mapping[str, str]) -> str:
    """Return what an artifact's directory is named after, beside its stage."""
    return digest_of({"identity": identity, "inputs": input_digests})[:16]


def _why_not_reused(
    run: Path, stage: str, label: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> str:
    """Name what changed against the most similar finished artifact of the same stage and label, or ''."""
    candidates = []
    for manifest in sorted(run.glob(f"{stage}-*/{MANIFEST}")):
        try:
            other = load_artifact(manifest.parent)
        except DataError:  # `verify` reports it; here it is only no candidate
            continue
        theirs = other.manifest["identity"]
        if theirs.get("label") != label:
            continue
        changes = _differences(theirs, identity)
        for name, artifact in inputs.items():
            before = other.manifest["inputs"].get(name, {}).get("digest")
            if before != artifact.digest:
                changes.append(f"its input {name} changed" if before else f"{name} is a new input")
        changes += [f"{name} is no longer an input" for name in other.manifest["inputs"] if name not in inputs]
        candidates.append((len(changes), f"{other.path.name} is not reused: {'; '.join(changes[:4])}"))
    return min(candidates, key=itemgetter(0), default=(0, ""))[1]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = flatten(before), flatten(after)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in changed]


def dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in dotted(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def flatten(value: Any) -> dict[str, str]:
    """Return dotted keys with their values as JSON, which is what the key of an artifact is made of."""
    return {key: canonical_json(leaf) for key, leaf in dotted(value).items()}
