"""What `fluxmesh serve` adds to a picture, over what the mesh takes for it by itself.

The same picture is asked of the server and, by this program, of the mesh: same prompt and seed,
size, steps and placement, on the same warm engines. Below `serve_load.py`, which has the server.

One at a time: in turns, first by the one, then by the other, and the other way round in the next
turn, so that what else the machine does falls on both. What the turns differ by, in the middle, is
the server's. Processor time is that of the server's process and of this one's.

With all hosts at work: as many clients as there are, against one job after the other on each host.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2
import psutil

from fluxmesh.events import Picture
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.commands.generate import Painter, Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.runtime.lent_hosts import HostBook, LentHosts
from tests.server_process import ServerProcess
from tools.serve_clients import PROMPT, SIDE, STEPS

# The first ones of a turn are not counted: the hosts come over from the other one, which has to let
# go of them, and what it had measured is read.
TURNS, A_TURN, UNCOUNTED = 8, 8, 2


@dataclass(frozen=True)
class Turn:
    """Some requests one after another, of one side."""

    seconds: float  # the median request
    cpu: float  # seconds of the processor a request, of the process that asks the mesh


@dataclass(frozen=True)
class Overhead:
    """The turns of both sides, as they followed each other."""

    served: tuple[Turn, ...]
    direct: tuple[Turn, ...]

    @property
    def seconds(self) -> float:
        """A request, in the middle of the turns' differences."""
        return self._between(lambda turn: turn.seconds)

    @property
    def cpu(self) -> float:
        """The same in seconds of the processor."""
        return self._between(lambda turn: turn.cpu)

    def sentence(self) -> str:
        """Both, and what they were taken from."""

        def middle(turns: Iterable[Turn]) -> str:
            every = list(turns)
            seconds = statistics.median(turn.seconds for turn in every)
            cpu = statistics.median(turn.cpu for turn in every)
            return f"{1e3 * seconds:.0f} ms and {1e3 * cpu:.1f} ms of its processor"

        return (
            f"One client alone: a request took {middle(self.served)} by the server, "
            f"{middle(self.direct)} by the mesh itself; {1e3 * self.seconds:+.1f} and "
            f"{1e3 * self.cpu:+.1f} ms in the middle of {len(self.served)} turns."
        )

    def _between(self, of: Callable[[Turn], float]) -> float:
        pairs = zip(self.served, self.direct, strict=True)
        return statistics.median(of(served) - of(direct) for served, direct in pairs)


def one_at_a_time(running: ServerProcess, painter: Painter) -> Overhead:
    """One client alone and a program that asks the mesh itself, in turn, for the same picture."""
    served: list[Turn] = []
    direct: list[Turn] = []
    server, this = psutil.Process(running.process.pid), psutil.Process(os.getpid())
    with _client(running) as client:
        sides = [
            (served, server, lambda: _ask(client)),
            (direct, this, lambda: directly(painter, 0, 1)),
        ]
        for number in range(TURNS):
            for turns, process, work in sides if number % 2 else reversed(sides):
                turns.append(_turn(process, work))
    return Overhead(tuple(served), tuple(direct))


def all_at_once(
    running: ServerProcess, painter: Painter, *, hosts: int, clients: int, pictures: int
) -> tuple[float, float]:
    """Seconds a picture, by the server for so many clients and by each host's own jobs."""

    def served(count: int) -> None:
        with _client(running) as client:
            for _ in range(count):
                _ask(client)

    def direct(count: int, lent: LentHosts) -> None:
        for _ in range(count):
            directly(painter, 0, 1, lent)

    book = HostBook(range(hosts))
    lent = [book.lend([rank]) for rank in range(hosts)]
    _together(lambda k: direct(UNCOUNTED, lent[k]), hosts)
    by_mesh = _together(lambda k: direct(pictures // hosts, lent[k]), hosts)
    _together(lambda k: served(1), clients)
    by_server = _together(lambda k: served(pictures // clients), clients)
    return (
        by_server / max(1, pictures // clients * clients),
        by_mesh / max(1, pictures // hosts * hosts),
    )


def directly(
    painter: Painter, seed: int, count: int, lent: LentHosts | None = None
) -> dict[int, bytes]:
    """The files of `count` pictures from `seed` on, by seed, as the mesh paints them by itself."""
    settings = GenerateSettings(
        model="tiny", n_images=count, image_size=(SIDE, SIDE), steps=STEPS, seed=seed
    )
    ready = painter.resolve(settings, PROMPT, seed)
    files = {}
    for event in painter.start(ready.resolved, Spread(placement="data"), lent):
        if isinstance(event, Picture):
            recipe = ready.recipe.of_image(event.seed)
            files[event.seed] = encode_png(event.pixels, recipe.to_json())
    return files


# Within


def _client(running: ServerProcess) -> httpx2.Client:
    return httpx2.Client(base_url=running.url, timeout=600, trust_env=False)


def _ask(client: httpx2.Client) -> None:
    fields = {
        "prompt": PROMPT, "seed": 0, "steps": STEPS, "size": f"{SIDE}x{SIDE}", "placement": "data",
        "user": threading.current_thread().name,
    }  # fmt: skip
    client.post("/v1/images/generations", json=fields).raise_for_status()


def _turn(process: psutil.Process, work: Callable[[], object]) -> Turn:
    for _ in range(UNCOUNTED):
        work()
    cpu = sum(process.cpu_times()[:2])
    seconds = [_seconds_of(work) for _ in range(A_TURN)]
    cpu = sum(process.cpu_times()[:2]) - cpu
    return Turn(statistics.median(seconds), cpu / A_TURN)


def _together(work: Callable[[int], object], count: int) -> float:
    """Seconds until as many threads, by number, have done their work. Raises what one raised."""
    with ThreadPoolExecutor(count) as threads:
        return _seconds_of(lambda: list(threads.map(work, range(count))))


def _seconds_of(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun
