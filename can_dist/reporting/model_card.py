"""A policy's model card: method, λ*, margins, data and evaluation, in the form that the hub reads."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from can_dist.dual.belief.level import stated
from can_dist.measuring.gains import joint_sentence
from can_dist.measuring.verdicts import verdict_text

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"


def model_card(
    facts: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    *,
    adapter: bool,
    certificate: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as Markdown with the hub's metadata on top.

    Args:
        facts: ``title, method`` and ``base`` (empty where not known), ``is_hub_model``, ``beta``, ``lam`` (by
            constraint, or None), ``made_from`` (pairs of text) and, of a policy that nobody measured, ``expected``.
        report: ``report.json`` of the policy's evaluation; None says that there was none.
        adapter: whether the directory holds adapters only.
        certificate: ``certificate.json`` of the policy; None where there is none, of which nothing is said.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=facts["base"] if facts["is_hub_model"] else None,
        tags=["can-dist", "safety-alignment", *filter(None, [facts["method"].lower()])],
    )
    shown = {
        "rows": [],
        "joint": "",
        "reward": {},
        "kl": "",
        "num_test_prompts": 0,
        "warnings": [],
        "unpredicted": None,
        "believed": "",
        "expected": "",
        "certificate": [_plain(sentence) for sentence in certificate["sentences"]] if certificate else [],
    }
    lam = facts["lam"] and ", ".join(f"{name} {value:.4g}" for name, value in facts["lam"].items())
    made_from = [(_plain(name), _plain(value)) for name, value in facts["made_from"]]
    named = {name: _plain(facts[name]) for name in ("title", "base", "expected") if name in facts}
    values = {**shown, **facts, **named, "lam": lam, "made_from": made_from, **(_evaluated(report) if report else {})}
    card = ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), adapter=adapter, **values)
    return str(card)


def _evaluated(report: Mapping[str, Any]) -> dict[str, Any]:
    reward = report["reward"]
    return {
        "rows": [_constraint(row) for row in report["constraints"]],
        "joint": joint_sentence(report["constraints"]),
        "reward": {
            "name": _plain(reward.get("name", "reward")),
            "predicted": _predicted(reward),
            "realised": _interval(reward["realised"]),
        },
        "kl": f"{report['kl']['realised']['mean']:.3g}",
        "num_test_prompts": report["num_test_prompts"],
        "warnings": [_plain(warning) for warning in report["warnings"]],
        "unpredicted": report["unpredicted"] and _plain(report["unpredicted"]),
        "believed": _plain(stated(report["solution"]["diagnostics"])) if report.get("solution") else "",
    }


def _constraint(row: Mapping[str, Any]) -> dict[str, str]:
    margin, realised = f"{row['margin']:+.4g}", _interval(row["realised"])
    if row.get("threshold") is not None:  # it is met, or not, by the policy's own mean
        margin += f" (mean at least {row['threshold']:.4g})"
        realised += f"; mean {_interval(row['policy_mean'])}"
    lam = "" if row.get("lam") is None else f"{row['lam']:.4g}"
    if beside := row.get("lam_beside"):
        lam += f" ({', '.join(beside)})"
    name = f"{row['name']}, mean of {row['utility']}" if row.get("utility") else row["name"]
    cells = {"name": _plain(name), "margin": margin, "lam": lam, "predicted": _predicted(row)}
    return {**cells, "realised": realised, "verdict": verdict_text(row)}


def _predicted(row: Mapping[str, Any]) -> str:
    predicted = row.get("predicted") or {}
    return f"{predicted['mean']:+.3g}" if predicted.get("mean") is not None else "none"


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:+.3g} [{interval['low']:+.3g}, {interval['high']:+.3g}]"


def _plain(text: Any) -> str:
    """Return text as Markdown that shows it: a name of a model is no tag, link, image, code or end of a cell."""
    line = html.escape(" ".join(str(text).splitlines()), quote=False).replace("`", "'")
    return re.sub(r"([\\\[\]|])", r"\\\1", line)
