"""What the table can support, in numbers and in one sentence (ALGORITHMS section 2)."""

from __future__ import annotations

import math

import numpy as np

from can_dist.dual.columns import Scores
from can_dist.dual.predict import Prediction
from can_dist.dual.solution import Diagnostics
from can_dist.dual.table import FloatArray

TRUSTED_ESS = 10.0
"""Median effective sample size from which the finite-K bias of λ̂ is small beside its standard error."""

TRUSTED_LOW_ESS = 5.0
"""The same for its tenth percentile: a few prompts with one-hot weights already bias λ̂."""

COLLAPSED_ESS = 2.0
"""Median effective sample size under which the weights are all but one-hot."""


def weight_diagnostics(table: Scores, lam_J: FloatArray, beta: float, prediction: Prediction | None) -> Diagnostics:
    """Summarise the table and, where λ is finite, the weights at λ.

    ESS and KL/ln K are over prompts with more than one response: the others hold no information.
    """
    informative = table.num_responses_P > 1
    ess = {name: math.nan for name in ("min", "p10", "median", "p90", "max")}
    kl_over_log_k = sd_over_beta = math.nan
    if prediction is not None:
        sd_over_beta = table.score_spread(lam_J) / beta
        if informative.any():
            quantiles = np.quantile(prediction.ess_P[informative], [0.0, 0.1, 0.5, 0.9, 1.0])
            ess = dict(zip(ess, map(float, quantiles), strict=True))
            log_k = np.log(table.num_responses_P[informative])
            kl_over_log_k = float(prediction.kl_P[informative].mean() / log_k.mean())
    counts = table.num_responses_P
    return {
        "num_prompts": table.num_prompts,
        "num_responses": table.num_rows,
        "num_single_response_prompts": int((~informative).sum()),
        "responses_per_prompt": {
            "min": float(counts.min()),
            "median": float(np.median(counts)),
            "max": float(counts.max()),
        },
        "ess": ess,
        "kl_over_log_k": kl_over_log_k,
        "sd_over_beta": sd_over_beta,
        "verdict": _verdict(table, ess["median"], ess["p10"], sd_over_beta, prediction is not None),
    }


def _verdict(table: Scores, ess: float, low_ess: float, sd_over_beta: float, solved: bool) -> str:
    """Say whether the prediction may be trusted. Scores are frozen once sd/β passes √(2 ln K)."""
    if not solved:
        return "There is no prediction to trust: no finite lambda was reached."
    if not (table.num_responses_P > 1).any():
        return (
            "The table cannot tell policies apart: every prompt has one response, so the prediction is the reference."
        )
    typical = float(np.median(table.num_responses_P[table.num_responses_P > 1]))
    limit = math.sqrt(2 * math.log(typical))
    facts = f"median effective sample size {ess:.1f} of K = {typical:g}, score sd {sd_over_beta:.2g} beta"
    if table.weighted:
        return (
            f"Exact if the weighted table enumerates all that the reference can say; if its responses were sampled, "
            f"judge by the weights ({facts})."
        )
    if sd_over_beta > limit or ess < COLLAPSED_ESS:
        return (
            f"Do not trust the prediction: the weights have collapsed towards the best of K ({facts}; the limit is "
            f"{limit:.2g}), so lambda and KL depend on K, not only on the reference."
        )
    if ess < TRUSTED_ESS or low_ess < TRUSTED_LOW_ESS:
        few = "" if ess < TRUSTED_ESS else " in a tenth of the prompts"
        return (
            f"Use the prediction with care: too few responses carry the weight{few} ({facts}), so lambda is biased by "
            f"the finite K; raise beta or the number of responses."
        )
    return (
        f"The prediction may be trusted to within its standard errors ({facts}); it is in sample, so confirm it on "
        f"held-out prompts; examine the table (diagnose) where scores may have a long upper tail."
    )
