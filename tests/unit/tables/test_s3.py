"""S3 as a server speaks it (moto's, on loopback): what is read, what is put, and what goes wrong on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from can_dist.config import DataSource
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.stages.ingest import source_identity
from can_dist.tables.foreign.formats import read_prompts
from can_dist.tables.remote import check_absent, local_copy, put_directory

WHY = "s3fs and moto are not among the pinned packages: `make test-s3` runs this"
s3fs = pytest.importorskip("s3fs", reason=WHY)
moto_server = pytest.importorskip("moto.server", reason=WHY)
ROWS = "".join(json.dumps({"prompt": f"tell me {number}"}) + "\n" for number in range(20))
# the libraries' own
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()  # of earlier tests
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: Any) -> Any:
    """Another client of the store, with a bucket in it."""
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.pipe_file("bucket/data/prompts.jsonl", ROWS.encode())
    return files


def test_a_file_and_a_folder_are_read_and_known_as_local_ones(bucket: Any, tmp_path: Path) -> None:
    local = tmp_path / "prompts.jsonl"
    local.write_text(ROWS)
    for url in ("s3://bucket/data/prompts.jsonl", "s3://bucket/data"):
        assert read_prompts(url).table == read_prompts(local).table
    url = "s3://bucket/data/prompts.jsonl"
    assert source_identity(DataSource(source=url)) == source_identity(DataSource(source=str(local)))


def test_a_new_version_is_seen_by_the_same_process(bucket: Any) -> None:
    assert (local_copy("s3://bucket/data") / "prompts.jsonl").read_text() == ROWS
    bucket.pipe_file("bucket/data/prompts.jsonl", b'{"prompt": "new"}\n')
    assert (local_copy("s3://bucket/data") / "prompts.jsonl").read_text() == '{"prompt": "new"}\n'


def test_a_policy_is_put_whole_and_its_name_is_then_taken(bucket: Any, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "sub/README.md"):
        (tmp_path / "policy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "policy" / name).write_text(name)
    check_absent("s3://bucket/models/mine")
    put_directory(tmp_path / "policy", "s3://bucket/models/mine")
    assert bucket.cat_file("bucket/models/mine/sub/README.md") == b"sub/README.md"
    with pytest.raises(ConfigError, match=r"--out s3://bucket/models/mine: already exists"):
        check_absent("s3://bucket/models/mine")


@pytest.mark.parametrize("url", ["s3://bucket/data/none.jsonl", "s3://no-bucket/prompts.jsonl", "s3://no-bucket"])
def test_no_such_file_or_bucket_is_named(bucket: Any, url: str) -> None:
    with pytest.raises(DataError, match=f"{url}: no such file"):
        read_prompts(url)


def test_no_bucket_to_put_into_is_named(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises((DataError, EnvironmentProblem), match=r"s3://no-bucket/mine \(config.json\): .*bucket"):
        put_directory(tmp_path / "policy", "s3://no-bucket/mine")


def test_a_server_that_is_gone_is_named(bucket: Any, server: Any) -> None:
    server.stop()
    with pytest.raises(EnvironmentProblem, match=r"s3://bucket/data/prompts.jsonl: the store failed"):
        read_prompts("s3://bucket/data/prompts.jsonl")


def test_a_store_that_wants_credentials_is_named(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(EnvironmentProblem, match=r"the store failed \(.*[Cc]redentials"):
        read_prompts("s3://bucket/data/prompts.jsonl")
