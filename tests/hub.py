"""A small server that speaks as much of the Hub's protocol as its own client needs to read a model repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    """Serves ``root/<user>/<repo>/<file>`` under the revisions main, v1 and COMMIT."""

    def __init__(self, *args, root: Path, log: list[str], **kwargs) -> None:
        self.root, self.log = root, log
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_args) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.log.append(self.path)
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:])
        elif len(parts) > 4 and parts[2] == "resolve" and parts[3] in ("main", "v1", COMMIT):
            self._file(self.root.joinpath(*parts[:2], *parts[4:]), body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str]) -> None:
        folder = self.root.joinpath(*parts[:2])
        files = sorted(path for path in folder.iterdir()) if folder.is_dir() else []
        if not files:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts[2:3] == ["tree"]:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            self._send(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": path.name} for path in files]
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(info).encode())

    def _file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = path.read_bytes()
        self._send(200, content, {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT}, body=body)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories below a folder on the loopback address; yields the endpoint and the paths asked for."""
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root=root, log=log))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
