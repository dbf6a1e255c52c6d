"""Object stores: what is read there is what a local file would be; what breaks off leaves nothing half-written.

The stores are fsspec's own in memory, and one that fails as told; an S3 server is in ``test_s3.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from trained_run import TrainedRun

from can_dist.cli import cli
from can_dist.config import DataSource
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.stages.ingest import source_identity
from can_dist.tables.foreign.formats import read_prompts
from can_dist.tables.remote import check_absent, local_copy, put_directory
from can_dist.tables.urls import is_remote

ROWS = "".join(json.dumps({"prompt": f"tell me {number}"}) + "\n" for number in range(20))


class Failing(MemoryFileSystem):
    """A store in memory of which one operation fails after so many calls."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    fails: dict[str, int] = {}  # noqa: RUF012
    error: Exception = ConnectionResetError("gone")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _count(self, name: str) -> None:
        left = Failing.fails.get(name)
        if left is not None:
            if left == 0:
                raise Failing.error
            Failing.fails[name] = left - 1

    def get_file(self, rpath: str, lpath: Any, **options: Any) -> None:
        Path(lpath).write_bytes(b"half")
        self._count("get")
        super().get_file(rpath, lpath, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._count("put")
        super().put_file(lpath, rpath, **options)

    def rm_file(self, path: str) -> None:
        self._count("remove")
        super().rm_file(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._count("list")
        return super().ls(path, detail=detail, **options)


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Failing, "fails", {})
    memory = fsspec.filesystem("memory")
    for files in (memory, fsspec.filesystem("failing")):
        files.store.clear()
        files.pseudo_dirs[:] = [""]
    memory.pipe_file("/data/prompts.jsonl", ROWS.encode())
    fsspec.filesystem("failing").pipe_file("/data/prompts.jsonl", ROWS.encode())
    return memory


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_remote_file_is_read_and_known_as_a_local_one(tmp_path: Path) -> None:
    local = tmp_path / "prompts.jsonl"
    local.write_text(ROWS)
    url = "memory://data/prompts.jsonl"
    assert read_prompts(url).table == read_prompts(local).table
    assert source_identity(DataSource(source=url)) == source_identity(DataSource(source=str(local)))


def test_a_remote_folder_of_shards_is_read_as_a_local_one(stores: MemoryFileSystem, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, part in (("a.jsonl", ROWS[: len(ROWS) // 2]), ("b.jsonl", ROWS[len(ROWS) // 2 :])):
        part = "".join(line + "\n" for line in part.splitlines() if line.endswith("}") and line.startswith("{"))
        (tmp_path / "shards" / name).write_text(part)
        stores.pipe_file(f"/shards/{name}", part.encode())
    assert read_prompts("memory://shards").table == read_prompts(tmp_path / "shards").table


def test_a_copy_is_made_once_a_version(stores: MemoryFileSystem, tmp_path: Path) -> None:
    first = local_copy("memory://data/prompts.jsonl")
    assert local_copy("memory://data/prompts.jsonl") == first
    assert cached(tmp_path) == [first]
    stores.pipe_file("/data/prompts.jsonl", b'{"prompt": "new"}\n')
    second = local_copy("memory://data/prompts.jsonl")
    assert second != first
    assert second.read_text() == '{"prompt": "new"}\n'


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://data/none.jsonl", DataError, r"memory://data/none.jsonl: no such file, folder or bucket"),
        ("memory://no-bucket/prompts.jsonl", DataError, r"no such file, folder or bucket"),
        ("nothing://data/prompts.jsonl", ConfigError, r"nothing://data/prompts.jsonl: Protocol not known"),
    ],
)
def test_what_is_not_there_is_named(url: str, kind: type[Exception], message: str) -> None:
    for read in (read_prompts, lambda source: source_identity(DataSource(source=source))):
        with pytest.raises(kind, match=message):
            read(url)


def test_a_store_whose_package_is_missing_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # of an earlier use
    with pytest.raises(
        EnvironmentProblem, match=r"s3://bucket/prompts.jsonl: Install s3fs to access S3\. Install it beside"
    ):
        read_prompts("s3://bucket/prompts.jsonl")


def test_a_store_that_vanishes_in_the_middle_leaves_no_copy(tmp_path: Path) -> None:
    Failing.fails = {"get": 0}
    with pytest.raises(EnvironmentProblem, match=r"prompts.jsonl.*the store failed \(ConnectionResetError: gone\)"):
        read_prompts("failing://data/prompts.jsonl")
    assert cached(tmp_path) == []
    Failing.fails = {}
    assert read_prompts("failing://data/prompts.jsonl").table.num_rows == 20


def test_a_store_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Failing.fails = {"list": 0}
    monkeypatch.setattr(Failing, "error", PermissionError("Access Denied"))
    with pytest.raises(EnvironmentProblem, match=r"failing://data: the store failed \(PermissionError: Access Denied"):
        local_copy("failing://data")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "sub/README.md"):
        (tmp_path / "policy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "policy" / name).write_text(name)
    return tmp_path / "policy"


def test_a_directory_is_put_whole_with_its_configuration_last(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put = Failing.put_file
    monkeypatch.setattr(Failing, "put_file", lambda s, a, b, **o: (order.append(Path(a).name), put(s, a, b, **o)))
    put_directory(policy, "failing://models/mine/")
    assert order == ["model.safetensors", "README.md", "config.json"]
    files = fsspec.filesystem("failing")
    assert files.cat_file("/models/mine/sub/README.md") == b"sub/README.md"
    with pytest.raises(ConfigError, match=r"--out failing://models/mine: already exists"):
        check_absent("failing://models/mine")
    check_absent("failing://models/other")


def test_an_upload_that_breaks_off_is_taken_back_or_says_what_is_left(policy: Path) -> None:
    Failing.fails = {"put": 2}
    with pytest.raises(EnvironmentProblem, match=r"failing://models/mine \(config.json\): the store failed"):
        put_directory(policy, "failing://models/mine")
    assert [name for name in Failing.store if name.startswith("/models")] == []
    Failing.fails = {"put": 2, "remove": 1}
    with pytest.raises(EnvironmentProblem, match=r"the upload broke off, and 1 file\(s\) may be left there"):
        put_directory(policy, "failing://models/mine")


def test_a_policy_is_exported_to_a_url(tmp_path: Path, stores: MemoryFileSystem) -> None:
    run = TrainedRun(tmp_path)
    policy = run.train()
    command = ["export", "policy", str(run.run), "--out", "memory://models/mine"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.stdout == "memory://models/mine\n"
    weights = (policy.path / "policy" / "model.safetensors").read_bytes()
    assert stores.cat_file("/models/mine/model.safetensors") == weights
    assert b"can-dist" in stores.cat_file("/models/mine/README.md").lower()
    with pytest.raises(ConfigError, match="already exists"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    with pytest.raises(ConfigError, match="Leave out one"):
        CliRunner().invoke(cli, [*command, "--push", "me/mine"], catch_exceptions=False)


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run"])
def test_a_run_directory_in_a_store_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="needs a file system with atomic rename"):
        CliRunner().invoke(cli, ["run", "my.yaml", "--run", url], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_paths_and_hub_ids_are_no_urls() -> None:
    assert not any(map(is_remote, ("owner/name", "/a/b", "~/a", "a.jsonl", "module:function", "./a:b", "C:/a")))
    assert all(map(is_remote, ("s3://bucket/a", "gs://bucket", "memory://a/b", "s3:/bucket/a")))
