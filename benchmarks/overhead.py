"""What a run costs above its arithmetic: CPU seconds of ``can-dist run``, and of one plain process that does the same.

    python benchmarks/overhead.py run demo             # minutes; both sides, twice
    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/overhead.py run recipe           # half an hour; recipe-two-ranks: the same with two ranks
    python benchmarks/overhead.py show

Ours is the whole tree of processes, Ray's included, by kind. The plain process (``plain_run.py``) calls the library's
sampler, scorers, dual, labels, losses and estimates, each model loaded once; it has no Ray, no DeepSpeed, no artifacts,
no report and nothing that watches a training. Its own start and imports are counted. λ* must be equal to six digits:
texts in other packs have other last bits of scores. Gains may differ by what such a bit changes in a sampled token.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from machine import machine
from real_runs import RECIPE, RESULTS, commit, read_rows
from tree_cpu import metered

from can_dist.config import dump_yaml, load_config
from can_dist.tables.artifacts import Artifact, load_artifact

RESULT = RESULTS / "overhead.json"
TARGETS = {"demo": 1.6, "recipe": 1.15, "recipe-two-ranks": 1.15}
CLOSE = 0.03
"""Largest difference of two gains; a standard error of the demo's is 0.03."""


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.argument("work", type=click.Choice(list(TARGETS)))
@click.option("--rounds", default=2, show_default=True)
def run(work: str, rounds: int) -> None:
    """Run both sides in turn; each run is a new one, of the same world."""
    with tempfile.TemporaryDirectory(prefix="can-dist-overhead-") as folder:
        config = demo(Path(folder)) if work == "demo" else recipe(Path(folder), 2 if work == "recipe-two-ranks" else 1)
        for number in range(rounds):
            save([*read_rows(RESULT), {"work": work, **both(config, Path(folder) / f"run{number}")}])


def demo(folder: Path) -> Path:
    """Make the demo's world; return its configuration."""
    from can_dist.demo.world import build_demo_world

    build_demo_world(folder / "world")
    path = folder / "demo.yaml"
    template = files("can_dist.demo").joinpath("demo.yaml").read_text("utf-8")
    path.write_text(template.format(world=folder / "world", path=path, run=folder), encoding="utf-8")
    return path


def recipe(folder: Path, num_workers: int) -> Path:
    """Write the recipe's configuration for one policy, which the plain process trains."""
    path = folder / "recipe.yaml"
    config = load_config(RECIPE, ["basis=false", f"cluster.num_workers={num_workers}"])
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


def both(config: Path, run_dir: Path) -> dict[str, Any]:
    """Return the CPU seconds of both sides, by kind, and what both say.

    Raises:
        SystemExit: They do not say the same.
    """
    printed, ours = metered([sys.executable, "-m", "can_dist", "run", str(config), "--run", str(run_dir)])
    said = said_by(load_artifact(Path(printed.split()[-1])))
    printed, plain = metered([sys.executable, str(Path(__file__).with_name("plain_run.py")), str(config), str(run_dir)])
    same = json.loads(printed.splitlines()[-1])
    lams = [abs(said["lam"][name] - lam) <= 1e-6 * max(1.0, lam) for name, lam in same["lam"].items()]
    gains = [abs(said["gains"][name] - gain) <= CLOSE for name, gain in same["gains"].items()]
    if not all([*lams, *gains]):
        raise SystemExit(f"void: the sides differ\n  ours  {said}\n  plain {same}")
    return {"ours": ours, "plain": sum(plain.values()), "said": [said, same], "commit": commit(), "machine": machine()}


def said_by(evaluation: Artifact) -> dict[str, Any]:
    """Return λ*, the strength and the gains of a run."""
    report = evaluation.read_json("report.json")
    rows = [report["reward"], *report["constraints"]]
    return {
        "lam": report["solution"]["lam"],
        "alpha": ((report["estimate"] or {}).get("strength") or {}).get("alpha", 1.0),
        "gains": {row["name"]: row["realised"]["mean"] for row in rows},
        "kl": report["kl"]["realised"]["mean"],
    }


def save(rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON."""
    RESULT.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


@main.command()
def show() -> None:
    """Print the table: medians of the rounds of each commit."""
    kinds = ("driver", "actors", "ranks", "Ray")
    click.echo(f"| work | commit | {' | '.join(kinds)} | ours | plain | ratio | wanted |\n|{'---|' * 9}")
    rows = read_rows(RESULT)
    for work, code in dict.fromkeys((row["work"], row["commit"]) for row in rows):
        same = [row for row in rows if (row["work"], row["commit"]) == (work, code)]
        ours = {kind: statistics.median(row["ours"].get(kind, 0.0) for row in same) for kind in kinds}
        total = statistics.median(sum(row["ours"].values()) for row in same)
        plain = statistics.median(row["plain"] for row in same)
        cells = " | ".join(f"{seconds:.0f}" for seconds in ours.values())
        ratio = statistics.median(sum(row["ours"].values()) / row["plain"] for row in same)
        click.echo(f"| {work} | {code} | {cells} | {total:.0f} | {plain:.0f} | {ratio:.2f} | {TARGETS[work]} |")


if __name__ == "__main__":
    main()
