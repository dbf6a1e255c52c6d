"""A server that gives data sets as the hub does, to the real ``datasets``: commits, trees, files.

A data set is a directory; its one commit is the digest of its files, and ``main`` is a name of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


def commit_of(directory: Path) -> str:
    """40 hex digits of the files' names and bytes."""
    digest = hashlib.sha1()
    for path in files_of(directory):
        digest.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return digest.hexdigest()


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@contextlib.contextmanager
def serving_datasets(directories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve directories by hub id; give the address, and every path that was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(with_body=True)

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def respond(self, *, with_body: bool) -> None:
            path, _, query = self.path.partition("?")
            path = unquote(path)
            asked.append(path)
            if path.startswith("/api/datasets/"):
                self.about(path.removeprefix("/api/datasets/"), recursive="recursive=true" in query.lower())
            else:
                self.file(path.removeprefix("/datasets/"), with_body=with_body)

        def about(self, path: str, *, recursive: bool) -> None:
            name = next((name for name in directories if path == name or path.startswith(f"{name}/")), None)
            if name is None:
                self.missing("RepoNotFound")
                return
            directory, commit = directories[name], commit_of(directories[name])
            kind, _, rest = path.removeprefix(name).removeprefix("/").partition("/")
            revision, _, folder = rest.partition("/")
            if kind in ("tree", "revision") and revision not in ("main", commit):
                self.missing("RevisionNotFound")
            elif kind == "tree":
                self.answer(tree(directory, folder, recursive=recursive))
            else:
                siblings = [{"rfilename": entry["path"]} for entry in tree(directory, "", recursive=True)]
                self.answer({"_id": "0", "id": name, "sha": commit, "private": False, "siblings": siblings})

        def file(self, path: str, *, with_body: bool) -> None:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            source = directories[name] / file if name in directories else None
            if source is None or not source.is_file() or revision not in ("main", commit_of(directories[name])):
                self.missing("EntryNotFound")
                return
            data = source.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit_of(directories[name]))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tree(directory: Path, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder as the hub lists them."""
    made: list[dict[str, Any]] = []
    for path in sorted((directory / folder).rglob("*") if recursive else (directory / folder).iterdir()):
        entry: dict[str, Any] = {"path": str(path.relative_to(directory)), "oid": "0" * 40, "size": 0}
        if path.is_file():
            data = path.read_bytes()
            entry |= {"type": "file", "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        else:
            entry["type"] = "directory"
        made.append(entry)
    return made
