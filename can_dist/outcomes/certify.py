"""A finished run and its policy → a certificate on the run's sealed prompts."""

from __future__ import annotations

from pathlib import Path

from can_dist.config import Config, load_config
from can_dist.errors import ConfigError, DataError
from can_dist.measuring.certificate import CERTIFIED, NOT_CERTIFIED, NOT_ENOUGH
from can_dist.modeling.loading import model_digest
from can_dist.outcomes.certificates import CONFIG
from can_dist.outcomes.export import find_policy
from can_dist.run import Run
from can_dist.stages.estimate import trained_policy
from can_dist.stages.sealed import SPLIT
from can_dist.tables.artifacts import Artifact
from can_dist.tables.lineage import ancestor

EXIT_CODES = {CERTIFIED: 0, NOT_CERTIFIED: 4, NOT_ENOUGH: 7}
"""Answer → what the command line returns: as for margins that cannot be met, or a code of its own."""


def run_certificate(path: Path, *, delta: float | None = None, tolerance: float | None = None) -> Artifact:
    """Return the certificate of a run's policy, by its constraints, on its sealed prompts.

    ``path`` is a run with one policy, or an artifact of the stages train, merge, strength or evaluate. The same policy
    again is the same look at the sealed prompts; another policy of the run is one more, at a smaller error.

    Raises:
        ConfigError: ``delta`` is not in (0, 1) or not that of the first look, or an equality has no tolerance.
        DataError: The run has no policy, several, or no sealed prompts; these were used by another stage; the ledger
            is damaged; or the reference is not the one that was trained from.
    """
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(
            f"--delta {delta:g}: expected between 0 and 1.",
            "It is the probability with which a policy that misses a constraint may be certified; 0.05 is usual.",
        )
    policy, _ = find_policy(path)
    run = policy.path.parent
    prompts = ancestor(policy, "prompts")
    if not prompts.info["counts"].get(SPLIT):
        raise DataError(
            f"{prompts.path}: no prompts are sealed, so there is nothing to certify {policy.path.name} on.",
            "Set prompts.num_sealed (256 or more are advised) and run again in a directory of its own: it decides "
            "which prompts are trained on.",
        )
    config = load_config(run / CONFIG)
    check_reference(policy, config)
    with Run(run, config) as open_run:
        return open_run.certify(policy, prompts, delta=delta, tolerance=tolerance)


def check_reference(policy: Artifact, config: Config) -> None:
    """Raise ``DataError`` where the configured reference is not what the policy's first training began from."""
    trained = trained_policy(policy)
    while "reference" in trained.manifest["inputs"]:
        trained = trained.input("reference")
    if trained.manifest["identity"]["reference"] != model_digest(config.reference):
        raise DataError(
            f"reference {config.reference.model!r}: its weights are not those that {trained.path} was trained from.",
            "Bring those back: a margin is an improvement over them.",
        )
