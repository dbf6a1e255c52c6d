"""The section that says whether a prediction can be believed, in the report and as a page of its own.

:func:`write_diagnostics` needs a table of scores and a solution, but no trained policy. The report shows the same
section from the same template (``belief.html.j2``) and record (:func:`can_dist.measuring.examination.examine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from can_dist.dual import DualSolution, ScoreTable
from can_dist.dual.messages import lam_error
from can_dist.dual.weights import COLLAPSED_ESS, TRUSTED_ESS
from can_dist.measuring.examination import examine, influential
from can_dist.reporting.figures import belief as figures
from can_dist.reporting.page import MISSING, decimals_of, interval_text, number, panel, percent, plain, render
from can_dist.tables.artifacts import write_text

ESS_COLUMNS = (("min", "least"), ("p10", "10%"), ("median", "median"), ("p90", "90%"), ("max", "most"))
NUM_INFLUENTIAL = 5
Z_95 = 1.959964
SHOWN_ELSEWHERE = {"ess", "judgement", "kl_over_log_k", "sd_over_beta", "verdict"}
SCORER_ROWS = (
    ("mean", "mean"),
    ("within_sd", "sd within a prompt"),
    ("between_sd", "sd between prompts"),
    ("low", "lowest"),
    ("high", "highest"),
    ("skewness", "skewness within"),
    ("kurtosis", "excess kurtosis within"),
    ("correlation", "correlation with the reward"),
    ("tied", "share tied within"),
)


def write_diagnostics(
    table: ScoreTable,
    solution: DualSolution,
    path: Path,
    *,
    reward_name: str = "reward",
    texts: Callable[[Sequence[str]], Mapping[str, str]] | None = None,
) -> None:
    """Write the diagnostics of a solution as one self-contained HTML file, atomically.

    The same table and solution always give the same bytes. The page says what cannot be examined.

    Args:
        table: scores of P prompts that gave ``solution``, in raw units.
        solution: of any estimator and status.
        path: the file, in an existing directory.
        reward_name: name of the reward in the tables.
        texts: gives the beginnings of prompts by their ids; ids are shown where there is none.
    """
    record, examination = solution.to_dict(), examine(table, solution, reward_name=reward_name)
    examination["beginnings"] = texts(influential(examination)) if texts else {}
    section = believed(record, examination, reward_name=reward_name)
    counts = record["diagnostics"]["responses_per_prompt"]
    values = {
        "title": "Diagnostics of the dual",
        "beta": solution.beta,
        "estimator": solution.estimator,
        "num_prompts": table.num_prompts,
        "num_responses": _responses_text(counts),
        "tiles": list(_tiles(record, solution)),
        "believed": section,
    }
    write_text(Path(path), render("belief_page.html.j2", values))


def believed(
    solution: Mapping[str, Any], examination: Mapping[str, Any] | None, *, reward_name: str
) -> dict[str, Any] | None:
    """Return the values of the section from JSON-safe records; None without a solution.

    Without an examination the section shows the solver's own verdict and numbers.
    """
    if not solution:
        return None
    seen = examination or {}
    diagnosis, summary = seen.get("diagnosis") or {}, solution.get("diagnostics") or {}
    ess, weighted = summary.get("ess") or {}, bool(seen.get("weighted"))
    beginnings = seen.get("beginnings") or {}
    return {
        "headline": seen.get("headline"),
        "detail": _remarks(summary.get("verdict"), diagnosis.get("verdict"), seen.get("headline"), beginnings),
        "weighted": weighted,
        "refused": seen.get("refused"),
        "ess": ess if ess.get("median") is not None else {},
        "ess_columns": ESS_COLUMNS,
        "num_responses": _responses_text(summary.get("responses_per_prompt") or {}),
        "weight_rows": list(_weight_rows(solution, summary, diagnosis.get("pareto_k") or {})),
        "names": list(solution.get("lam") or {}),
        "estimators": _estimators(solution, diagnosis),
        "judged": _judged(diagnosis.get("judgement")),
        "disagreement": diagnosis.get("disagreement"),
        "stability": [] if weighted else _stability_rows(diagnosis, solution),
        "influence": [
            {**row, "prompt": beginnings.get(row["prompt"], row["prompt"])}
            for row in (diagnosis.get("influence") or [])[:NUM_INFLUENTIAL]
        ],
        "scorers": _scorers(diagnosis.get("scorers") or {}),
        "prediction": _prediction(solution, seen.get("cross_fit"), reward_name),
        "prediction_refused": seen.get("cross_fit_refused"),
        "cross_fit": seen.get("cross_fit") or {},
        "solver": _solver_rows(solution, summary),
        "weights": [] if weighted else list(_weight_panels(seen.get("weights"), summary)),
        "stability_panels": [] if weighted else list(_stability_panels(diagnosis, solution)),
        "duals": list(_dual_panels(seen.get("dual_curves") or {}, solution)),
        "frontiers": list(_frontier_panels(seen.get("frontier") or {}, reward_name, weighted)),
    }


def _remarks(
    verdict: str | None, examined: str | None, headline: Mapping[str, str] | None, beginnings: Mapping[str, str]
) -> str:
    """Return what the examination adds to the verdict of the solver, which the headline already gives."""
    if examined is None or headline is None:
        return verdict or ""
    for prompt, beginning in beginnings.items():
        examined = examined.replace(f"one prompt, {prompt}, ", f"one prompt, “{beginning}”, ")
    return examined.removeprefix(verdict or "").strip() if (verdict or "") in headline["text"] else examined


def _responses_text(counts: Mapping[str, Any]) -> str:
    """'32', or '3 to 128' where prompts differ."""
    if not counts:
        return ""
    low, high = counts["min"], counts["max"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _tiles(solution: Mapping[str, Any], solved: DualSolution) -> Iterator[dict[str, Any]]:
    """Yield λ and margin of each constraint, for a page that stands alone."""
    for name, lam in solution["lam"].items():
        yield {"label": "Multiplier λ", "value": plain(lam), "name": name, "parts": lam_error(solved, name)}
    for name, margin in solution["margin"].items():
        end = "at least" if (solution["lam"][name] or 0.0) < 0 else "at most"  # an equality met from above
        parts = [f"{end} {plain(solution['feasibility']['attainable'].get(name))}"]
        if solution["threshold"][name] is not None:
            parts.append(f"mean at least {plain(solution['threshold'][name])}")
        if added := solution["safety_margin"].get(name):
            parts.append(f"{plain(added)} of it for {percent(solution['confidence'])} confidence")
        yield {"label": "Margin", "value": plain(margin), "name": name, "parts": parts}


def _weight_rows(
    solution: Mapping[str, Any], summary: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the numbers of the weights: (measure, value, how to read it)."""
    typical = (summary.get("responses_per_prompt") or {}).get("median")
    log_k = math.log(typical) if typical else math.nan
    if (kl := (solution.get("predicted") or {}).get("kl")) is not None:
        most = f"at most ln K = {number(log_k)} on this table" if typical else ""
        yield "KL from the reference, nats", plain(kl), most
    if (share := summary.get("kl_over_log_k")) is not None:
        yield "KL / ln K", number(share), "near one the table is exhausted"
    if (spread := summary.get("sd_over_beta")) is not None:
        limit = f"past √(2 ln K) = {number(math.sqrt(2 * log_k))} the weights collapse" if typical else ""
        yield "sd of r + ⟨λ,g⟩ / β", plain(spread), limit
    if (pooled := shapes.get("pooled")) is not None:
        collapsed = (summary["ess"]["median"] or 0.0) < COLLAPSED_ESS
        meaning = "means nothing here: the weights have collapsed" if collapsed else "good up to 0.5, bad above 0.7"
        yield "Pareto k̂, all prompts", number(pooled), meaning
    if (median := shapes.get("median")) is not None:
        heavy = percent(shapes.get("share_above_0.7"))
        yield "Pareto k̂ by prompt, median", number(median), f"90%: {number(shapes['p90'])}; above 0.7 in {heavy}"


def _estimators(solution: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per estimator: λ̂ and its 95% interval by constraint; λ is at least 0."""
    rows = []
    for estimator, lam in (diagnosis.get("lam") or {}).items():
        errors = (diagnosis.get("lam_se") or {}).get(estimator) or {}
        used = solution.get("estimator", "empirical") == estimator
        values = [_with_error(lam[name], errors.get(name)) for name in lam]
        rows.append({"name": estimator, "marks": "used" if used else "", "lam": values})
    return rows


def _judged(judgement: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """One row per constraint: what new prompts can expect with the bias beside the SE, and how well λ is known."""
    rows = []
    for name, delivered in (judgement or {}).get("delivered", {}).items():
        decimals, error = decimals_of(delivered, None), judgement["lam_error"][name] if judgement else None
        rows.append(
            {
                "name": name,
                "mean": number(delivered["mean"], decimals, sign=True),
                "interval": interval_text(delivered, decimals),
                "se": number(delivered["se"], decimals + 1),
                "bias": number(delivered["bias"], decimals + 1),
                "lam_error": MISSING if error is None else percent(error, 1) if error < 1 else "over 100%",
            }
        )
    return rows


def _with_error(value: float | None, error: float | None) -> str:
    text = _lam_text(value, error)
    if value is None or error is None:
        return text
    half = Z_95 * error
    return f"{text} [{_lam_text(max(value - half, 0.0), error)}, {_lam_text(value + half, error)}]"


def _lam_text(value: float | None, error: float | None) -> str:
    """Return λ̂ with the decimals that its standard error deserves, or three digits where there are too many."""
    if value is None:
        return "none"
    if not error or error < 1e-5:
        return plain(value)
    return number(value, decimals_of({"mean": value, "low": value - error, "high": value + error}, None))


def _stability_rows(diagnosis: Mapping[str, Any], solution: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return λ̂ at K/4, K/2 and K by constraint."""
    parts = diagnosis.get("k_stability") or {}
    rows = []
    for name in solution["lam"] if parts else ():
        error = (diagnosis["lam_se"].get("empirical") or {}).get(name)
        rows.append((name, [_lam_text(value[name], error) for value in parts.values()]))
    return rows


def _scorers(scorers: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for key, label in SCORER_ROWS:
        show = percent if key == "tied" else plain
        values = [show(scorer[key]) for scorer in scorers.values()]
        rows.append((label, [MISSING, *values[1:]] if key == "correlation" else values))  # the reward with itself
    return {"names": list(scorers), "rows": rows if scorers else []}


def _prediction(
    solution: Mapping[str, Any], crossed: Mapping[str, Any] | None, reward_name: str
) -> list[dict[str, str]]:
    """Return a row per predicted quantity: its margin, in sample and cross-fitted."""
    inside = solution.get("predicted")
    if not inside or not crossed:
        return []
    improvement = inside.get("improvement") or {}
    rows = [
        (name, "improvement", solution["margin"][name], improvement[name]["mean"], crossed["improvement"][name])
        for name in crossed["improvement"]
    ]
    rows.append((reward_name, "reward", None, inside.get("reward_improvement"), crossed["reward_improvement"]))
    rows.append(("KL", "from the reference, nats", None, inside.get("kl"), crossed["kl"]))
    table = []
    for name, kind, margin, within, across in rows:
        decimals, sign = decimals_of(across, None), name != "KL"
        table.append(
            {
                "name": name,
                "kind": kind,
                "margin": "" if margin is None else number(margin, decimals),
                "within": number(within, decimals, sign=sign),
                "across": number(across["mean"], decimals, sign=sign),
                "interval": interval_text(across, decimals),
            }
        )
    return table


def _solver_rows(solution: Mapping[str, Any], diagnostics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the solver's numbers as (name, value) in reading order, without the absent ones."""
    predicted, feasibility = solution.get("predicted") or {}, solution.get("feasibility") or {}
    rows = [
        ("status", solution.get("status")),
        ("estimator", solution.get("estimator")),
        ("dual value", solution.get("value")),
        ("KKT residual", solution.get("kkt_residual")),
        ("slack", solution.get("slack")),
        ("centre (reference mean)", solution.get("centre")),
        ("predicted reward", predicted.get("reward")),
        ("joint attainable slack t*", feasibility.get("t_star")),
        ("most attainable, each alone", feasibility.get("attainable")),
        ("certificate weights", feasibility.get("certificate")),
    ]
    rows += [(key.replace("_", " "), value) for key, value in diagnostics.items() if key not in SHOWN_ELSEWHERE]
    return [(name, plain(value)) for name, value in rows if value is not None and value != {} and value != []]


def _weight_panels(weights: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not weights:
        return
    median = summary["ess"]["median"]
    label = f"Effective responses of a prompt: median {plain(median)}"
    svg = figures.ess_svg(weights["ess_edges"], weights["ess_count"], median, TRUSTED_ESS, label=label, prefix="ess")
    yield panel("Effective sample size", svg)
    alone = percent(weights["share_one_response"])
    note = f"One response carries more than half of the weight in {alone} of the prompts."
    svg = figures.largest_weight_svg(weights["largest_weight"], weights["even_weight"], label=note, prefix="largest")
    yield panel("Largest weight", svg, note)


def _stability_panels(diagnosis: Mapping[str, Any], solution: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    parts, used = diagnosis.get("k_stability") or {}, solution.get("estimator", "empirical")
    for index, name in enumerate(solution["lam"] if parts else ()):
        errors = {estimator: row.get(name) for estimator, row in diagnosis["lam_se"].items()}
        estimates = {"empirical, K": parts["K"][name]} | {
            estimator: row[name] for estimator, row in diagnosis["lam"].items() if estimator != "empirical"
        }
        drawn = []
        for text, value in ({"K/4": parts["K/4"][name], "K/2": parts["K/2"][name]} | estimates).items():
            estimator = text if text in errors else "empirical"
            half = Z_95 * (errors[estimator] or math.nan)
            shown = _lam_text(value, errors[estimator])
            is_used = estimator == used and not text.startswith("K/")
            drawn.append(figures.Estimated(f"{text}: {shown}", math.nan if value is None else value, half, is_used,
                                   text.startswith("K/")))  # fmt: skip
        label = f"Multiplier of {name}: " + ", ".join(row.text for row in drawn)
        svg = figures.stability_svg(drawn, label=label, prefix=f"stable{index}")
        yield panel(f"λ̂ of {name}", svg)


def _dual_panels(curves: Mapping[str, Any], solution: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for index, (name, curve) in enumerate(curves.items()):
        if not curve or solution["lam"].get(name) is None:
            continue
        lam, margin = solution["lam"][name], solution["margin"][name]
        error = (solution.get("lam_se") or {}).get(name)
        half = math.nan if error is None else Z_95 * error
        low = max(lam - half, 0.0) if lam - half < 0.0 < lam else lam - half
        interval = (lam, low, lam + half)
        grid, value = np.array(curve["lam"]), np.array(curve["value"])
        texts = _margin_texts(curve["margins"])
        drawn = [
            figures.Curve(value - grid * (other - margin), least, "b = " * (other == margin) + text, other == margin)
            for other, least, text in zip(curve["margins"], curve["minima"], texts, strict=True)
        ]
        text = f"λ̂ = {plain(lam)}"
        label = f"Dual value against the multiplier of {name}, {text}" + (
            "" if math.isnan(half) else f" [{plain(interval[1])}, {plain(interval[2])}]"
        )
        svg = figures.dual_svg(grid, drawn, interval, text, label=label, prefix=f"dual{index}")
        yield panel(f"Dual along the λ of {name}", svg, _beside_the_dual(solution, name))


def _beside_the_dual(solution: Mapping[str, Any], name: str) -> str:
    """Say why λ̂ does not lie where the curve is least: the curve is the paper's dual, whatever estimator gave λ̂."""
    estimator, paper = solution.get("estimator", "empirical"), (solution.get("lam_paper") or {}).get(name)
    if estimator == "empirical" or paper is None:
        return ""
    why = {
        "jackknife": "they differ by the bias of few responses, which the jackknife removes",
        "gaussian": "they differ because it takes the scores to be Gaussian within a prompt",
    }[estimator]
    return (
        f"Drawn is the paper’s dual, which is least at λ = {plain(paper)}; λ̂ = {plain(solution['lam'][name])} is the "
        f"{estimator} estimator’s, and {why}."
    )


def _margin_texts(margins: Sequence[float]) -> list[str]:
    """Return margins that are a step apart, with the decimals that tell them apart."""
    step = min(np.diff(margins), default=abs(margins[0]) or 1.0)
    decimals = min(max(1 - math.floor(math.log10(step)), 0), 8)
    while decimals > 0 and all(
        math.isclose(round(margin, decimals - 1), margin, abs_tol=step / 100) for margin in margins
    ):
        decimals -= 1
    return [number(margin, decimals) for margin in margins]


def _frontier_panels(frontiers: Mapping[str, Any], reward_name: str, weighted: bool) -> Iterator[dict[str, Any]]:
    for index, (name, curve) in enumerate(frontiers.items()):
        if not curve:
            continue
        margin = np.array(curve["margin"])
        supported = (np.array(curve["ess"], dtype=float) >= TRUSTED_ESS) | weighted  # null becomes NaN
        target, most = (curve["asked"], plain(curve["asked"])), (curve["attainable"], plain(curve["attainable"]))
        for key, quantity, title in (
            ("reward_improvement", "reward gain", f"{reward_name} against the margin of {name}"),
            ("kl", "KL, nats", f"KL against the margin of {name}"),
        ):
            band = np.array([curve[key + end] for end in ("", "_low", "_high")], dtype=float)
            label = f"{title}: asked {target[1]}, attainable at most {most[1]}"
            svg = figures.frontier_svg(
                margin, band, supported, target, most, quantity, label=label, prefix=f"frontier{index}{key[:2]}"
            )
            yield panel(title, svg)
