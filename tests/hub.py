"""A small server that speaks as much of the Hub's protocol as its own client needs for a model repository.

Reading; and uploads, small files in the commit, safetensors through LFS, README.md checked as the Hub checks it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    """Serves ``root/<user>/<repo>/<file>`` under the revisions main, v1 and COMMIT; repositories are private, or "public"."""

    def __init__(self, *args, root: Path, log: list[str], **kwargs) -> None:
        self.root, self.log = root, log
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        """Create a repository, validate a card, say how files are uploaded, commit."""
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.log.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            if asked["organization"] == "others":
                self._send(403, b"", {"X-Error-Message": "You don't have the rights to create a model under others"})
                return
            folder = self.root.joinpath(asked["organization"], asked["name"])
            known = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            url = f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"
            self._send(409 if known else 200, json.dumps({"url": url}).encode())
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": _card_warnings(json.loads(body)["content"])})
        elif parts[4:5] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            self._json({"files": files})
        elif parts[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            for found in objects:
                found["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{found['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["commit"]:
            self._commit(self.root.joinpath(*parts[2:4]), [json.loads(line) for line in body.splitlines()])
            self._json(
                {"commitUrl": f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{COMMIT}"}
                | {"commitOid": COMMIT}
            )
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        """An LFS object."""
        path = self.root.parent / "lfs" / urlsplit(self.path).path.rsplit("/", 1)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(200, b"")

    def _commit(self, folder: Path, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                lfs = line["key"] == "lfsFile"
                content = (
                    (self.root.parent / "lfs" / value["oid"]).read_bytes()
                    if lfs
                    else base64.b64decode(value["content"])
                )
                assert not lfs or hashlib.sha256(content).hexdigest() == value["oid"]
                path.write_bytes(content)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_args) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.log.append(self.path)
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:])
        elif not self.root.joinpath(*parts[:2]).is_dir():
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})  # private ones too, as the Hub does
        elif len(parts) > 4 and parts[2] == "resolve" and parts[3] in ("main", "v1", COMMIT):
            self._file(self.root.joinpath(*parts[:2], *parts[4:]), body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str]) -> None:
        folder = self.root.joinpath(*parts[:2])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts[2:] == ["auth-check", "write"]:
            self._send(403 if parts[0] == "others" else 200, b"")
        elif parts[2:3] == ["tree"]:
            tree = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _etag(f)}
                for f in files
            ]
            self._send(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            info = {
                "id": "/".join(parts[:2]),
                "sha": COMMIT,
                "siblings": siblings,
                "private": parts[1] != "public",
                "tags": [],
            }
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
        if body and self.command != "HEAD":
            self.wfile.write(content)


def _card_warnings(content: str) -> list[dict[str, str]]:
    """The Hub warns of cards without metadata."""
    metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
    return [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]


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


def run_there(tmp_path, *command, **more):
    """Run a command with its own client's cache against a server of tmp_path / "hub"."""
    with serve_hub(tmp_path / "hub") as (endpoint, asked):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, check=False
        )
    return done, asked
