"""A stand-in of the hub on this machine: repositories in memory, and as much of its API as pushing and loading take.

Weights go the way of large files (git-LFS's batch API), everything else inside the commit, as on the hub without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Hub", "stand_in"]


class Hub:
    """Repositories (id → file name → bytes), the objects that were uploaded beside commits, and the address."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.url = ""


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub that answers as long as this lasts; give a process its address as `HF_ENDPOINT`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def absent(self, what: str) -> None:
        self.answer({"error": what}, 404, X_Error_Code=what)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, body, hub = self.path.partition("?")[0], self.body(), self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = repo in hub.repositories
            hub.repositories.setdefault(repo, {})
            return self.answer({"url": f"{hub.url}/{repo}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.answer({"files": files})
        if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.url}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer({"objects": objects, "transfer": "basic"})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            files = hub.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            return self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{found[1]}/commit/{'0' * 40}"})
        return self.absent("EntryNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.objects[self.path.rpartition("/")[2]] = content
        self.answer(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+|(/tree/[^/]+)(/.*)?)?", path):
            files = self.hub.repositories.get(found[1])
            if files is None:
                return self.absent("RepoNotFound")
            if found[2]:
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
                return self.answer([] if found[3] else entries)
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": found[1], "sha": "0" * 40, "siblings": siblings, "tags": [], "private": False})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.hub.repositories.get(found[1])
            if files is None or found[2] not in files:
                return self.absent("RepoNotFound" if files is None else "EntryNotFound")
            digest = hashlib.sha256(files[found[2]]).hexdigest()
            return self.answer(files[found[2]], ETag=f'"{digest}"', X_Repo_Commit="0" * 40)
        return self.absent("EntryNotFound")

    do_HEAD = do_GET
