"""`fluxmesh generate` as a process that is struck: followed by its JSON lines up to a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.cluster import Placement
from tests.faults.mesh import LIMIT, Up
from tests.faults.strike import STEPS, Moment

# The command on a disk that takes a second to sync: a file is being written for long enough.
SLOW_DISK = """\
import os, sys, time
sync = os.fsync
os.fsync = lambda handle: (time.sleep(1.0), sync(handle))[1]
from fluxmesh_coordinator.cli import main
main(sys.argv[1:])
"""


@dataclass
class Command:
    """One that runs."""

    process: subprocess.Popen[bytes]
    folder: Path  # where it writes

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it tells, one event after another, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, moment: Moment | str) -> None:
        """Reads on until `moment`, a name of `strike.MOMENTS` or of an event, is there."""
        for line in self.lines():
            if _is_moment(moment, line):
                break
        else:
            raise AssertionError(f"it ended before {moment}: {self.process.wait()}")
        if moment == "save":
            end = time.monotonic() + LIMIT
            while not self.unfinished():
                assert time.monotonic() < end, "no file is being written"
                time.sleep(0.01)

    def end(self, number: int) -> float:
        """Sends a signal; seconds until the process is gone."""
        began = time.monotonic()
        os.kill(self.process.pid, number)
        self.process.wait(LIMIT)
        return time.monotonic() - began

    def unfinished(self) -> list[Path]:
        """Files that are being written, or were left so."""
        return [path for path in self.folder.iterdir() if path.suffix != ".png"]

    def pictures(self) -> list[Path]:
        return sorted(self.folder.glob("*.png"))


@contextmanager
def generate(
    up: Up, folder: Path, placement: Placement, *options: object, images: int = 2
) -> Iterator[Command]:
    """The job of `strike.request_of`, by the command line; files go to `folder`."""
    folder.mkdir(exist_ok=True)
    arguments = ["generate", "two dogs", "--model", up.model, "--dtype", "float32", "--seed", 5]
    arguments += ["--image-size", "32x48", "--steps", STEPS, "--n-images", images, "--save-raw"]
    arguments += ["--placement", placement, "--json", "-o", folder, *options]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *map(str, arguments)],
        env=up.env,
        cwd=up.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=open(up.folder / "stderr.txt", "wb"),  # noqa: SIM115 - the process keeps it
    )
    try:
        yield Command(process, folder)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _is_moment(moment: str, line: dict[str, Any]) -> bool:
    """As `strike.is_moment`, for a line of `--json`."""
    match moment:
        case "load":
            return bool(line["event"] == "loading")
        case "encode":
            return bool(line["event"] == "planned")
        case "first":
            return bool(line["event"] == "encoded")
        case "save":
            return bool(line["event"] == "picture")
        case "middle" | "last" | "decode":
            done = {"middle": STEPS // 2, "last": STEPS - 1, "decode": STEPS}[moment]
            return bool(line["event"] == "step" and line["step"] == done)
    return bool(line["event"] == moment)
