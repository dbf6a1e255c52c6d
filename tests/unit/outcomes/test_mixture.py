"""Another margin of a run with a basis: its own artifacts, what is said, and every refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from basis_run import BasisRun, make_basis_run
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.errors import ConfigError, DataError
from can_dist.outcomes.export import find_policy
from can_dist.outcomes.mixture import export_mixture, has_basis
from can_dist.stages.estimate import load_estimate
from can_dist.stages.mixture import for_other_margins
from can_dist.stages.solve import demands
from can_dist.tables.artifacts import load_artifact

pytestmark = pytest.mark.slow  # forward and backward passes of real models
OWN, OTHER = 0.2, 0.25


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasisRun]:
    """A run whose own mixture is for its own margin."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = make_basis_run(tmp_path_factory.mktemp("basis"), monkeypatch, margin=OWN)
        made.mixture()
        yield made


def test_command_mixes_for_the_margin_in_the_run_and_says_what_it_expects(run: BasisRun, tmp_path: Path) -> None:
    directory = run.work.directory
    own, _ = find_policy(directory)
    arguments = ["export", "policy", str(directory), "--out", str(tmp_path / "out"), "--margin", str(OTHER)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.stdout.splitlines() == [str(tmp_path / "out")]
    (strength,) = (load_artifact(path) for path in directory.glob("strength-*"))
    mixed = strength.input("policy")
    assert for_other_margins(mixed)
    assert not for_other_margins(own)
    (demand,) = demands(strength.input("solution"))
    assert demand.margin == OTHER
    assert strength.info["alpha"] == pytest.approx(
        OTHER / load_estimate(strength.input("estimate")).improvement["calm"].mean
    )
    for part in (
        "calm +0.2",
        f"strength: {strength.info['alpha']:.3g}, which calm needs",
        "mixture of",
        "the dual's frontier has reward",
    ):
        assert part in result.stderr
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "expected is calm +0.2" in card
    assert "| mixture | " in card
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (strength.path / "policy" / "model.safetensors").read_bytes()
    assert find_policy(directory)[0].digest == own.digest, "the run's own policy stays its policy"
    assert "margin: 0.2" in (directory / "config.yaml").read_text()


def test_the_same_margin_again_makes_nothing_anew(run: BasisRun, tmp_path: Path) -> None:
    export_mixture(run.work.directory, tmp_path / "first", margins={"calm": OTHER}, max_shard_mb=None)
    before = sorted(path.name for path in run.work.directory.glob("*-*"))
    export_mixture(run.work.directory, tmp_path / "second", margins={"": OTHER}, max_shard_mb=None)
    assert sorted(path.name for path in run.work.directory.glob("*-*")) == before


def test_refusals(run: BasisRun, tmp_path: Path) -> None:
    assert has_basis(run.work.directory)
    with pytest.raises(ConfigError, match=r"no constraint of the run\. Its constraints: calm"):
        export_mixture(run.work.directory, tmp_path / "out", margins={"safety": 0.1}, max_shard_mb=None)
    config = run.work.directory / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("calm:", "quiet:"))
    with pytest.raises(DataError, match=r"solved for calm, and the run's configuration now has quiet"):
        export_mixture(run.work.directory, tmp_path / "out", margins={"": 0.1}, max_shard_mb=None)
    config.write_text(text)
    assert not (tmp_path / "out").exists()
