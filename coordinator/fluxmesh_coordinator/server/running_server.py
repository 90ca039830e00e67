"""Which server of this user runs: for `fluxmesh status`, which shows its line too."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home, home_folder, read_private, write_private

NAME = "serve.json"


@contextlib.contextmanager
def recorded(home: Home, url: str, key_file: Path | None) -> Iterator[None]:
    """Written down as long as the block lasts. Raises `HomeError`."""
    path = home.folder / NAME
    record = {"url": url, "pid": os.getpid(), "key_file": key_file and str(key_file.absolute())}
    write_private(path, json.dumps(record))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, FluxmeshError, ValueError):
            if json.loads(read_private(path)).get("pid") == os.getpid():
                path.unlink()


def line() -> tuple[str, list[dict[str, Any]]] | None:
    """The address of the server that runs, and its jobs; None: there is none, or it is silent."""
    try:
        record = json.loads(read_private(home_folder() / NAME))
        request = urllib.request.Request(f"{_reachable(record['url'])}/api/status")
        if record.get("key_file"):
            key = read_private(Path(record["key_file"])).strip()
            request.add_header("Authorization", f"Bearer {key}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=DEADLINES.own_server) as answer:
            return record["url"], json.load(answer)["queue"]
    except (OSError, http.client.HTTPException, FluxmeshError, ValueError, KeyError, TypeError):
        return None  # another program may have its port by now


def _reachable(url: str) -> str:
    """Who listens on every address is asked on loopback."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
