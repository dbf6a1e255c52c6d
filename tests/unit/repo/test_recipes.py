"""Every recipe is a configuration that its own commands can run; its hub models and data sets can be pinned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import serving_hub

from can_dist.config import Config, for_method, load_config
from can_dist.config.yaml_files import read_yaml
from can_dist.doctor.preflight import check_pinned, preflight
from can_dist.errors import ConfigError
from can_dist.tables.foreign.formats import read_preferences, read_prompts

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
AT_SIZE = [path for path in RECIPES if path.parent.name != "pku_stories3M"]
# their commits were found nowhere; pin.py asks for them
UNPINNED = {"PKU-Alignment/PKU-SafeRLHF-30K": "datasets", "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "models"}
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


def hub_names(path: Path) -> set[str]:
    return {entry[key] for key, entry in pin.hub_entries(read_yaml(path), path.parent)}


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_recipe_at_size_runs_as_it_is_or_refuses_for_what_has_no_commit(path: Path) -> None:
    for config in as_run(path):
        missing = hub_names(path) & UNPINNED.keys()
        if not missing:
            check_pinned(config)
            continue
        with pytest.raises(ConfigError, match=r"pinned: \d+ model\(s\) and data set\(s\) of the hub") as caught:
            check_pinned(config)
        message = str(caught.value)
        assert set(re.findall(r"^  \S+: (\S+) at revision none$", message, re.MULTILINE)) == missing
        assert "`python recipes/pin.py FILE`" in message


def test_commits_are_those_of_the_readme_which_says_how_each_is_known() -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+/\S+)` \| (?:`([0-9a-f]{40})`|none) \| (.+) \|$", text, re.MULTILINE)
    assert all(how for _, _, how in rows)
    told = {name: commit or None for name, commit, _ in rows}
    assert len(told) == len(rows)
    entries = [
        (entry[key], entry.get("revision"))
        for path in AT_SIZE
        for key, entry in pin.hub_entries(read_yaml(path), path.parent)
    ]
    assert set(entries) == set(told.items()), "one commit for each, the same in every recipe"
    assert {name for name, commit in told.items() if commit is None} == set(UNPINNED)


def test_branch_is_no_pin_and_what_is_not_pinned_may_run(tmp_path: Path) -> None:
    path = AT_SIZE[0]
    with pytest.raises(ConfigError, match=r"reference: .* at revision main"):
        check_pinned(load_config(path, ["reference.revision=main"]))
    check_pinned(load_config(path, ["pinned=false"]))


def copied(path: Path, directory: Path, *, pins: bool) -> Path:
    """A copy of a recipe, with or without its commits."""
    text = path.read_text(encoding="utf-8")
    copy = directory / "recipe.yaml"
    copy.write_text(text if pins else re.sub(r"^ *revision: .*\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    return copy


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_pin_asks_the_hub_for_all_that_has_no_commit_and_leaves_the_rest_of_the_file(
    path: Path, tmp_path: Path
) -> None:
    copy = copied(path, tmp_path, pins=False)
    with serving_hub() as hub:
        done = run_pin(hub.url, copy)
        assert done.returncode == 0, done.stderr
        assert len(hub.asked) == len(hub_names(path)), "each once"
        run_pin(hub.url, copy)
        assert len(hub.asked) == len(hub_names(path)), "what has a commit is not asked for again"
    for before, after in zip(as_run(path), as_run(copy), strict=True):
        check_pinned(after)
        assert after.reference.revision == hub.commit_of(f"models/{before.reference.model}")
        assert after.prompts.revision == hub.commit_of(f"datasets/{before.prompts.source}")
        assert without_revisions(after.model_dump()) == without_revisions(before.model_dump())
    comments = re.findall(r"^#.*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^#.*", copy.read_text(encoding="utf-8"), re.MULTILINE) == comments


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_pin_keeps_the_commits_of_a_recipe_and_asks_only_for_the_others(path: Path, tmp_path: Path) -> None:
    copy = copied(path, tmp_path, pins=True)
    missing = {f"{UNPINNED[name]}/{name}": name for name in hub_names(path) & UNPINNED.keys()}
    with serving_hub(status=200 if missing else 404) as hub:
        done = run_pin(hub.url, copy)
    assert done.returncode == 0, done.stderr
    assert hub.asked == list(missing)
    if not missing:
        assert copy.read_bytes() == path.read_bytes()
    for before, after in zip(as_run(path), as_run(copy), strict=True):
        check_pinned(after)
        assert after.reference.revision == before.reference.revision
    kept = {f"{entry[key]}: {entry['revision']} (kept)" for key, entry in entries_with_commit(path)}
    asked = {f"{name}: {hub.commit_of(place)}" for place, name in missing.items()}
    assert set(done.stdout.splitlines()) == kept | asked


@pytest.mark.parametrize("path", AT_SIZE, ids=name)
def test_pin_update_takes_the_hubs_commits_and_says_what_each_was(path: Path, tmp_path: Path) -> None:
    copy = copied(path, tmp_path, pins=True)
    with serving_hub() as hub:
        done = run_pin(hub.url, copy, "--update")
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == len(hub_names(path))
    for key, entry in entries_with_commit(path):
        commit = hub.commit_of(f"{'models' if key == 'model' else 'datasets'}/{entry[key]}")
        assert f"{entry[key]}: {commit} (was {entry['revision']})" in done.stdout.splitlines()
        assert entry["revision"] not in copy.read_text(encoding="utf-8")
    for config in as_run(copy):
        check_pinned(config)


def test_pin_leaves_what_is_beside_the_recipe_alone(tmp_path: Path) -> None:
    (tmp_path / "models" / "lm").mkdir(parents=True)
    data = {"reference": {"model": "models/lm"}, "reward": {"model": "models/reward"}, "prompts": {"source": "~"}}
    assert list(pin.hub_entries(data, tmp_path)) == [("model", {"model": "models/reward"})]
    assert len(list(pin.hub_entries(data, tmp_path / "models"))) == 2


def entries_with_commit(path: Path) -> list[tuple[str, Any]]:
    return [(key, entry) for key, entry in pin.hub_entries(read_yaml(path), path.parent) if "revision" in entry]


def test_pin_leaves_the_file_alone_when_the_hub_does_not_know(tmp_path: Path) -> None:
    copy = copied(AT_SIZE[0], tmp_path, pins=False)
    before = copy.read_bytes()
    with serving_hub(status=404) as hub:
        done = run_pin(hub.url, copy)
    assert done.returncode == 1
    assert f"{copy}: not changed, the hub did not answer: " in done.stderr
    assert "404" in done.stderr
    assert copy.read_bytes() == before
    done = run_pin(hub.url, copy)  # nobody serves there any more
    assert done.stderr.startswith(f"{copy}: not changed, the hub did not answer: [Errno 111]")
    assert copy.read_bytes() == before


def test_pin_that_cannot_finish_writing_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: Any, data: Any, stream: Any) -> None:
        stream.write("refer")
        raise OSError(28, "No space left on device")

    copy = tmp_path / "recipe.yaml"
    copy.write_text("reference: {model: some/model}\n", encoding="utf-8")
    before = copy.read_bytes()
    monkeypatch.setattr(pin.YAML, "dump", full_disk)
    monkeypatch.setattr(pin.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    with pytest.raises(OSError, match="No space left"):
        pin.pin(copy)
    assert copy.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def run_pin(endpoint: str, path: Path, *options: str) -> Any:
    command = [sys.executable, str(ROOT / "recipes" / "pin.py"), str(path), *options]
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
    assert without_revisions(small.reference.model_dump()) == without_revisions(large.reference.model_dump())
    assert small.reference.revision is None  # a stand-in is a path
    assert small.train.lora == large.train.lora
    assert small.train.max_steps == 2
    engine = "transformers" if "0.5b" in name(path) else "vllm"  # 7B and 8B sample by vLLM
    assert (small.generate.engine, large.generate.engine) == ("transformers", engine)
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
    assert set(config.methods) == {
        "mocan",
        "pecan",
        "dpo_h",
        "dpo_s",
        "safedpo",
        "sacpo",
        "p_sacpo",
        "cdpo",
        "caid",
        "primal_dual",
    }
    assert for_method(config, "caid").train == for_method(config, "mocan").train  # as much training for each round
