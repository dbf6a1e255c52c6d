"""What travels with the package is found by name, from any directory, and a path that exists comes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from can_dist.config import load_config, shipped
from can_dist.config.shipped import FOLDERS, shipped_file, shipped_names, shipped_root, short_names
from can_dist.errors import ConfigError
from can_dist.training.deepspeed_config import read_ds_config

ROOT = Path(__file__).parents[3]
DS_CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_shipped_folder_has_a_name(folder: str) -> None:
    files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert len(files) > 4
    assert {shipped_root() / name for name in shipped_names(folder)} == files


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_a_deepspeed_file_is_known_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    for spelling in (name, f"{name}.json", f"ds_configs/{name}.json", str(ROOT / "ds_configs" / f"{name}.json")):
        assert read_ds_config(spelling) == content


def test_a_file_in_the_working_directory_comes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}
    (tmp_path / "zero3_bf16").write_text(json.dumps(own))
    assert read_ds_config("zero3_bf16") == own
    own_recipe = (ROOT / "recipes" / "pku_7b" / "lora.yaml").read_text(encoding="utf-8").replace("seed: 0", "seed: 5")
    (tmp_path / "pku_7b").mkdir()
    (tmp_path / "pku_7b" / "lora.yaml").write_text(own_recipe)
    assert load_config("pku_7b/lora.yaml").seed == 5
    assert load_config("pku_7b/lora").seed == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_known_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "recipes" / f"{name}.yaml")
    for spelling in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        assert load_config(spelling) == config


def test_messages_name_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_config("pku_7b/lroa")
    assert str(refused.value).startswith("pku_7b/lroa: no such configuration file. ")
    assert str(refused.value).endswith(f"the name of a recipe: {', '.join(RECIPES)}.")
    with pytest.raises(ConfigError) as refused:
        read_ds_config("zero3_bf61")
    assert str(refused.value).endswith(f"comes with can-dist: {', '.join(DS_CONFIGS)}.")


@pytest.mark.parametrize("name", ["", ".", "..", "../pyproject", "../ds_configs/zero3_cpu", "/etc/passwd", "README"])
def test_a_name_reaches_nothing_else(name: str) -> None:
    assert shipped_file(name, "recipes", ".yaml") is None


def test_in_a_wheel_the_folders_lie_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipped" / "ds_configs").mkdir(parents=True)
    (tmp_path / "shipped" / "ds_configs" / "only.json").write_text("{}")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    assert shipped_file("only", "ds_configs", ".json") == tmp_path / "shipped" / "ds_configs" / "only.json"
    assert short_names("ds_configs", ".json") == "only"
    assert shipped_names("recipes") == []
