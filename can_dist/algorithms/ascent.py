"""The step of dual ascent that C-DPO and CAID share: λ ← [λ − η·slack]_+."""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.stages.trajectory import Round


def next_lam(last: Round, step_size: Mapping[str, float]) -> dict[str, float]:
    """Return [λ − η·slack]_+, one η per constraint; an equality's λ may have either sign."""
    lam = {name: last.lam[name] - step_size[name] * row["slack"] for name, row in last.constraints.items()}
    return {name: value if last.constraints[name]["equal"] else max(0.0, value) for name, value in lam.items()}


def settled(last: Round, tolerance: float, standard_errors: float) -> bool:
    """Return whether every slack is zero within the tolerance or its error, or positive where λ is zero already."""
    return all(
        abs(row["slack"]) <= max(tolerance, standard_errors * row["se"])
        or (row["slack"] > 0 and last.lam[name] == 0 and not row["equal"])
        for name, row in last.constraints.items()
    )
