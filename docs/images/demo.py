"""Draw the README's picture from a demo's run, and write its summary there: ``python docs/images/demo.py runs/demo``.

The same run gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from can_dist.demo.run import summary_lines
from can_dist.reporting.figures.style import BLUE, DASHED, DOTTED, GREY, ORANGE, paper_figure, save_figure

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- demo: written by docs/images/demo.py -->", "<!-- demo: end -->"
NUM_BINS, NUM_LINES = 28, 4


def last_report(run: Path) -> dict[str, Any]:
    """Return the newest evaluation's record."""
    paths = sorted(run.glob("evaluate-*/report.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise SystemExit(f"{run}: holds no evaluation. Run 'make demo' first.")
    record: dict[str, Any] = json.loads(paths[-1].read_text(encoding="utf-8"))
    return record


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw each score of the held-out responses before and after, with its means, predicted and realised."""
    rows = [*report["constraints"], report["reward"]]
    with paper_figure((7.4, 3.2)) as figure:
        for ax, row in zip(figure.subplots(1, len(rows)), rows, strict=True):
            before, after = (np.array(report["scores"][row["name"]][side]) for side in ("reference", "policy"))
            bins = np.linspace(min(before.min(), after.min()), max(before.max(), after.max()), NUM_BINS)
            for values, colour, name in ((before, BLUE, "before"), (after, ORANGE, "after")):
                weights = np.full(values.size, 1 / values.size)
                ax.hist(values, bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
            centre, top = before.mean(), ax.get_ylim()[1]
            ax.axvline(centre, color=BLUE, linestyle=DOTTED, linewidth=1)
            if "margin" in row:
                asked = centre + row["margin"]
                ax.axvline(asked, color=GREY, linestyle=DASHED, linewidth=1.2, label=f"margin {row['margin']:+.2f}")
            for level, key, marker, colour in ((1.06, "predicted", "D", GREY), (1.14, "realised", "o", ORANGE)):
                value = row[key]
                arms = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
                name = f"{key} {value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
                ax.errorbar([centre + value["mean"]], [level * top], xerr=arms, fmt=marker, color=colour, markersize=5,
                            capsize=3, label=name)  # fmt: skip
            ax.set_ylim(0, 1.25 * top)
            ax.set_xlabel(f"{row['name']} of a response to a held-out prompt")
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        figure.axes[0].set_ylabel("share of the responses")
        save_figure(figure, path, "svg")


def written(text: str, lines: list[str]) -> str:
    """Return the README with the summary between its marks."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n```text\n" + "\n".join(lines) + f"\n```\n{END}{tail}"


def main(run: Path) -> None:
    """Draw, and write."""
    report = last_report(run)
    draw(report, HERE / "demo.svg")
    text = README.read_text(encoding="utf-8")
    *lines, believed = "\n".join(summary_lines(report)).split("\n", NUM_LINES)
    README.write_text(written(text, [*lines, f"{believed.split('. ')[0]}. ..."]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
