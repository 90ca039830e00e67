"""`fluxmesh serve` in a process of its own, as a user runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

STARTS = 120.0  # seconds
ENDS = 100.0  # more than a server gives what runs


@dataclass
class ServerProcess:
    """One that listens; `url` is where."""

    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def engines(self) -> list[psutil.Process]:
        """Those of the mesh that it began."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in below if any("fluxmesh_agent.engine" in word for word in p.cmdline())]

    def signal(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(ENDS)


@contextmanager
def server(*options: object, environment: dict[str, str], folder: Path) -> Iterator[ServerProcess]:
    """Killed at the end, if it has not ended by then."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "fluxmesh_coordinator", "serve", "--port", "0"]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, *map(str, options)], stderr=file, cwd=folder, env=environment
        )
    try:
        limit = time.monotonic() + STARTS
        while (match := re.search(r"Serving on (\S+);", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.05)
        running = ServerProcess(process, match[1], log)
        limit = time.monotonic() + STARTS
        while not _answers(running.url):
            assert process.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.02)
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=60):
            return True
    except OSError:
        return False
