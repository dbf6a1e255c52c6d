"""The check of a whole run: the digest of every file, and that each artifact was made from its recorded inputs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from can_dist.errors import DataError
from can_dist.tables.artifacts import MANIFEST, Artifact, artifact_key, check_file, load_artifact


def verify_run(run: Path) -> tuple[int, list[str]]:
    """Return the number of a run's artifacts, and a line per problem: file digests, keys, lineage of the inputs."""
    artifacts: dict[str, Artifact] = {}
    problems = []
    for manifest in sorted(run.glob(f"*/{MANIFEST}")):
        try:
            artifacts[manifest.parent.name] = load_artifact(manifest.parent)
        except DataError as error:
            problems.append(str(error))
    for name, artifact in artifacts.items():
        for entry in artifact.manifest["files"]:
            try:
                check_file(artifact.path, entry)
            except DataError as error:
                problems.append(str(error))
        inputs = artifact.manifest["inputs"]
        key = artifact_key(artifact.manifest["identity"], {role: entry["digest"] for role, entry in inputs.items()})
        if name != f"{artifact.stage}-{key}":
            problems.append(f"{artifact.path / MANIFEST}: its identity has key {key}, the directory is named {name}.")
        for role, entry in inputs.items():
            source = artifacts.get(entry["artifact"])
            if source is None:
                problems.append(f"{artifact.path}: made from {role} = {entry['artifact']}, which is not in the run.")
            elif source.digest != entry["digest"]:
                problems.append(f"{artifact.path}: made from another {entry['artifact']} than the one in the run.")
    return len(artifacts), problems


def files_outside(run: Path) -> Counter[str]:
    """Return the files of a run that no manifest lists, whose content nothing checks: how many of each name.

    Digits in names are written ``*``, so that the parts of a table have one. Manifests carry their own digest.
    """
    listed = set()
    for manifest in run.glob(f"*/{MANIFEST}"):
        try:
            artifact = load_artifact(manifest.parent)
        except DataError:  # `verify_run` reports it
            continue
        listed |= {manifest, *(artifact.path / entry["file"] for entry in artifact.manifest["files"])}
    outside = (path for path in sorted(run.rglob("*")) if path.is_file() and path not in listed)
    return Counter(re.sub(r"\d+", "*", path.name) for path in outside)
