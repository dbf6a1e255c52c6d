"""``can-dist demo``: a small world made on the spot, and a real run of every stage on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from textwrap import fill
from typing import Any

from can_dist.config import load_config
from can_dist.console import tell
from can_dist.dual.belief.level import stated
from can_dist.measuring.verdicts import verdict_text
from can_dist.tables.artifacts import Artifact, write_text
from can_dist.workspace import PAGE, REPORT

MAKING = "making a small world: a corpus, a language model, a reward head, a safety head"


def run_demo(run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Make the world (once per run directory), run MoCAN on it, and print predicted beside realised."""
    world = run_dir / "world"
    if not (world / "world.json").is_file():
        from can_dist.demo.world import build_demo_world

        tell(MAKING)
        shutil.rmtree(world, ignore_errors=True)  # half a world from an interrupted start
        build_demo_world(world)
    path = run_dir / "demo.yaml"
    template = files("can_dist.demo").joinpath("demo.yaml").read_text("utf-8")
    write_text(path, template.format(world=world, path=path, run=run_dir))
    config = load_config(path, overrides)
    from can_dist.pipeline import run_pipeline

    artifact = run_pipeline(run_dir, config)
    print(summary(artifact), flush=True)


def summary(artifact: Artifact) -> str:
    """Return the report's key numbers and the page's path as a few lines."""
    return "\n".join([*summary_lines(artifact.read_json(REPORT)), f"report: {artifact.path.parent / PAGE}"])


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the key numbers of a report: predicted beside realised, the price, whether to believe it."""
    rows = [("", "margin", "predicted", "realised (95 % interval)", "")]
    for entry in [*report["constraints"], report["reward"]]:
        predicted, realised = entry["predicted"], entry["realised"]
        rows.append(
            (
                entry["name"],
                f"{entry['margin']:+.2f}" if "margin" in entry else "",
                f"{predicted['mean']:+.2f}",
                f"{realised['mean']:+.2f} [{realised['low']:+.2f}, {realised['high']:+.2f}]",
                verdict_text(entry) if "verdict" in entry else "reported, not constrained",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    kl, lam = report["kl"]["realised"], report["solution"]["lam"]
    price = ", ".join(f"{name} {value:.3f}" for name, value in lam.items())
    lines.append(f"λ* = {price} at β = {report['beta']}; KL(policy‖reference) {kl['mean']:.2f} nats per response")
    return [*lines, *fill(stated(report["solution"]["diagnostics"]), 80).splitlines()]
