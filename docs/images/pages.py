"""Photograph a run's two pages for the docs: ``python docs/images/pages.py runs/demo``. It needs Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from can_dist.workspace import BELIEF, PAGE

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1280, 1000  # of the window: the top of each page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(page: Path, picture: Path) -> None:
    """Write a picture of the top of a page, on a light background."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += [f"--window-size={WIDTH},{HEIGHT}", "--blink-settings=preferredColorScheme=1"]
        options += ["--virtual-time-budget=4000", f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run([browser, *options], check=True, capture_output=True)


def main(run: Path) -> None:
    """Photograph both."""
    photograph(run / BELIEF, HERE / "belief.png")
    photograph(run / PAGE, HERE / "report.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
