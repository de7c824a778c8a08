"""A Hugging Face hub of one repository in memory, for the library's own client to talk to."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40
REPOSITORY = "me/model"


class Hub(BaseHTTPRequestHandler):
    """The requests of creating, pushing to and pulling from a repository."""

    files: dict[str, bytes]
    api = f"/api/models/{REPOSITORY}"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def reply(self, value: Any, code: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://{self.headers['Host']}/{REPOSITORY}"
        if self.path == "/api/repos/create":
            self.reply({"url": place})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif self.path == f"{self.api}/preupload/main":
            names = [file["path"] for file in json.loads(data)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply({"files": [{"path": name, **plain} for name in names]})
        elif self.path == f"{self.api}/commit/main":
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{place}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.reply({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        resolved = f"/{REPOSITORY}/resolve/{COMMIT}/"
        name = self.path.removeprefix(resolved)
        if self.path == f"{self.api}/revision/main":
            self.reply({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif self.path.startswith(f"{self.api}/tree/{COMMIT}"):
            self.reply([{"type": "file", "path": name, **of(x)} for name, x in self.files.items()])
        elif name in self.files:
            content = self.files[name]
            self.reply(content, ETag=f'"{of(content)["oid"]}"', X_Repo_Commit=COMMIT)
        else:
            self.reply({"error": "unknown"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def of(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and the files that it holds."""
    files: dict[str, bytes] = {}
    handler = type("OneHub", (Hub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
