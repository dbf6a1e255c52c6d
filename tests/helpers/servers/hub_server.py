"""A server that answers as the hub's API does, commits and uploads: for pins, models and data by hub id."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The models and data sets that were asked for, the commits that are answered, and what was uploaded."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}  # by repository
        self.logins: set[str] = set()
        self.stored: dict[str, bytes] = {}  # large files by sha256
        self.files: dict[str, bytes] = {}  # committed, by path

    @staticmethod
    def commit_of(repository: str) -> str:
        """The commit of 'models/owner/name' or 'datasets/owner/name'."""
        return hashlib.sha1(repository.encode(), usedforsecurity=False).hexdigest()

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Make a repository; one that is there keeps its visibility."""
        name = f"{asked['organization']}/{asked['name']}"
        self.private.setdefault(name, asked["visibility"] == "private")
        return {"url": f"{self.url}/{name}"}

    def places(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Say where the content of large files goes."""
        objects = [{**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in asked["objects"]]
        return {"transfer": "basic", "objects": objects}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Take small files from the commit itself, large ones from what was stored."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return {
            "success": True,
            "commitOid": "0" * 40,
            "commitUrl": f"{self.url}/{repository}/commit/0",
            "hookOutput": "",
        }


@contextlib.contextmanager
def serving_hub(status: int = 200) -> Iterator[Hub]:
    """Serve ``/api/models/<id>`` and ``/api/datasets/<id>``, each with a commit of its own, and uploads of models."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository = self.path.partition("?")[0].removeprefix("/api/")
            kind, _, name = repository.partition("/")
            if kind not in ("models", "datasets"):  # the hub's client asks for a registry of its own once a day
                self.send_error(404)
                return
            hub.asked.append(repository)
            private = hub.private.get(name, False)
            self.answer({"_id": "0", "id": name, "sha": hub.commit_of(repository), "private": private, "siblings": []})

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0], self.content()
            hub.logins.add(self.headers["Authorization"])
            if path.endswith("/commit/main"):
                name = path.removeprefix("/api/models/").removesuffix("/commit/main")
                self.answer(hub.commit(name, [json.loads(line) for line in body.splitlines()]))
                return
            asked = json.loads(body)
            if path == "/api/repos/create":
                self.answer(hub.create(asked))
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                large = [one["path"].endswith(".safetensors") for one in asked["files"]]
                modes = [
                    {"path": one["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                    for one, is_large in zip(asked["files"], large, strict=True)
                ]
                self.answer({"files": modes})
            else:
                self.answer(hub.places(asked))

        def do_PUT(self) -> None:
            hub.stored[self.path.removeprefix("/lfs/")] = self.content()
            self.answer({})

        def content(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def answer(self, body: dict[str, Any]) -> None:
            data = json.dumps(body if status == 200 else {"error": "Repository not found"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
