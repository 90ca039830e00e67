"""A Hub of our own on loopback: a listing, files from any byte on, and every way to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMITS = ("a" * 40, "b" * 40)
CUT = "transformer/diffusion_pytorch_model.safetensors"


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    repos: dict[str, Path] = field(default_factory=dict)
    commit: str = COMMITS[0]
    gated: bool = False
    listing_status: int = 200
    cut: int = 0  # times that the file CUT breaks off half-way
    sha256: str | None = None  # told instead of the true one
    knows_ranges: bool = True
    fetched: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)  # files whose first bytes alone were asked for
    ranges: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # set on a subclass for each server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path)
        if listing:
            self.listing(listing[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.file(match[1], unquote(match[3]))
        else:
            self.refuse(404, "")

    def listing(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self.refuse(401, "RepoNotFound")
            return
        if self.hub.listing_status != 200:
            self.refuse(self.hub.listing_status, "")
            return
        root = self.hub.repos[repo]
        siblings = []
        for file in sorted(root.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                name = file.relative_to(root).as_posix()
                entry: dict[str, object] = {"rfilename": name, "size": len(content)}
                if file.suffix == ".safetensors":
                    digest = self.hub.sha256 or hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 100}
                siblings.append(entry)
        answer = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings}
        self.answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, name: str) -> None:
        if self.hub.gated:
            self.refuse(401, "GatedRepo")
            return
        content = (self.hub.repos[repo] / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        first = re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", ""))
        if first and not self.hub.knows_ranges:
            self.answer(content, headers)
            return
        if first:
            self.hub.heads.append(name)
            self.answer(content[: int(first[1]) + 1], headers, 206)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if self.command == "GET":
            self.hub.fetched.append(name)
            if wanted:
                self.hub.ranges.append(name)
        part = content[start:]
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name == CUT and self.hub.cut > 0:
            self.hub.cut -= 1
            self.answer(part, headers, 206 if wanted else 200, send=len(part) // 2)
            return
        self.answer(part, headers, 206 if wanted else 200)

    def answer(
        self, body: bytes, headers: dict[str, str], status: int = 200, send: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        if send is not None:  # hang up in the middle
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}, status)

    def log_message(self, *_: object) -> None:
        """Tests print nothing."""


@contextmanager
def serving(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub's library, and commands of this user, ask this one; their cache is empty."""
    handler = type("Bound", (Handler,), {"hub": hub})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{http.server_port}"
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.setenv("FLUXMESH_STATE", str(cache.parent / "state"))
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL", "HF_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(variable, raising=False)
    patch.setattr("time.sleep", lambda seconds: None)  # the library waits between retries
    yield hub
    http.shutdown()
    http.server_close()
