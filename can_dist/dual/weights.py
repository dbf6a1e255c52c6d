"""What the table can support, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from can_dist.dual.belief.trust import LAM_LIMIT, Trust
from can_dist.dual.columns import Scores
from can_dist.dual.interval import Interval
from can_dist.dual.predict import Prediction
from can_dist.dual.solution import Delivered, Diagnostics, Judgement
from can_dist.dual.table import FloatArray

TRUSTED_ESS = 10.0
"""Effective responses of a prompt from which its bias of order 1/K is small; a mark on the figures, no verdict."""

COLLAPSED_ESS = 2.0
"""Median effective sample size under which the weights are all but one-hot."""

LEAST_SHARE = 1e-4
"""Smallest share that is written out: below, two digits need an exponent."""


def weight_diagnostics(
    table: Scores,
    lam_J: FloatArray,
    beta: float,
    prediction: Prediction | None,
    trust: Trust | None = None,
    level: Mapping[str, float] | None = None,
) -> Diagnostics:
    """Summarise the table and, where λ is finite, the weights at λ and what they can be trusted for.

    ESS and KL/ln K are over prompts with more than one response: the others hold no information.

    Args:
        table: scores of P prompts.
        lam_J: λ.
        beta: KL weight β > 0.
        prediction: at λ; None where no finite λ was reached.
        trust: the judgement of λ; None where the responses are no samples, or cannot be revisited.
        level: the constraints by name, 1 where one is an absolute level; in the order of ``trust``.
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
    summary: Diagnostics = {
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
        "verdict": "",
    }
    if trust is not None and level:
        summary["judgement"] = _judgement(trust, level)
    summary["verdict"] = verdict(summary, solved=prediction is not None, weighted=table.weighted)
    return summary


def turned_diagnostics(diagnostics: Diagnostics, sign: Mapping[str, float]) -> Diagnostics:
    """Return the diagnostics for the utilities before each was multiplied by its sign."""
    if "judgement" not in diagnostics:
        return diagnostics
    judgement = diagnostics["judgement"]
    delivered = {
        name: replaced if sign[name] > 0 else _mirrored(replaced) for name, replaced in judgement["delivered"].items()
    }
    turned: Diagnostics = {**diagnostics, "judgement": {**judgement, "delivered": delivered}}
    return {**turned, "verdict": verdict(turned, solved=True, weighted=False)}


def verdict(diagnostics: Diagnostics, *, solved: bool, weighted: bool) -> str:
    """Say what may be believed: what π_λ delivers on new prompts, and how well λ is known; or why neither is said."""
    num_prompts = diagnostics["num_prompts"]
    if not solved:
        return "There is no prediction to trust: no finite lambda was reached."
    if diagnostics["num_single_response_prompts"] == num_prompts:
        return (
            "The table cannot tell policies apart: every prompt has one response, so the prediction is the reference."
        )
    if weighted:
        return (
            "Exact if the weighted table enumerates all that the reference can say; if its responses were sampled, "
            f"nothing here vouches for it (median effective sample size {diagnostics['ess']['median']:.1f} of "
            f"{diagnostics['responses_per_prompt']['median']:g})."
        )
    if "judgement" not in diagnostics:
        return "There is no constraint, so there is no lambda to know."
    judgement = diagnostics["judgement"]
    if judgement["objection"]:
        return f"Do not trust the prediction or lambda: {judgement['objection']}."
    parts = [_delivered_text(judgement), _lambda_text(judgement)]
    if flat := judgement["num_flat"] - diagnostics["num_single_response_prompts"]:
        parts.append(f"{flat} of {num_prompts} prompts cannot show a change: their responses all score alike.")
    return " ".join([*parts, f"A kind of prompt rarer than 3 in {num_prompts} may be unseen."])


def percent(share: float) -> str:
    """Return a share as a percentage: two digits below 100 %, a whole number above, never an exponent."""
    if 0 < share < LEAST_SHARE:
        return f"less than {100 * LEAST_SHARE:g}%"
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _judgement(trust: Trust, level: Mapping[str, float]) -> Judgement:
    """Return a judgement by constraint."""
    names = list(level)

    def by_name(values_J: FloatArray) -> dict[str, float]:
        return dict(zip(names, np.asarray(values_J).tolist(), strict=True))

    def described(interval: Interval, bias: float) -> Delivered:
        return {"mean": interval.mean, "se": interval.se, "low": interval.low, "high": interval.high, "bias": bias}

    intervals = zip(names, trust.delivered, trust.bias_J.tolist(), strict=True)
    return {
        "objection": trust.objection,
        "delivered": {name: described(interval, bias) for name, interval, bias in intervals},
        "kl": described(trust.kl, trust.kl_bias),
        "level": {name: bool(value) for name, value in level.items()},
        "lam_error": by_name(trust.lam_error_J),
        "lam_bias": by_name(trust.lam_bias_J),
        "lam_known": trust.lam_known,
        "ess": by_name(trust.ess_J),
        "carriers": by_name(trust.evidence.carriers_J),
        "shape": trust.evidence.shape,
        "num_flat": trust.num_flat,
    }


def _mirrored(delivered: Delivered) -> Delivered:
    return {**delivered, "mean": -delivered["mean"], "low": -delivered["high"], "high": -delivered["low"]}


def _delivered_text(judgement: Judgement) -> str:
    """Say what new prompts can expect, with the bias beside the interval that includes it."""
    parts = []
    for name, interval in judgement["delivered"].items():
        verb = "has a mean" if judgement["level"][name] else "changes"
        amount = f"{interval['low']:+.3g} to {interval['high']:+.3g} (bias {interval['bias']:.2g} allowed for)"
        parts.append(f"{verb} {name} {'of' if judgement['level'][name] else 'by'} {amount}")
    joint = " jointly" if len(parts) > 1 else ""
    return f"On new prompts the policy of this lambda {' and '.join(parts)}, at 95%{joint}."


def _lambda_text(judgement: Judgement) -> str:
    """Say how well λ is known, bias and sampling together."""
    error = max(judgement["lam_error"].values())
    if error == 0.0:
        return "Lambda is 0: the margin costs nothing."
    if judgement["lam_known"]:
        return f"Lambda is known to within {percent(error)}, bias included."
    if not math.isfinite(error):
        return "Lambda is not known: one that is 0 here may be above 0."
    return f"Lambda is not known to within {100 * LAM_LIMIT:g}%."
