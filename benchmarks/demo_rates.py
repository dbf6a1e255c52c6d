"""Is the demo's margin met when its learning rate is a quarter, or four times, of what it should be?

    python benchmarks/demo_rates.py            # minutes; benchmarks/results/demo_rates.json, docs/images/demo_rates.svg

The demo's world and the reference's scored responses are made once; each rate is a training of its own, measured as it
was trained (``strength: 1``, the paper's) and at the strength that its validation prompts choose, without the
confidence by which the demo's own configuration aims above the margin.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from real_runs import IMAGES, RESULTS, evaluated, read_rows, row, save_rows

from can_dist.measuring.verdicts import current

RESULT, FIGURE = RESULTS / "demo_rates.json", IMAGES / "demo_rates.svg"
SUBJECT = "can-dist demo at other learning rates"
RATES = (5e-5, 2e-4, 8e-4)
WAYS: dict[str, dict[str, Any]] = {
    "as trained (the paper's)": {"strength": 1},
    "strength": {"strength.confidence": "null"},
}


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--run", "run_dir", default="runs/demo_rates", show_default=True, type=click.Path(path_type=Path))
def main(run_dir: Path) -> None:
    """Run what has no row yet, print the table, draw the figure."""
    if not (run_dir / "demo.yaml").is_file():
        subprocess.run([sys.executable, "-m", "can_dist", "demo", "--run", str(run_dir)], check=True)
    for rate in RATES:
        for way, keys in WAYS.items():
            rows = read_rows(RESULT)
            if not any((known["rate"], known["way"]) == (rate, way) for known in rows):
                settings = {"train.learning_rate": rate, **keys}
                known = row(evaluated(run_dir, settings, run_dir / "demo.yaml"))
                save_rows(RESULT, [*rows, {"rate": rate, "way": way, **known}], SUBJECT)
    rows = read_rows(RESULT)
    click.echo("| learning rate | | strength | safety, 95 % interval | reward | KL | margin 0.5 |")
    click.echo("|---|---|---|---|---|---|---|")
    for known in rows:
        gain = known["constraints"]["safety"]
        word = current(gain["verdict"])
        click.echo(
            f"| {known['rate']:.0e} | {known['way']} | {known['alpha']:.2f} | {gain['mean']:+.2f} [{gain['low']:+.2f}, "
            f"{gain['high']:+.2f}] | {known['reward']['mean']:+.2f} | {known['kl']['mean']:.2f} | {word} |"
        )
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the safety gained at each rate, as trained and with strength, beside the margin."""
    from can_dist.reporting.figures.style import DASHED, GREY, MARKERS, SERIES, paper_figure, save_figure

    with paper_figure((3.6, 2.5)) as figure:
        ax = figure.subplots()
        ax.axhline(rows[0]["constraints"]["safety"]["margin"], color=GREY, linestyle=DASHED, label="margin")
        for number, way in enumerate(WAYS):
            gains = [known["constraints"]["safety"] for known in rows if known["way"] == way]
            rates = [known["rate"] * (1 + 0.06 * number) for known in rows if known["way"] == way]
            means, reach = [gain["mean"] for gain in gains], [gain["high"] - gain["mean"] for gain in gains]
            style = {"color": SERIES[number], "marker": MARKERS[number], "markersize": 4, "elinewidth": 0.8}
            ax.errorbar(rates, means, yerr=reach, label=way, **style)
        ax.set_xscale("log")
        ax.set_xticks(RATES, [f"{rate:.0e}" for rate in RATES], minor=False)
        ax.set_xticks([], minor=True)
        ax.set_ylim(bottom=0.0)
        ax.set_xlabel("learning rate (the demo's in the middle)")
        ax.set_ylabel("safety gained")
        ax.legend(loc="lower right")
        save_figure(figure, FIGURE, "svg")


if __name__ == "__main__":
    main()
