"""The report's section on the estimate: what validation responses say of the policy, and of every other strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from can_dist.reporting.figures.ray import columns_of, ray_svg
from can_dist.reporting.page import decimals_of, interval_text, number, plain, safe_svg

QUANTITIES = (("reward_improvement", "reward gain"), ("kl", "KL (nats)"))


def estimated(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the template shows of ``report["estimate"]``; None where there is none."""
    record = report.get("estimate")
    if not record:
        return None
    policy, strength = record["policy"], record["strength"]
    return {
        "verdict": record["verdict"],
        "sentence": policy["sentence"],
        "num_prompts": policy["num_prompts"],
        "num_responses": policy["num_responses"],
        "alpha": plain(round(strength["alpha"], 3)) if strength else "",
        "mixture": _mixed(record.get("mixture")),
        "limiting": strength["limiting"] if strength else None,
        "notes": strength["notes"] if strength else [],
        "rows": list(_rows(report, policy)),
        "panels": list(_panels(report, record)),
    }


def _mixed(mixture: Mapping[str, Any] | None) -> str:
    """Return the weights of the policies of a mixture, and how well mixing held, as text; '' for a single training."""
    if not mixture:
        return ""
    weights = ", ".join(f"{number(weight, 2)} of {name}" for name, weight in mixture["coefficient"].items())
    return f"{weights} (mixed weights and mixed log-ratios correlate by {mixture['correlation']:.4f})"


def _rows(report: Mapping[str, Any], policy: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield each quantity as estimated, beside what the dual predicted and what was realised."""
    for row in report["constraints"]:
        if row["name"] in policy["improvement"]:
            gain = policy["improvement"][row["name"]]
            yield _row(row["name"], gain, row.get("predicted"), row["realised"], margin=row["margin"])
    reward = report["reward"]
    yield _row(reward["name"], policy["reward_improvement"], reward.get("predicted"), reward["realised"])
    kl = report["kl"]
    yield _row("KL (nats)", policy["kl"], kl.get("predicted_interval"), kl["realised"], sign=False)
    for name in ("length", "direction"):
        if policy[name]["mean"] is not None:
            yield _row(name, policy[name], None, None, sign=False)


def _row(
    name: str,
    estimate: Mapping[str, Any],
    predicted: Mapping[str, Any] | None,
    realised: Mapping[str, Any] | None,
    *,
    margin: float | None = None,
    sign: bool = True,
) -> dict[str, str]:
    decimals = decimals_of(estimate, margin)

    def text(value: Mapping[str, Any] | None) -> str:
        return "" if not value else f"{number(value['mean'], decimals, sign=sign)} {interval_text(value, decimals)}"

    demand = "" if margin is None else number(margin, decimals)
    values = {"estimated": text(estimate), "predicted": text(predicted), "realised": text(realised)}
    return {"name": name, "asked": demand, **values}


def _panels(report: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Draw reward and KL against the gain of each constraint, along the ray and along the frontier."""
    ray, policy = record["ray"], record["policy"]
    curves = (report.get("examination") or {}).get("frontier") or {}
    rows = [row for row in report["constraints"] if row["name"] in ray["improvement"]]
    for index, row in enumerate(rows):
        name, curve = row["name"], curves.get(row["name"])
        for quantity, axis in QUANTITIES:
            realised = report["kl"]["realised"] if quantity == "kl" else report["reward"]["realised"]
            marks = {
                "estimated": (policy["improvement"][name]["mean"], policy[quantity]["mean"]),
                "realised": (row["realised"]["mean"], realised["mean"]),
            }
            svg = ray_svg(
                columns_of(ray, name, quantity),
                curve and {"margin": curve["margin"], "mean": curve[quantity]},
                quantity=axis,
                marks=marks,
                margin=row["margin"],
                label=f"{axis} against the improvement of {name}, for every strength of this training",
                prefix=f"ray{index}-{quantity}",
            )
            yield {"name": f"{axis} against {name}", "svg": safe_svg(svg), "note": ""}
