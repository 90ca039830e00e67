"""`fluxmesh generate` as a process that is struck: followed by its JSON lines up to a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.request import GenerateRequest
from tests.faults.mesh import LIMIT, Up
from tests.faults.strike import STEPS, Moment, request_of

# The command on a disk that takes a second to sync: a file is being written for long enough. It
# hears Ctrl-C also where its parent was started by a shell that runs it in the background.
SLOW_DISK = """\
import signal, sys, time
from fluxmesh.storage import durable
signal.signal(signal.SIGINT, signal.default_int_handler)
sync = durable.sync
durable.sync = lambda handle: (time.sleep(1.0), sync(handle))[1]
from fluxmesh_coordinator.cli import main
main(sys.argv[1:])
"""


class Ended(AssertionError):
    """A command was done before it could be struck."""


@dataclass
class Command:
    """One that runs."""

    process: subprocess.Popen[bytes]
    folder: Path  # where it writes
    told: Callable[[dict[str, Any]], object] = lambda line: None  # hears every line

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it tells, one event after another, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            read = json.loads(line)
            self.told(read)
            yield read

    def until(self, moment: Moment | str, steps: int = STEPS) -> None:
        """Reads on until `moment`, a name of `strike.MOMENTS` or of an event, is there.

        Raises `Ended` where it never comes.
        """
        for line in self.lines():
            if _is_moment(moment, line, steps):
                break
        else:
            raise Ended(f"it ended before {moment}: {self.process.wait()}")
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
    up: Up, folder: Path, placement: Placement, request: GenerateRequest | None = None
) -> Iterator[Command]:
    """`request`, or that of `strike.request_of`, by the command line; files go to `folder`."""
    folder.mkdir(exist_ok=True)
    asked = request or request_of(up.model)
    arguments: list[object] = ["generate", asked.prompt, "--seed", asked.seed, "--save-raw"]
    arguments += ["--model", asked.model, "--dtype", asked.dtype, "--n-images", asked.n_images]
    arguments += ["--image-size", f"{asked.height}x{asked.width}", "--steps", asked.steps]
    arguments += ["--placement", placement, "--json", "-o", folder]
    arguments += conditions(up.folder, asked)
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


def conditions(folder: Path, request: GenerateRequest) -> list[object]:
    """Options for what a request gives beside a prompt; its pictures are written to `folder`."""
    options: list[object] = []
    named = [("--reference", picture) for picture in request.references]
    named += [] if request.control is None else [("--control", request.control)]
    if (source := request.source) is not None:
        named += [("--image", source.pixels)]
        named += [] if source.mask is None else [("--mask", source.mask)]
        options += ["--strength", source.strength]
    for number, (option, pixels) in enumerate(named):
        path = folder / f"given-{number}.png"
        Image.fromarray(pixels).save(path)
        options += [option, path]
    if request.negative is not None:
        options += ["--negative-prompt", request.negative, "--cfg", request.cfg]
    return options


def _is_moment(moment: str, line: dict[str, Any], steps: int) -> bool:
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
            done = {"middle": steps // 2, "last": steps - 1, "decode": steps}[moment]
            return bool(line["event"] == "step" and line["step"] == done)
    return bool(line["event"] == moment)
