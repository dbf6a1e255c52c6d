"""The check list of a release, one line a check; when all hold, the commands that publish it. Publishes nothing itself.

    make release

What takes seconds is checked first, and what takes minutes only if that holds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VERSION = re.compile(r'^version = "([^"]+)"$', re.MULTILINE)


class Failed(Exception):
    """A check that does not hold, with what to do."""


def call(*command: str, **variables: str) -> None:
    """Run a command of the check list, its output on this terminal."""
    print(f"      {' '.join(command)}", flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if code:
        raise Failed(f"`{' '.join(command)}` ended with {code}")


def git(*arguments: str) -> str:
    """Return what git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def version() -> str:
    """Return the version of the project, which pyproject.toml alone holds."""
    versions = VERSION.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if len(versions) != 1:
        raise Failed(f"pyproject.toml: expected one line 'version = \"...\"', it has {len(versions)}")
    return str(versions[0])


def tree_is_clean() -> None:
    """Nothing is changed or unknown to git, so that the tag is what was checked."""
    if changes := git("status", "--porcelain"):
        raise Failed("commit or remove:\n" + "\n".join(f"        {line}" for line in changes.splitlines()))


def version_is_new() -> None:
    """No tag has the version yet."""
    if git("tag", "--list", f"v{version()}"):
        raise Failed(f"the tag v{version()} is there already; raise the version in pyproject.toml")


def changelog_has_the_version() -> None:
    """The newest heading of the changelog is the version with its day."""
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    newest = headings[0] if headings else "none"
    if not re.fullmatch(rf"{re.escape(version())} \(\d{{4}}-\d\d-\d\d\)", newest):
        raise Failed(f"CHANGELOG.md: expected '## {version()} (YEAR-MONTH-DAY)' first, it has {newest!r}")


def lint() -> None:
    """Lint and types."""
    call("make", "lint")


def tests() -> None:
    """The test command of the README."""
    call("make", "test")


def build() -> None:
    """The source distribution, and the wheel made from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--outdir", str(DIST))
    expected = [f"can_dist-{version()}-py3-none-any.whl", f"can_dist-{version()}.tar.gz"]
    built = sorted(path.name for path in DIST.iterdir())
    if built != expected:
        raise Failed(f"dist/ holds {', '.join(built)}; expected {', '.join(expected)}")


def metadata() -> None:
    """What an index would refuse."""
    if importlib.util.find_spec("twine") is None:
        print("      not checked: twine is not installed")
        return
    call(sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))


def wheel() -> None:
    """The very wheel, installed, works in an empty directory outside the repository."""
    [path] = DIST.glob("*.whl")
    call(sys.executable, "-m", "pytest", "-q", "tests/integration/test_wheel.py", CAN_DIST_WHEEL=str(path))


QUICK: dict[str, Callable[[], None]] = {
    "the tree is clean": tree_is_clean,
    "the version is new": version_is_new,
    "the changelog has the version": changelog_has_the_version,
}
SLOW: dict[str, Callable[[], None]] = {
    "lint and types": lint,
    "tests": tests,
    "sdist and wheel": build,
    "metadata": metadata,
    "the installed wheel": wheel,
    "the tree is still clean": tree_is_clean,
}


def holds(name: str, check: Callable[[], None]) -> bool:
    """Make a check and print its line."""
    try:
        check()
    except Failed as problem:
        print(f"FAIL  {name}: {problem}", flush=True)
        return False
    print(f"ok    {name}", flush=True)
    return True


def main() -> None:
    """Go through the check list; exit 1 at what does not hold."""
    if not all([holds(name, check) for name, check in QUICK.items()]):  # every quick one is told
        sys.exit(1)
    if not all(holds(name, check) for name, check in SLOW.items()):
        sys.exit(1)
    tag = f"v{version()}"
    print(f"All checks hold. Publish by hand:\n  git tag -a {tag} -m 'CAN-Dist {version()}' && git push origin {tag}")
    print("  python -m twine upload dist/*")


if __name__ == "__main__":
    main()
