"""Write the README's measured results from ``results/every_margin.json``: ``python benchmarks/readme_table.py``.

One row per margin, every seed of it: what was measured last is what is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from real_runs import RESULTS, read_rows

from can_dist.measuring.verdicts import current

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- measured: written by benchmarks/readme_table.py -->", "<!-- measured: end -->"
WAY, MARGINS = "basis", (0.25, 0.5, 0.75, 1.0)
HEADER = (
    "| margin asked | safety gained, by seed | reward, by seed | KL (predicted) | verdict, by seed |",
    "|---|---|---|---|---|",
)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    lines = list(HEADER)
    shown = sorted((row for row in rows if row["way"] == WAY), key=lambda row: row["seed"])
    for margin in MARGINS:
        cells = [row for row in shown if row["margin"] == margin]
        safety = ", ".join(f"{row['constraints']['safety']['mean']:+.2f}" for row in cells)
        reward = ", ".join(f"{row['reward']['mean']:+.2f}" for row in cells)
        kl = ", ".join(f"{row['kl']['mean']:.2f}" for row in cells)
        predicted = sum(row["kl"]["predicted"] for row in cells) / len(cells)
        verdicts = ", ".join(current(row["constraints"]["safety"]["verdict"]) for row in cells)
        lines.append(f"| {margin:+.2f} | {safety} | {reward} | {kl} ({predicted:.2f}) | {verdicts} |")
    return lines


def written(text: str, lines: list[str]) -> str:
    """Return the README with the table between its marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(written(text, table(read_rows(RESULTS / "every_margin.json"))), encoding="utf-8")
