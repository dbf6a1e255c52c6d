"""Every recipe is a configuration that its own commands can run; its hub models and data sets can be pinned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import serving_hub

from can_dist.config import Config, for_method, load_config
from can_dist.config_yaml import read_yaml
from can_dist.errors import ConfigError
from can_dist.stages.preflight import check_pinned, preflight
from can_dist.tables.formats import read_preferences, read_prompts

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
AT_SIZE = [path for path in RECIPES if path.parent.name != "pku_stories3M"]
sys.path.append(str(ROOT / "recipes"))

import pin  # noqa: E402
import smoke  # noqa: E402

SMALL_PROMPTS = smoke.SMALL["prompts.num_train"] + smoke.SMALL["prompts.num_test"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def commands(path: Path) -> dict[str, str]:
    """The commands in the comment at the top of a recipe, by their first words."""
    text = re.sub(r" \\\n#\s+", " ", path.read_text(encoding="utf-8"))
    return {" ".join(line.split()[:2]): line for line in re.findall(r"^#   (.+)", text, re.MULTILINE)}


def methods_of(command: str) -> list[str]:
    named = re.search(r"--methods ([\w,]+)", command)
    return named.group(1).split(",") if named else []


def as_run(path: Path) -> list[Config]:
    """The configurations that a recipe's command runs."""
    config = load_config(path)
    return [for_method(config, method) for method in config.methods] or [config]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_valid_and_its_command_names_it(path: Path) -> None:
    config = load_config(path)
    command = commands(path)["can-dist run"]
    assert command.startswith(f"can-dist run {path.relative_to(ROOT)} --run ")
    methods = methods_of(command)
    assert set(config.methods) == set(methods)
    for method in methods:
        assert for_method(config, method).method == method


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_recipe_at_size_says_how_to_pin_plan_and_try_it(path: Path) -> None:
    found, where = commands(path), str(path.relative_to(ROOT))
    assert found["python recipes/pin.py"] == f"python recipes/pin.py {where}"
    assert found["can-dist plan"].startswith(f"can-dist plan {where} --memory ")
    assert found["python recipes/smoke.py"].startswith(f"python recipes/smoke.py {where} --run ")
    assert methods_of(found["python recipes/smoke.py"]) == methods_of(found["can-dist run"])


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_recipe_at_size_refuses_to_run_until_everything_of_the_hub_is_a_commit(path: Path) -> None:
    for config in as_run(path):
        with pytest.raises(ConfigError, match=r"pinned: \d+ model\(s\) and data set\(s\) of the hub") as caught:
            check_pinned(config)
        message = str(caught.value)
        assert f"reference: {config.reference.model} at revision none" in message
        assert f"prompts: {config.prompts.source} at revision none" in message
        assert "`python recipes/pin.py FILE`" in message
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"revision:", text) == [], "a revision that was written here was not asked of the hub"


def test_branch_is_no_pin_and_what_is_not_pinned_may_run(tmp_path: Path) -> None:
    path = AT_SIZE[0]
    with pytest.raises(ConfigError, match=r"reference: .* at revision main"):
        check_pinned(load_config(path, ["reference.revision=main"]))
    check_pinned(load_config(path, ["pinned=false"]))


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_pin_asks_the_hub_and_leaves_the_rest_of_the_file(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "recipe.yaml"
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with serving_hub() as hub:
        done = run_pin(hub.url, copy)
        assert done.returncode == 0, done.stderr
        asked = len(hub.asked)
        run_pin(hub.url, copy)
        assert len(hub.asked) == asked, "what has a commit is not asked for again"
    for before, after in zip(as_run(path), as_run(copy), strict=True):
        check_pinned(after)
        assert after.reference.revision == hub.commit_of(f"models/{before.reference.model}")
        assert after.prompts.revision == hub.commit_of(f"datasets/{before.prompts.source}")
        assert without_revisions(after.model_dump()) == without_revisions(before.model_dump())
    comments = re.findall(r"^#.*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^#.*", copy.read_text(encoding="utf-8"), re.MULTILINE) == comments


def test_pin_leaves_the_file_alone_when_the_hub_does_not_know(tmp_path: Path) -> None:
    copy = tmp_path / "recipe.yaml"
    copy.write_text(AT_SIZE[0].read_text(encoding="utf-8"), encoding="utf-8")
    with serving_hub(status=404) as hub:
        done = run_pin(hub.url, copy)
    assert done.returncode == 1
    assert f"{copy}: not changed, the hub did not answer: " in done.stderr
    assert "404" in done.stderr
    assert copy.read_text(encoding="utf-8") == AT_SIZE[0].read_text(encoding="utf-8")


def test_pin_that_cannot_finish_writing_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: Any, data: Any, stream: Any) -> None:
        stream.write("refer")
        raise OSError(28, "No space left on device")

    copy = tmp_path / "recipe.yaml"
    copy.write_text(f"reference: {{model: {tmp_path}}}\n", encoding="utf-8")
    before = copy.read_bytes()
    monkeypatch.setattr(pin.YAML, "dump", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pin.pin(copy)
    assert copy.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def run_pin(endpoint: str, path: Path) -> Any:
    command = [sys.executable, str(ROOT / "recipes" / "pin.py"), str(path)]
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def without_revisions(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_revisions(value) for key, value in node.items() if key != "revision"}
    return node


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_smoke_form_is_the_recipe_with_other_sizes(path: Path) -> None:
    recipe = read_yaml(path)
    changes = smoke.overrides(recipe, list(recipe.get("methods") or {}))
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    small, large = load_config(path, given), load_config(path)
    assert small.reference == large.reference
    assert small.train.lora == large.train.lora
    assert small.train.max_steps == 2
    assert {m for _, group in smoke.groups(recipe) if isinstance(m := group.get("model"), str)} <= set(smoke.MODELS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of everything that any recipe names, made once."""
    directory = tmp_path_factory.mktemp("hub")
    for path in AT_SIZE:
        smoke.make_hub(directory, read_yaml(path))
    return directory


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_stand_ins_are_what_each_method_of_the_recipe_wants(
    path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads, signs, verdict words, templates and columns are checked as before any run; a slow test runs them."""
    recipe = read_yaml(path)
    changes = smoke.overrides(recipe, list(recipe.get("methods") or {}))
    config = load_config(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    monkeypatch.chdir(hub)
    for own in [for_method(config, method) for method in config.methods] or [config]:
        check_pinned(own)
        preflight(own)
    assert read_prompts(config.prompts.source).table.num_rows >= SMALL_PROMPTS
    read = read_preferences(config.prompts.source)
    assert read.format == "pku-saferlhf"
    assert 0 < read.counts["disagreements"] < read.counts["rows"]


def test_smoke_says_when_it_has_no_stand_in(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no stand-in for 'my/model'\. Add its architecture to MODELS"):
        smoke.make_hub(tmp_path, {"reference": {"model": "my/model"}})


def test_comparison_names_every_method() -> None:
    config = load_config(ROOT / "recipes" / "pku_stories3M" / "compare.yaml")
    assert set(config.methods) == {"mocan", "pecan", "dpo_h", "dpo_s", "sacpo", "p_sacpo", "cdpo", "caid"}
    assert for_method(config, "caid").train == for_method(config, "mocan").train  # as much training for each round
