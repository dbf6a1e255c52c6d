"""The certificates of a run: the one of a policy, and what an export asks of it."""

from __future__ import annotations

from can_dist.config import load_config
from can_dist.config.base import identity
from can_dist.errors import DataError
from can_dist.measuring.certificate import CERTIFIED
from can_dist.stages.certify import CERTIFICATE
from can_dist.stages.sealed import read_looks
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact

CONFIG = "config.yaml"


def find_certificate(policy: Artifact) -> Artifact | None:
    """Return the certificate of exactly this policy for the constraints that its run has now; a certified one first.

    Raises:
        DataError: The run's ledger is damaged.
    """
    run = policy.path.parent
    if not (run / CONFIG).is_file():
        return None
    made = [load_artifact(path.parent) for path in sorted(run.glob(f"certify-*/{MANIFEST}"))]
    config = load_config(run / CONFIG)
    constraints = {name: identity(constraint) for name, constraint in config.constraints.items()}
    looks = {(look.number, look.digest) for look in read_looks(run)} if made else set()
    matching = [
        certificate
        for certificate in made
        if certificate.manifest["inputs"]["policy"]["digest"] == policy.digest
        and certificate.info["constraints"] == constraints
        and (certificate.info["look"], policy.digest) in looks
    ]
    return next((c for c in matching if c.info["answer"] == CERTIFIED), matching[0] if matching else None)


def require_certificate(policy: Artifact, certificate: Artifact | None) -> None:
    """Raise ``DataError`` unless a policy is certified for its run's constraints."""
    if certificate is None:
        raise DataError(
            f"{policy.path}: has no certificate for the constraints of {policy.path.parent / CONFIG}.",
            f"Run 'can-dist certify {policy.path}' first, or leave --require-certificate out.",
        )
    if certificate.info["answer"] != CERTIFIED:
        answer = certificate.read_json(CERTIFICATE)["sentences"]
        raise DataError(f"{policy.path}: {' '.join(answer)} ({certificate.path.name})")
