"""people's preferences → an aligned policy whose log-ratio is a score: given, or from one DPO; can be calibrated."""

from __future__ import annotations

from dataclasses import replace

from can_dist.config import LogRatio, Model
from can_dist.scoring.log_ratio import check_same_text, given_ratio
from can_dist.scoring.protocol import LogProb, PolicyRatio
from can_dist.stages.calibrate import calibrate
from can_dist.stages.human_labels import label_human
from can_dist.stages.ingest import ingest_pairs
from can_dist.stages.score import score
from can_dist.stages.train import policy_model, train
from can_dist.tables.artifacts import Artifact
from can_dist.tables.schemas import LOGP_REFERENCE
from can_dist.workspace import Workspace


def align(work: Workspace, name: str, scorer: LogRatio, reference: Model, prompts: Artifact) -> PolicyRatio:
    """Return the score a·β ln π/π_ref that ``scorer`` describes; its policy is trained and calibrated where needed.

    Training is a DPO from the reference with the β of the scorer on people's labels of its criterion; pairs of
    held-out prompts are left out. The calibration uses the validation pairs, which no training sees.

    Raises:
        DataError: A given policy has another tokenizer or template than the reference, the data set has no label of
            the criterion, or the policy does not order the held-out preferences.
    """
    if not scorer.learns:
        return given_ratio(name, scorer, reference)
    if scorer.model is not None:
        check_same_text(scorer.model, reference)
    source, criterion = scorer.preferences or work.config.label.preferences, scorer.criterion
    assert source is not None, "checked with the configuration"
    assert criterion is not None, "checked with the configuration"
    pairs = ingest_pairs(work, source, reference, prompts)
    logps = score(work, pairs, {LOGP_REFERENCE: LogProb(model=reference)}, role=pairs.manifest["identity"]["label"])
    preferences = label_human(work, pairs, logps, criterion=criterion)
    if scorer.model is not None:
        ratio = PolicyRatio(scorer.model, reference, scorer.beta)
    else:
        policy = train(work, reference, preferences, beta=scorer.beta)
        ratio = PolicyRatio(policy_model(policy, reference), reference, scorer.beta, made_from={"training": policy})
    if not scorer.calibrate:
        return ratio
    fitted = calibrate(work, name, preferences, ratio)
    made_from = {**ratio.made_from, "calibration": fitted}
    return replace(ratio, scale=fitted.info["scale"], scale_se=fitted.info["scale_se"], made_from=made_from)
