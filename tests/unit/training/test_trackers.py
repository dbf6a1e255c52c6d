"""Experiment trackers through their own packages: what is written is read back with the package's own reader.

TensorBoard's writer comes with CAN-Dist; the others are skipped where their extra is not installed.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from can_dist.config import Config
from can_dist.config.sections import Train
from can_dist.errors import ConfigError
from can_dist.training import trackers
from can_dist.training.metrics import MetricsLog
from can_dist.training.trackers import PACKAGES, check_trackers, open_trackers

SECRET = "hf_" + "Zx9" * 12
SETTINGS = {"beta": 0.5, "train": {"learning_rate": 3e-3, "betas": [0.9, 0.999]}, "precision": "fp32"}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training's directory, and an environment with a secret in it."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run" / "train-0123"
    directory.mkdir(parents=True)
    return directory


def train_twice(name: str, directory: Path) -> None:
    """Log three steps, die, and go on from the second."""
    for first, steps in ((0, (0, 1, 2)), (1, (2, 3))):
        log = MetricsLog(directory, first, open_trackers([name], directory, first, "can-dist-test", SETTINGS))
        for step in steps:
            log.write(step, {"loss": 1.0 - step / 10, "eval_loss": 2.0 + first})
        log.close()


def secrets_in(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_none_is_on_by_default() -> None:
    assert Train().trackers == ()
    assert open_trackers((), Path(), 0, "p", {}) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_without_its_package_is_refused_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda package: None if package == PACKAGES[name] else find(package))
    with pytest.raises(ConfigError, match=rf"train.trackers: {name} needs .* not installed. pip install 'can-dist\["):
        check_trackers([name])


def test_unknown_tracker_is_refused_by_name() -> None:
    from can_dist.config import validate_config

    with pytest.raises(ConfigError, match=r"train\.trackers.*tensorboard.*wandb.*mlflow.*trackio"):
        validate_config({"train": {"trackers": ["comet"]}})
    assert "trackers" in Config.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]


def test_no_tracker_is_imported_when_none_is_asked_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def watched(name: str, *arguments: Any, **options: Any) -> Any:
        assert name.split(".")[0] not in PACKAGES.values(), name
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", watched)
    MetricsLog(directory, 0, open_trackers((), directory, 0, "p", SETTINGS)).write(0, {"loss": 1.0})


def test_tensorboard_events_are_read_back_by_tensorboard(directory: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_twice("tensorboard", directory)
    events = reader.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("train/loss")}
    assert loss == pytest.approx({0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7}, rel=1e-6)
    assert {event.step: event.value for event in events.Scalars("train/eval_loss")}[3] == 3.0
    assert secrets_in(directory) == []


def test_tensorboard_writes_events(directory: Path) -> None:
    train_twice("tensorboard", directory)
    (one, *_) = sorted((directory / "tensorboard").glob("events.out.tfevents.*"))
    assert b"train/loss" in one.read_bytes()


def test_wandb_offline(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + SECRET[:8])
    train_twice("wandb", directory)
    runs = sorted((directory / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    # the file's name, not the folder's: wandb adds a number to a folder begun within the same second
    files = [path for run in runs for path in run.glob("*.wandb")]
    assert {path.stem.rpartition("-train-")[2] for path in files} == {"0123"}, "one id: wandb sync makes them one run"
    records = b"".join(path.read_bytes() for path in files)
    assert b"can-dist-test" in records
    assert b"learning_rate" in records
    assert b"eval_loss" in records
    assert secrets_in(directory) == []
    assert b"0123456789abcdef0123456789abcdef" not in records


@pytest.fixture
def mlflow(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    package.set_tracking_uri((directory.parent / "mlruns").as_uri())
    yield package
    package.end_run()


def test_mlflow_with_a_local_store(mlflow: Any, directory: Path) -> None:
    train_twice("mlflow", directory)
    (run,) = mlflow.search_runs(experiment_names=["can-dist-test"], output_format="list")
    assert run.info.run_name == "train-0123"
    assert run.data.params["train.learning_rate"] == "0.003"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3], "step 2 was logged before the training died"
    assert run.data.metrics["loss"] == pytest.approx(0.7)
    assert secrets_in(directory.parent) == []


def test_an_mlflow_store_that_went_away_does_not_end_training(
    mlflow: Any, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tracker,) = open_trackers(["mlflow"], directory, 0, "can-dist-test", SETTINGS)

    def gone(*_: Any, **__: Any) -> None:
        raise mlflow.MlflowException("no such server")

    monkeypatch.setattr(mlflow, "log_metrics", gone)
    tracker.log(3, {"loss": 1.0})
    assert "mlflow did not take step 3 (no such server)" in capsys.readouterr().err


def test_trackio_local(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(directory / "trackio"))
    pytest.importorskip("trackio")
    train_twice("trackio", directory)
    (store,) = (directory / "trackio").rglob("*.db")
    with sqlite3.connect(store) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {row[0] for row in rows} == {"train-0123"}
    assert [row[1] for row in rows] == [0, 1, 2, 3]
    assert {row[1]: json.loads(row[2])["loss"] for row in rows}[3] == pytest.approx(0.7)
    assert secrets_in(directory) == []
