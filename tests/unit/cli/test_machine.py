"""What a machine, an environment or a hostile text can do to a command: one message, an exit code, no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from can_dist.config import Config, validate_config
from can_dist.config.yaml_files import parse_yaml
from can_dist.console import printable
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.workspace import Workspace, read_events, read_owner, redacted

SCORES = "".join(
    json.dumps({"prompt_id": f"p{i}", "response_id": f"r{k}", "reward": k, "safety": -k}) + "\n"
    for i in range(4)
    for k in range(8)
)

SCORER = {"kind": "callable", "function": "a:b"}
CONFIG = {
    "prompts": {"source": "none.jsonl"},
    "reference": {"model": "none"},
    "reward": SCORER,
    "constraints": {"safety": {"scorer": SCORER, "margin": 0.1}},
}
SOLVE = ["solve", "--scores", "scores.jsonl", "--reward", "reward", "--beta", "5", "--constraint", "safety:margin=-1"]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


def run(*arguments: str, cwd: Path, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "can_dist", *arguments]
    return subprocess.run(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, check=False)


@pytest.fixture
def any_config() -> Config:
    return validate_config(CONFIG)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "scores.jsonl").write_text(SCORES)
    (folder / "file").write_text("here already")
    (folder / "my.yaml").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [("file", "A file is in the way"), ("x" * 300, "Give a shorter path"), ("file/below", "A file is in the way")],
)
def test_run_directory_that_cannot_be_made(world: Path, run_dir: str, message: str) -> None:
    done = run("run", "my.yaml", "--run", run_dir, cwd=world)
    assert (done.returncode, "Traceback" in done.stderr) == (6, False), done.stderr
    assert message in done.stderr


def test_full_device_under_the_output(world: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = run(*SOLVE, cwd=world, stdout=full)
    assert (done.returncode, "Traceback" in done.stderr) == (6, False), done.stderr
    assert "standard output: No space left on device. Free space" in done.stderr


def test_reader_that_went_away(world: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*SOLVE, cwd=world, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, ""), "as of any command of click"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1" + "0" * 5000, "not valid YAML"),
        ("a: " + "[" * 5000, "nested without end, or too deeply"),
        ("a: {" + "[" * 3000 + "}", "nested without end, or too deeply"),  # took twenty seconds
        ("a: &a [*a]", "nested without end"),
        ("a: &a 1\nb: &a 2", r"an anchor \(&name\) is given twice. Give each a name of its own."),
        (BOMB, "aliases"),
    ],
    ids=["huge integer", "brackets", "brackets in a mapping", "endless alias", "anchor twice", "alias bomb"],
)
def test_yaml_that_no_machine_holds_is_refused_at_once(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "my.yaml")
    assert time.monotonic() - started < 20


def test_alias_of_a_configuration_is_filled_in() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a", "my.yaml") == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_rank_that_is_no_number(world: Path, variable: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | {variable: "abc"}
    command = [sys.executable, "-m", "can_dist.train", "--config", "my.yaml", "--run", "r"]
    done = subprocess.run(command, cwd=world, env=os.environ | given, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert f"{variable}=abc" in done.stderr


def test_variables_of_a_job_pod_do_not_let_a_second_process_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_config: Config
) -> None:
    first = Workspace(tmp_path / "run", any_config)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EnvironmentProblem, match="is in use by process"):
        Workspace(tmp_path / "run", any_config)
    first.close()


def test_owner_whose_number_another_process_has_now_is_dead(tmp_path: Path) -> None:
    began = time.localtime(time.time() - 10**7)
    since = time.strftime("%Y-%m-%d %H:%M:%S", began)
    (tmp_path / ".owner").write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    owner = read_owner(tmp_path)
    assert owner is not None
    assert owner.alive is False
    (tmp_path / ".owner").write_text(
        f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    )
    owner = read_owner(tmp_path)
    assert owner is not None
    assert owner.alive is True


@pytest.mark.parametrize("secret", ['quo"ted-secret', "back\\slash-secret", "plain-secret", "é-secret-ü"])
def test_secrets_are_replaced_however_they_are_written(secret: str) -> None:
    environment = {"MY_TOKEN": secret}
    for text in (f"said {secret}", json.dumps({"a": secret}), json.dumps({"a": secret}, ensure_ascii=False)):
        assert "secret" not in redacted(text, environment)


def test_log_takes_any_text_and_is_read_with_any_byte(tmp_path: Path, any_config: Config) -> None:
    work = Workspace(tmp_path / "run", any_config)
    work.log(event="row", name="\ud800")
    work.close()
    with (tmp_path / "run" / "log.jsonl").open("ab") as log:
        log.write(b'{"event": "\xff"}\n{"time": 1, "event": "\xff"}\n')
    events = read_events(tmp_path / "run" / "log.jsonl")
    assert [event["event"] for event in events] == ["began", "row", "\ufffd"], "a line without a time is damaged"


def test_escapes_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, any_config: Config
) -> None:
    assert printable("a\x1b[31mb\x9b\u202ec\n\td é") == "a\\x1b[31mb\\x9b\\u202ec\n\td é"
    work = Workspace(tmp_path / "run", any_config)
    work.say("row \x1b]0;title\x07")
    work.close()
    assert "\x1b" not in capsys.readouterr().err


def test_escape_in_an_id_is_written_out(tmp_path: Path) -> None:
    row = {"prompt_id": "p\x1b[2J", "response_id": "r", "reward": 1.0, "safety": 0.5}
    (tmp_path / "scores.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    done = run(
        "solve",
        "--scores",
        "scores.jsonl",
        "--reward",
        "reward",
        "--beta",
        "1",
        "--constraint",
        "safety:margin=0",
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
