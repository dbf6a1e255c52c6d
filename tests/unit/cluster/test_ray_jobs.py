"""What jobs upload, forward, refuse and warn of, and that every example and documented command can be meant."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from can_dist.cli import cli
from can_dist.cli import job as cli_job
from can_dist.cluster.connection import FORWARDED, JOB_CONFIG, forwarded
from can_dist.cluster.exposure import exposure, is_loopback, is_open, takes_strangers
from can_dist.config import Cluster
from can_dist.errors import ConfigError
from can_dist.workspace import SECRET_NAME

ROOT = Path(__file__).parents[3]
JOBS = ROOT / "ray_jobs"
SCRIPTS = {"ray_jobs/run.py": cli_job.run, "ray_jobs/stage.py": cli_job.stage}


# ---------------------------------------------------------------------------------------------------- what is uploaded


def test_s9_upload_of_the_repository_holds_the_code_and_nothing_secret_or_large(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    copy = tmp_path / "repository"
    left = shutil.ignore_patterns(".git", ".venv", "runs", "results", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=left)
    secrets = [
        ".git/config",
        ".env",
        ".env.local",
        "runs/mine/log.jsonl",
        "model/model.safetensors",
        "old.pt",
        "data.parquet",
    ]
    for name in secrets:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    assert {"ray_jobs/run.py", "can_dist/pipeline.py", "ds_configs/zero3_bf16.json"} <= set(names)
    assert not set(secrets) & set(names)
    assert not [name for name in names if name.startswith((".git/", "tests/", "runs/"))]
    assert package.stat().st_size < 3 << 20


# --------------------------------------------------------------------------------------------------- what is forwarded


def test_s2_only_listed_variables_are_forwarded_and_none_is_named_like_a_secret() -> None:
    environment = {"HF_TOKEN": "secret", "WANDB_API_KEY": "secret", "HF_HOME": "/cache", "OMP_NUM_THREADS": "1"}
    assert forwarded(environment) == {"HF_HOME": "/cache"}
    # switches of tokenizers are no tokens
    assert [name for name in FORWARDED if SECRET_NAME.search(name)] == ["TOKENIZERS_PARALLELISM"]


def test_what_the_submission_sets_is_left_to_it() -> None:
    submitted = json.dumps({"runtime_env": {"env_vars": {"HF_HOME": "/other"}}})
    assert forwarded({"HF_HOME": "/other", "HF_HUB_OFFLINE": "1", JOB_CONFIG: submitted}) == {"HF_HUB_OFFLINE": "1"}
    assert forwarded({"HF_HOME": "/cache", JOB_CONFIG: json.dumps({"runtime_env": None})}) == {"HF_HOME": "/cache"}


# ------------------------------------------------------------------------------------------------------- what is open


@contextmanager
def job_server(status: int) -> Iterator[str]:
    """Answer every request with a status, as a job server without (200) or with (401) authentication does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "answer"), [(200, True), (401, False), (403, False), (500, None)])
def test_a_job_server_that_answers_without_a_token_is_open(status: int, answer: bool | None) -> None:
    with job_server(status) as address:
        assert is_open(address) is answer
        assert is_open(f"http://{address}/") is answer


def test_no_job_server_is_not_open() -> None:
    assert is_open("127.0.0.1:1") is None


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:6379", True), ("http://127.3.2.1:8265", True), ("[::1]:6379", True), ("localhost:1", True),
     ("10.0.0.1:6379", False), ("0.0.0.0:8265", False), ("http://ray.example.com:8265", False)],
)  # fmt: skip
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address, "127.0.0.1:1") is loopback


def test_s1_open_cluster_on_the_network_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("can_dist.cluster.exposure.takes_strangers", lambda address: False)
    with job_server(200) as address:
        problem = exposure("10.0.0.1:6379", address)
        assert str(problem).startswith("the Ray cluster at 10.0.0.1:6379 is not authenticated and not on loopback: ")
        assert "start every node with RAY_AUTH_MODE=token" in str(problem)
        assert exposure("127.0.0.1:6379", address) is None
    with job_server(401) as address:
        assert exposure("10.0.0.1:6379", address) is None


@pytest.mark.parametrize(("lets_in", "sentence"), [
    (True, "whoever reaches 10.0.0.1:6379 runs commands on it"),
    (None, "whether the Ray cluster at 10.0.0.1:6379 refuses strangers could not be determined"),
    (False, ""),
])  # fmt: skip
def test_s1_head_without_a_dashboard_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch, lets_in: bool | None, sentence: str
) -> None:
    monkeypatch.setattr("can_dist.cluster.exposure.takes_strangers", lambda address: lets_in)
    problem = exposure("10.0.0.1:6379", "")
    assert sentence in str(problem or "")
    assert (problem is None) == (not sentence)


def test_s1_nobody_at_the_address_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("can_dist.cluster.exposure.STRANGER_TIMEOUT_S", 0.1)
    assert takes_strangers("127.0.0.1:1") is None


# -------------------------------------------------------------------------------------------------------- entry points


def test_entry_points_refuse_a_relative_run_directory(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("prompts: {source: p.jsonl}\nreference: {model: m}\nreward: {model: r}\n"
                      "constraints: {safety: {scorer: {model: c}, margin: 1}}\n")  # fmt: skip
    command = [sys.executable, "ray_jobs/run.py", str(config), "--run", "runs/mine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "ConfigError: --run runs/mine: a relative path." in done.stderr
    assert "Give an absolute path on storage that every node sees." in done.stderr
    stage = CliRunner().invoke(cli_job.stage, ["score", str(config), "--run", "runs/mine"])
    assert str(stage.exception).startswith("--run runs/mine: a relative path.")


def test_open_cluster_is_a_warning_and_with_require_auth_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from can_dist.cluster import connection as cluster
    from can_dist.errors import EnvironmentProblem

    class Reached(Exception):
        pass

    def reached(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(cluster, "connect", lambda _: None)
    monkeypatch.setattr(cluster, "open_to_the_network", lambda: EnvironmentProblem("anyone may come in."))
    monkeypatch.setattr(cli_job, "read_config", lambda *_: type("Settings", (), {"cluster": None}))
    monkeypatch.setattr(cli_job, "run_until", reached)
    warned = CliRunner().invoke(cli_job.run, ["my.yaml", "--run", str(tmp_path)])
    assert isinstance(warned.exception, Reached)
    assert "can-dist: warning: anyone may come in." in warned.output
    refused = CliRunner().invoke(cli_job.run, ["my.yaml", "--run", str(tmp_path), "--require-auth"])
    assert isinstance(refused.exception, EnvironmentProblem)
    assert str(refused.exception) == "anyone may come in."


# ------------------------------------------------------------------------------------- the examples and the commands


def parse(command: click.Command, arguments: list[str]) -> click.Context:
    """Parse arguments as the command would; a click error fails the test."""
    return command.make_context(command.name, list(arguments), resilient_parsing=False)


def check_command(line: str) -> None:
    """Fail unless the parts of a shell command that are ours or Ray's are commands with such options."""
    from ray.scripts.scripts import cli as ray

    words = [word for word in shlex.split(line) if not re.match(r"[A-Za-z_]+=", word)]
    if words[0] == "can-dist":
        parse(cli.commands[words[1]], words[2:])
        return
    if words[0] == "ray":
        group = ray.commands["job"] if words[1] == "job" else ray
        name, rest = (words[2], words[3:]) if words[1] == "job" else (words[1], words[2:])
        if "--" in rest:
            check_command(shlex.join(rest[rest.index("--") + 1 :]))
        parse(group.commands[name], rest)
        return
    assert words[0] == "python", line
    parse(SCRIPTS[words[1]], words[2:])
    assert (ROOT / words[1]).is_file()


def commands_in(text: str) -> list[str]:
    """Return the lines of a shell text that start something of ours or Ray's, with continuations and & removed."""
    joined = re.sub(r"\\\n\s*", " ", text)
    start, end = r"(?<![\w/.-])((?:ray|can-dist|python ray_jobs/\S+) (?!cluster|node)", r"(?: 2>|[#`\n&])"
    found = re.findall(start + r"[^#`\n&]*?)" + end, joined)
    return [line.replace('"', "").replace("$", "").strip() for line in found]


def test_every_command_of_the_readme_exists() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (JOBS / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if not line.startswith(("export ", "chmod "))]
    assert len(lines) >= 9
    for line in lines:
        check_command(line)


@pytest.mark.parametrize(
    "line",
    ["ray job submit --no-such-option -- python ray_jobs/run.py c.yaml --run /r", "can-dist stat /r",
     "ray job submit --working-dir . -- python ray_jobs/run.py c.yaml --runs /r"],
)  # fmt: skip
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    with pytest.raises((click.ClickException, KeyError)):
        check_command(line)


def test_kuberay_example_is_a_ray_job_with_a_token_from_a_secret() -> None:
    job = YAML(typ="safe", pure=True).load((JOBS / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    check_command(job["spec"]["entrypoint"].replace("/can-dist/", ""))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        assert isinstance(group["rayStartParams"], dict)
        [container] = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources", "volumeMounts"} <= container.keys()
        variables = {entry["name"]: entry for entry in container["env"]}
        assert "secretKeyRef" in variables["HF_TOKEN"]["valueFrom"]
        assert [name for name, entry in variables.items() if SECRET_NAME.search(name) and "value" in entry] == []
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_slurm_example_parses_and_its_commands_exist() -> None:
    path = JOBS / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.index("RAY_AUTH_MODE=token") < text.index("ray start")
    assert "umask 077" in text
    lines = commands_in("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert [line.split()[1] for line in lines] == ["start", "health-check", "start", "ray_jobs/run.py"]
    for line in lines:
        check_command(line.replace("=port", "=6379"))


def test_autoscaling_example_keeps_the_schema_of_ray_and_its_commands_exist() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    config = YAML(typ="safe", pure=True).load((JOBS / "autoscaling.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 4}, schema)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert len(starts) == 2
    for line in starts:
        assert line.startswith("RAY_AUTH_MODE=token ")
        check_command(line)


def test_heads_of_the_examples_give_a_training_time_to_commit() -> None:
    """``ray job stop`` waits as long as the process that the head's job server runs in was told to: 3 s unless told."""
    job = YAML(typ="safe", pure=True).load((JOBS / "kuberay.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert int({entry["name"]: entry.get("value") for entry in container["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]) > 20
    config = YAML(typ="safe", pure=True).load((JOBS / "autoscaling.yaml").read_text(encoding="utf-8"))
    heads = [*config["head_start_ray_commands"], *_heads_in(JOBS / "README.md")]
    assert len(heads) == 2
    for head in heads:
        assert int(head.partition("RAY_JOB_STOP_WAIT_TIME_S=")[2].split()[0]) > Cluster().stop_grace_s


def _heads_in(page: Path) -> list[str]:
    """Return the blocks of a page that start a head."""
    return [block for block in page.read_text(encoding="utf-8").split("```")[1::2] if "ray start --head" in block]


def test_a_configuration_is_still_given_once() -> None:
    result = CliRunner().invoke(cli_job.run, ["--run", "/r"])
    assert isinstance(result.exception, ConfigError)
