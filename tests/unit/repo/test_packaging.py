"""The wheel's mapping, the one version, the image and the check list of a release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import context_files, read_dockerfile
from packaging.requirements import Requirement
from pins import read_pins
from ruamel.yaml import YAML

from can_dist.config.shipped import FOLDERS

ROOT = Path(__file__).resolve().parents[3]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
[VERSION] = re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE)
ARGUMENTS, STAGES = read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
STEPS = [step for stage in STAGES for step in stage.steps]
JOBS = ROOT / "ray_jobs"


# ---------------------------------------------------------------------------------------------------------- the wheel


def test_every_shipped_folder_is_mapped_into_the_package() -> None:
    mapped = dict(re.findall(r'^(\w+) = "can_dist/shipped/(\w+)"$', PROJECT, re.MULTILINE))
    assert mapped == {folder: folder for folder in FOLDERS}
    [included] = re.findall(r"^only-include = \[(.*)\]$", PROJECT, re.MULTILINE)
    assert set(re.findall(r'"(\w+)"', included)) == {"can_dist", *FOLDERS}
    assert not (ROOT / "can_dist" / "shipped").exists(), "in a checkout the folders lie at the top"


def test_the_version_is_written_in_one_place() -> None:
    written = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    files = [path for path in (ROOT / "can_dist").rglob("*.py") if written.search(path.read_text(encoding="utf-8"))]
    assert files == []


def test_the_examples_name_the_image_of_this_version() -> None:
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in JOBS.iterdir() if path.suffix in (".yaml", ".sbatch")
    }
    assert set(texts) == {"kuberay.yaml", "autoscaling.yaml", "slurm.sbatch"}
    for name, text in texts.items():
        assert set(re.findall(r"can-dist[:-](\d[\w.]*\d)", text)) == {VERSION}, name


# ---------------------------------------------------------------------------------------------------------- the image


def test_the_dockerfile_is_linted() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; `make lint` installs and runs it")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_stages_build_on_arguments_and_run_as_a_user() -> None:
    assert [(stage.base, stage.name) for stage in STAGES] == [
        ("${CPU_BASE}", "wheel"),
        ("${CPU_BASE}", "cpu"),
        ("${CUDA_BASE}", "cuda"),
    ]
    assert set(ARGUMENTS) == {"CPU_BASE", "CUDA_BASE"}
    for stage in STAGES[1:]:
        [user] = [rest for instruction, rest in stage.steps if instruction == "USER"]
        assert user.isdecimal(), "Kubernetes' runAsNonRoot reads numbers only"
        assert any(f"useradd --create-home --uid {user} can-dist" in rest for _, rest in stage.steps)


def test_no_registry_is_named() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"https?://|index-url|find-links", text) == []


def test_the_images_take_the_bounds_of_the_project() -> None:
    [bound] = re.findall(r'^gpu = \["(.+)"\]$', PROJECT, re.MULTILINE)
    assert [rest for _, rest in STEPS if f'"{bound}"' in rest] == [rest for _, rest in STEPS if "flash-attn" in rest]
    installs = [rest for instruction, rest in STEPS if instruction == "RUN" and "wheels/*.whl" in rest]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)


def test_what_the_images_install_beside_the_pins_does_not_contradict_them() -> None:
    text = " ".join(rest for instruction, rest in STEPS if instruction == "RUN")
    beside = [Requirement(text) for text in re.findall(r'"([\w.-]+(?:[<>=!~][^"]*)?)"', text)]
    assert {requirement.name for requirement in beside} >= {"wheel", "flash-attn"}
    pinned = [(pin, requirement) for pin in read_pins() for requirement in beside if requirement.name == pin.name]
    assert [pin.line for pin, requirement in pinned if not requirement.specifier.contains(pin.version)] == []


def test_the_context_holds_what_the_wheel_is_built_from_and_no_more() -> None:
    [included] = re.findall(r"^only-include = \[(.*)\]$", PROJECT, re.MULTILINE)
    folders = set(re.findall(r'"(\w+)"', included))
    tops = {name.split("/")[0] for name in context_files(ROOT)}
    assert tops == folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def test_kuberay_starts_the_script_that_the_image_has() -> None:
    entry = YAML(typ="safe", pure=True).load((JOBS / "kuberay.yaml").read_text(encoding="utf-8"))["spec"]["entrypoint"]
    folder, script = re.match(r"python (/[\w-]+)/(ray_jobs/run\.py) ", entry).groups()  # type: ignore[union-attr]
    assert (ROOT / script).is_file()
    for stage in STAGES[1:]:
        before = [step for step in stage.steps if step[0] in ("WORKDIR", "RUN")]
        [copied] = [n for n, (_, rest) in enumerate(before) if "can-dist files ray_jobs" in rest]
        assert before[copied - 1] == ("WORKDIR", folder)


# -------------------------------------------------------------------------------------------------------- the release


STUB = """import pathlib, sys
pathlib.Path('calls').open('a').write(f'{sys.argv[0].split("/")[-2]} {" ".join(sys.argv[1:])}\\n')
if 'build' in sys.argv[0]:
    pathlib.Path('dist').mkdir()
    for name in ('can_dist-1.2.3-py3-none-any.whl', 'can_dist-1.2.3.tar.gz'):
        pathlib.Path('dist', name).touch()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository that may be released: lint, tests and the builders only note that they were called."""
    folder = tmp_path / "project"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "release.py", folder / ".ci")
    (folder / "pyproject.toml").write_text('[project]\nname = "can-dist"\nversion = "1.2.3"\n')
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-11-28)\n\n## 1.2.2 (2026-01-01)\n")
    (folder / "Makefile").write_text("lint:\n\t@echo lint >> calls\ntest:\n\t@echo test >> calls\n")
    (folder / ".gitignore").write_text("calls\ndist/\n")
    for name in ("build", "twine", "pytest"):
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").touch()
        (tmp_path / "stubs" / name / "__main__.py").write_text(STUB)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "x")


def release(project: Path) -> tuple[int, str, list[str]]:
    """Its exit code, what it prints, and what it called."""
    done = subprocess.run(
        [sys.executable, "-S", ".ci/release.py"],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(project.parent / "stubs")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    called = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    return done.returncode, done.stdout, called


def test_release_goes_through_the_list_and_ends_with_the_tag(project: Path) -> None:
    (project / "dist").mkdir()
    (project / "dist" / "of_yesterday.whl").touch()
    code, printed, called = release(project)
    assert code == 0, printed
    assert len(re.findall("^ok    ", printed, re.MULTILINE)) == 9
    wheel, sdist = "can_dist-1.2.3-py3-none-any.whl", "can_dist-1.2.3.tar.gz"
    dist = project / "dist"
    assert called == [
        "lint",
        "test",
        f"build --outdir {dist}",
        f"twine check --strict {dist / wheel} {dist / sdist}",
        "pytest -q tests/integration/test_wheel.py",
    ]
    assert "\n  git tag -a v1.2.3 -m 'CAN-Dist 1.2.3' && git push origin v1.2.3\n" in printed
    tags = subprocess.run(["git", "tag"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert tags == "", "the tag is the person's to give"


def test_release_tells_every_quick_failure_and_starts_nothing(project: Path) -> None:
    git(project, "tag", "v1.2.3")
    (project / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (unreleased)\n")
    code, printed, called = release(project)
    assert (code, called) == (1, [])
    assert printed.splitlines() == [
        "FAIL  the tree is clean: commit or remove:",
        "        M CHANGELOG.md",
        "FAIL  the version is new: the tag v1.2.3 is there already; raise the version in pyproject.toml",
        "FAIL  the changelog has the version: CHANGELOG.md: expected '## 1.2.3 (YEAR-MONTH-DAY)' first, it has "
        "'1.2.3 (unreleased)'",
    ]


def test_release_stops_at_a_failing_step(project: Path) -> None:
    (project / "Makefile").write_text("lint:\n\t@echo lint >> calls\ntest:\n\t@exit 3\n")
    commit(project)
    code, printed, called = release(project)
    assert (code, called) == (1, ["lint"])
    assert printed.splitlines()[-1].startswith("FAIL  tests: `make test` ended with 2")


def test_release_refuses_other_files_than_the_versions(project: Path) -> None:
    text = (project / "pyproject.toml").read_text().replace("1.2.3", "1.3.0")
    (project / "pyproject.toml").write_text(text)
    (project / "CHANGELOG.md").write_text("## 1.3.0 (2026-11-28)\n")
    commit(project)
    code, printed, called = release(project)
    assert code == 1
    assert called[-1].startswith("build")
    assert (
        "FAIL  sdist and wheel: dist/ holds can_dist-1.2.3-py3-none-any.whl, can_dist-1.2.3.tar.gz; expected" in printed
    )


def test_release_without_twine_says_that_metadata_was_not_checked(project: Path) -> None:
    shutil.rmtree(project.parent / "stubs" / "twine")
    code, printed, called = release(project)
    assert code == 0
    assert "      not checked: twine is not installed\n" in printed
    assert not any(line.startswith("twine") for line in called)


def test_the_list_of_this_repository_is_what_make_calls() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nrelease: setup\n" in makefile
    assert "$(BIN)/python .ci/release.py\n" in makefile
    assert "$(BIN)/hadolint Dockerfile\n" in makefile
