"""Jobs on a mesh of this machine, each with a random fault: none may be lost, wrong or hung.

    python -m tools.chaos --jobs 300 --seed 1 --hosts 3
    python -m tools.chaos --family flux2       # a random model of FLUX.2; --model PATH: that one
    python -m tools.chaos --family base        # one that is guided away from a negative prompt
    python -m tools.chaos --clean 500          # no faults: no alarm, no leak, cheap control

A job has a random placement, size and number of images and steps. Every other one gives what its
model takes beside a prompt: references, a map, a negative prompt; every fourth paints over a part
of a picture. Its fault is a SIGKILL or a
SIGSTOP (and later a SIGCONT) of an engine, an agent or the coordinator, or a Ctrl-C, at a random
moment. Whoever can finish must finish, with the pictures that one host makes alone; a job whose
coordinator died or was interrupted is done once more by another. In the end no process, port or
temporary folder of the mesh is left. The same seed gives the same faults. Stands on
`tests/faults`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.events import Event, Queued
from fluxmesh.request import GenerateRequest
from tests.alone import painted_alone
from tests.faults import commands, strike
from tests.faults.mesh import Outcome, Up, paint, up
from tests.faults.strike import Fault, Moment, allowed, difference, is_moment, request_of, wake
from tools import endurance

DELAYS = "step=0.15,encode=0.1,decode=0.15,load=0.1"  # so that a moment can be hit
SIZES = ((32, 32), (32, 48), (64, 48))
MOMENTS: tuple[Moment, ...] = ("load", "encode", "first", "middle", "last", "decode", "save")
WAKE = 7.0  # seconds after which what was stopped goes on: by then it counts as dead
HUNG = 90.0  # seconds in which a job that hangs tells nothing
ENDLESS = 900.0  # seconds after which a job hangs whatever it tells
OUT = Console()


@dataclass(frozen=True)
class Trial:
    """One job, and what is done to it."""

    number: int
    request: GenerateRequest
    placement: Any
    victim: str  # "engine", "agent" or "coordinator"
    rank: int
    moment: Moment
    kind: str  # "kill", "stop" or "interrupt"

    def __str__(self) -> str:
        asked = self.request
        who = self.victim if self.victim == "coordinator" else f"{self.victim} {self.rank}"
        return (
            f"{self.number:3} {self.kind} {who} at {self.moment}, {self.placement}, "
            f"{asked.n_images} of {asked.height}x{asked.width} in {asked.steps}"
            f"{''.join(f', {given}' for given in asked.conditions)}"
            f"{', a mask' if asked.source is not None else ''}"
        )


@dataclass
class ChaosResult:
    trial: Trial
    verdict: str  # "right", or what went wrong
    seconds: float
    was_hit: bool  # the moment came
    alarms: int  # losses that were told


def trials(
    jobs: int, seed: int, hosts: int, model: str, kind: strike.ModelKind = "flux1"
) -> Iterator[Trial]:
    """What `seed` gives; `kind` says what the model takes beside a prompt."""
    draw = random.Random(seed)
    for number in range(jobs):
        height, width = draw.choice(SIZES)
        given = strike.conditions(kind, number) if number % 2 else {}
        if number % 4 == 2 and kind != strike.TOOL:
            given["source"] = strike.painted_over(height, width, number)
        request = request_of(
            model,
            **given,
            n_images=draw.randint(1, hosts + 1),
            height=height,
            width=width,
            steps=draw.randint(2, 5),
        )
        victim = draw.choice(("engine", "engine", "agent", "agent", "coordinator"))
        kinds = ("kill", "interrupt") if victim == "coordinator" else ("kill", "stop")
        yield Trial(
            number,
            request,
            draw.choice(("data", "tensor", "sequence")),
            victim,
            draw.randrange(hosts),
            draw.choice(MOMENTS),
            draw.choice(kinds),
        )


class Chaos:
    """Trials on one mesh."""

    def __init__(self, mesh: Up) -> None:
        self.up = mesh
        self.pipeline = FluxPipeline(mesh.model, dtype="float32")  # one machine that nobody hurts
        self._alone: dict[Any, dict[int, np.ndarray]] = {}

    def alone(self, request: GenerateRequest) -> dict[int, np.ndarray]:
        key = replace(request, source=None), _given(request)
        if key not in self._alone:
            self._alone[key] = dict(enumerate(painted_alone(request, self.pipeline)))
        return self._alone[key]

    def run(self, trial: Trial) -> ChaosResult:
        """Does one job, and judges it."""
        with JobWatchdog(self.up) as dog:
            if trial.victim == "coordinator":
                result = self._hurt_coordinator(trial, dog)
            else:
                result = self._hurt_host(trial, dog)
        return replace(result, verdict="hung") if dog.has_barked else result

    def _hurt_host(self, trial: Trial, dog: JobWatchdog) -> ChaosResult:
        number = signal.SIGKILL if trial.kind == "kill" else signal.SIGSTOP
        fault = Fault(trial.placement, trial.moment, trial.victim, trial.rank, number)  # type: ignore[arg-type]
        steps = trial.request.steps or 1
        hit: list[int] = []
        naps: list[threading.Timer] = []

        def look(event: Event) -> None:
            dog.hear(isinstance(event, Queued))
            if hit or not is_moment(fault.moment, event, steps):
                return
            try:
                hit.append(self.up.pid(fault.victim, fault.rank))
                os.kill(hit[0], number)
            except (ProcessLookupError, FileNotFoundError):
                return  # nobody has needed it since it was killed last
            if number == signal.SIGSTOP:
                naps.append(threading.Timer(WAKE, wake, hit))
                naps[0].start()

        with self.up.connect() as mesh:
            for rank in range(len(self.up.ports)):
                self.up.status(mesh, rank)
            outcome = paint(mesh, trial.request, trial.placement, look)
        for nap in naps:
            nap.join()
        return self._judge(trial, outcome, bool(hit))

    def _judge(self, trial: Trial, outcome: Outcome, was_hit: bool) -> ChaosResult:
        verdict = "right"
        if outcome.error is not None:
            verdict = f"lost: {outcome.error}"
        elif len(outcome.pictures) != trial.request.n_images:
            verdict = f"lost: {len(outcome.pictures)} of {trial.request.n_images} pictures"
        elif difference(self.alone(trial.request), outcome.pictures) > allowed(trial.placement):
            verdict = "wrong"
        return ChaosResult(trial, verdict, outcome.seconds, was_hit, len(outcome.lost))

    def _hurt_coordinator(self, trial: Trial, dog: JobWatchdog) -> ChaosResult:
        """A `fluxmesh generate` process; then another one does the job."""
        asked, began = trial.request, time.monotonic()
        number = signal.SIGKILL if trial.kind == "kill" else signal.SIGINT
        with tempfile.TemporaryDirectory(dir=self.up.folder) as name:
            folder = Path(name)
            verdict, was_hit = "right", True
            with commands.generate(self.up, folder, trial.placement, asked) as command:
                command.told = lambda line: dog.hear(line["event"] == "queued")
                try:
                    command.until(trial.moment, asked.steps or 1)
                except commands.Ended:
                    was_hit = False
                else:
                    took = command.end(number)
                    if trial.kind == "interrupt" and command.process.returncode != 130:
                        verdict = f"wrong: exit code {command.process.returncode} after {took:.1f}"
            if not self._right(trial, folder):
                verdict = "wrong: a file of the coordinator that ended"
            outcome = self._again(trial, dog)
            if verdict == "right":
                return replace(
                    self._judge(trial, outcome, was_hit), seconds=time.monotonic() - began
                )
            return ChaosResult(trial, verdict, time.monotonic() - began, was_hit, len(outcome.lost))

    def _again(self, trial: Trial, dog: JobWatchdog) -> Outcome:
        with self.up.connect() as mesh:
            look = lambda event: dog.hear(isinstance(event, Queued))  # noqa: E731
            return paint(mesh, trial.request, trial.placement, look)

    def _right(self, trial: Trial, folder: Path) -> bool:
        """Whether every file is a whole and right picture."""
        pictures = {}
        for path in folder.glob("*.png"):
            with Image.open(path) as picture:
                pictures[int(path.name.split(".")[1])] = np.array(picture)
        if not pictures:
            return True
        return difference(self.alone(trial.request), pictures) <= allowed(trial.placement)


def _given(request: GenerateRequest) -> tuple[bytes, ...]:
    """All pictures of a request, which have no hash."""
    pictures = [*request.references, request.control]
    if request.source is not None:
        pictures += [request.source.pixels, request.source.mask]
    return tuple(b"" if picture is None else picture.tobytes() for picture in pictures)


@dataclass
class Patience:
    """When a job hangs: it tells nothing for too long, or never ends. All times in seconds.

    On a loaded machine a job takes minutes, and is no less alive: what it tells counts. A job that
    waits in line for another tells nothing meanwhile.
    """

    began: float
    heard: float  # when it told something last
    waits: bool = False  # in line

    def hear(self, now: float, waits: bool) -> None:
        self.heard, self.waits = now, waits

    def is_over(self, now: float) -> bool:
        return now - self.began > ENDLESS or (not self.waits and now - self.heard > HUNG)


class JobWatchdog:
    """Ends all processes of the mesh when a job hangs, so that it ends: it has barked then.

    Where that does not end it, this process ends.
    """

    def __init__(self, mesh: Up) -> None:
        self.mesh, self.has_barked = mesh, False
        self._over = threading.Event()
        self._patience = Patience(time.monotonic(), time.monotonic())
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def hear(self, waits: bool = False) -> None:
        """The job has told something; `waits`: that it waits in line."""
        self._patience.hear(time.monotonic(), waits)

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if self._patience.is_over(time.monotonic()):
                self.has_barked = True
                for pid in self.mesh.processes():
                    os.kill(pid, signal.SIGKILL)
                if not self._over.wait(HUNG):
                    os._exit(3)
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def table(results: Sequence[ChaosResult]) -> Table:
    """What was done to the jobs, and what came of them."""
    shown = Table("fault", "jobs", "hit", "right", "losses told", "median s", "longest s")
    kinds = sorted({(result.trial.kind, result.trial.victim) for result in results})
    for kind, victim in [*kinds, ("all", "")]:
        rows = [
            result
            for result in results
            if kind == "all" or (kind, victim) == (result.trial.kind, result.trial.victim)
        ]
        seconds = [result.seconds for result in rows]
        shown.add_row(
            f"{kind} {victim}",
            str(len(rows)),
            str(sum(result.was_hit for result in rows)),
            str(sum(result.verdict == "right" for result in rows)),
            str(sum(result.alarms for result in rows)),
            f"{statistics.median(seconds):.1f}",
            f"{max(seconds):.1f}",
        )
    return shown


def left_behind(folder: Path, ports: Sequence[int]) -> list[str]:
    """What a mesh that is down has left: ports in use, temporary files."""
    left = [str(path) for path in (folder / "tmp").glob("fluxmesh-*")]  # MLX keeps kernels there
    for port in ports:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                left.append(f"port {port}")
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where every job was right and nothing is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--clean", type=int, default=0, metavar="N", help="N jobs without faults")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--family", choices=strike.MODEL_KINDS, default="flux1")
    which.add_argument("--model", help="a name, a folder or a file, and not one made up")
    asked = parser.parse_args(arguments)
    results: list[ChaosResult] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        model = asked.model or strike.make_kind(folder / "model", asked.family)
        kind = "flux1" if asked.model else asked.family  # nobody knows what it takes
        delays = "" if asked.clean else DELAYS
        began = time.monotonic()
        with up(
            folder / "mesh", asked.hosts, model, delays=delays, TMPDIR=str(folder / "tmp")
        ) as mesh:
            took = time.monotonic() - began
            OUT.print(
                f"{asked.hosts} agents with {asked.model or asked.family}, up in {took:.1f} s"
            )
            if asked.clean:
                report = endurance.run(mesh, asked.clean, asked.seed)
                OUT.print(report.table())
                bad = report.problems()
            else:
                chaos = Chaos(mesh)
                for trial in trials(asked.jobs, asked.seed, asked.hosts, model, kind):
                    results.append(chaos.run(trial))
                    result = results[-1]
                    hit = "" if result.was_hit else ", not hit"
                    OUT.print(
                        f"{trial}: {result.verdict}, {result.seconds:.1f} s{hit}", highlight=False
                    )
                OUT.print(table(results))
                bad = [
                    f"{result.trial}: {result.verdict}"
                    for result in results
                    if result.verdict != "right"
                ]
        bad += [f"left behind: {what}" for what in left_behind(folder, mesh.ports)]
    for line in bad:
        OUT.print(line, highlight=False, soft_wrap=True)
    OUT.print("Something is wrong." if bad else "All is right, and nothing is left.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
