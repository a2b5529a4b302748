"""A server on this machine that speaks the Hub's API as far as publishing and downloading take, or breaks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".zip")


@dataclass
class Hub:
    """What the server holds, and how it misbehaves. ``requests`` lists "METHOD path". ``busy`` names a file whose
    content is refused once; ``refuse`` is a status with headers for everything; ``page`` sends HTML for lists."""

    files: dict[str, bytes] = field(default_factory=dict)
    exists: bool = False
    private: bool | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    truncate: str = ""
    busy: str = ""
    corrupt: str = ""
    fail_uploads_after: int | None = None
    evil_name: str = ""
    refuse: tuple[int, dict[str, str]] | None = None
    page: bool = False
    endpoint: str = ""

    @property
    def commit(self) -> str:
        return hashlib.sha1("".join(self.commits).encode(), usedforsecurity=False).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def entry(name: str, data: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
    if name.endswith(LARGE):
        described["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return described


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body after its head waits for 40 ms

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuse is not None:
            self.answer({"error": "refused"}, self.hub.refuse[0], **self.hub.refuse[1])
        elif self.hub.page and path.startswith("/api/"):
            self.answer(b"<html>Hello</html>")
        elif not self.hub.exists:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            listed = [entry(name, data) for name, data in sorted(self.hub.files.items())]
            if self.hub.evil_name:
                listed.append(entry(self.hub.evil_name, b"x"))
            self.answer(listed)
        elif path.startswith("/api/models/"):
            self.answer(
                {
                    "_id": "1",
                    "id": "maker/model",
                    "sha": self.hub.commit,
                    "siblings": [{"rfilename": name} for name in sorted(self.hub.files)],
                    "tags": [],
                    "private": True,
                }
            )
        elif "/resolve/" in path:
            self.file(path.split("/resolve/")[1].split("/", 1)[1])
        else:
            self.answer({"error": "unknown"}, 404)

    def file(self, name: str) -> None:
        if name not in self.hub.files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        if name == self.hub.busy and self.command == "GET":
            self.hub.busy = ""
            self.answer({"error": "busy"}, 503)
            return
        data = self.hub.files[name]
        tag = entry(name, data).get("lfs", {}).get("oid") or blob(data)
        if name == self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": self.hub.commit, "Accept_Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if name == self.hub.truncate and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(data[start:], 206 if start else 200, **headers)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        data = self.body()
        if path == "/api/repos/create":
            asked = json.loads(data)
            self.hub.private = asked.get("private") is True or asked.get("visibility") == "private"
            status = 409 if self.hub.exists else 200
            self.hub.exists = True
            self.answer({"url": f"{self.hub.endpoint}/maker/model", "id": "1", "name": "maker/model"}, status)
        elif "/preupload/" in path:
            names = [item["path"] for item in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            answers = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer({"files": answers})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(data)["objects"])
        elif "/commit/" in path:
            self.receive([json.loads(line) for line in data.splitlines()])
        else:
            self.answer({"error": "unknown"}, 404)

    def batch(self, asked: list[dict[str, Any]]) -> None:
        objects = []
        for item in asked:
            action = {"upload": {"href": f"{self.hub.endpoint}/upload/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": action})})
        self.answer({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        data = self.body()
        if self.hub.fail_uploads_after is not None and len(self.hub.objects) >= self.hub.fail_uploads_after:
            self.answer({"error": "broken"}, 400)
            return
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer(b"")

    def receive(self, lines: list[dict[str, Any]]) -> None:
        import base64

        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.endpoint}/maker/model/commit/{self.hub.commit}"
        self.answer({"success": True, "commitOid": self.hub.commit, "commitUrl": url, "hookOutput": ""})


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of this machine; its ``endpoint`` says which."""
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
