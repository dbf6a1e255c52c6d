"""Known vulnerabilities of the pinned packages, by pip-audit. ``make audit``.

Exit codes: 0 every pin was looked up and none has a known vulnerability; 1 some have; 2 it could not look, at all or at
some of them. pip-audit itself calls a package that its database does not have clean.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pins import ROOT, read_pins

CLEAN, VULNERABLE, COULD_NOT_LOOK = 0, 1, 2


def verdict(entries: Sequence[Mapping[str, Any]], expected: Sequence[str]) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print, of pip-audit's entries and the names that should be among them."""
    looked_up = {entry["name"] for entry in entries if "skip_reason" not in entry}
    unseen = [name for name in expected if name not in looked_up]
    lines = [
        f"{entry['name']} {entry['version']}: {', '.join([known['id'], *known['aliases']])}; "
        f"mended in {', '.join(known['fix_versions']) or 'no release'}"
        for entry in entries
        for known in entry.get("vulns", [])
    ]
    if unseen:
        lines.append(f"could not look at {len(unseen)} of {len(expected)} packages: {', '.join(unseen[:5])}")
    code = VULNERABLE if any(entry.get("vulns") for entry in entries) else COULD_NOT_LOOK if unseen else CLEAN
    return code, lines or [f"no known vulnerability in {len(expected)} packages"]


def main() -> None:
    """Ask pip-audit, print what it knows, and end with the verdict's exit code."""
    expected = [pin.name for pin in read_pins() if pin.is_for_this_python]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "audit.json"
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
        command += ["--requirement", str(ROOT / "constraints-hashes.txt"), "--format", "json", "--output", str(answer)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        entries = json.loads(answer.read_text(encoding="utf-8"))["dependencies"] if answer.is_file() else None
    if entries is None:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"could not look: pip-audit ended with exit code {done.returncode}: {said}", file=sys.stderr)
        sys.exit(COULD_NOT_LOOK)
    code, lines = verdict(entries, expected)
    print("\n".join(lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
