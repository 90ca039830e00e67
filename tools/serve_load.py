"""Many clients at once before one server: nothing is lost, wrong or out of turn, nothing grows.

    python -m tools.serve_load [--jobs 1000] [--clients 20] [--hosts 2] [--seed 1]

Brings up a mesh of agents on this machine with the embedded checkpoint and `fluxmesh serve` in
front of it. Every picture is compared, byte for byte, with the one of the same seed that the mesh
painted before without the server. The clients are `serve_clients.py`'s; they come in two halves,
and the server's memory, descriptors and threads are read before, between and after them, when
nobody is connected. Then `serve_overhead.py` asks the server and the mesh for the same picture:
what is left between them is the server's. Prints a table; exits 1 where a promise is broken.
1,000 jobs take about 10 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from fluxmesh_coordinator.commands.generate import Painter
from fluxmesh_coordinator.server.queue.fair_queue import QueueBounds
from fluxmesh_coordinator.server.queue.lane import NotesReporter
from tests.server_process import ServerProcess, server
from tools.serve_clients import SEEDS, SIDE, LoadClient, LoadLog
from tools.serve_overhead import all_at_once, directly, one_at_a_time

# What a client may see of another between two pictures of its own: one that was under way, one
# that stood before it, and one that came while its own next request was on the way.
BETWEEN = 3
OVERHEAD = 0.020  # seconds a request of one client alone
SATURATED = 60  # pictures of clients that all ask at once
# Buffers come and go, and the jobs that can still be asked for fill their list; a leak goes on.
FIRST_HALF, SECOND_HALF = 24 << 20, 8 << 20  # bytes that either may leave behind
FILES = 2  # descriptors more than before


@dataclass(frozen=True)
class ServerReading:
    """What the server's process holds at a moment when nobody is connected."""

    memory: int  # bytes
    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> ServerReading:
        """The least of several, a moment apart: answers that are sent are let go of a bit later."""
        readings = []
        for _ in range(5):
            time.sleep(0.2)
            with process.oneshot():
                memory = process.memory_info().rss
                readings.append((memory, process.num_fds(), process.num_threads()))
        return cls(*map(min, zip(*readings, strict=True)))


@dataclass(frozen=True)
class Promise:
    """A line of the table."""

    about: str
    measured: str
    bound: str
    is_kept: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the mesh goes down then, too
    with (
        tempfile.TemporaryDirectory() as folder,
        mesh(Path(folder), options.hosts),
        Painter(NotesReporter(), keep_warm=True) as painter,
        server("--model", "tiny", environment=dict(os.environ), folder=Path(folder)) as running,
    ):
        promises = press(running, painter, options)
        running.signal()
        code = running.ended()
    promises.append(Promise("exit code after Ctrl-C", str(code), "0", code == 0))
    sys.exit(report(promises))


@contextmanager
def mesh(folder: Path, hosts: int) -> Iterator[None]:
    """A mesh of this machine, of a user of its own, who is this process meanwhile."""
    own = {
        "FLUXMESH_HOME": f"{folder}/home",
        "FLUXMESH_STATE": f"{folder}/state",
        "HF_HOME": f"{folder}/hub",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.update(own)
    command = [sys.executable, "-m", "fluxmesh_coordinator"]
    up = [*command, "up", "--local", str(hosts), "--model", "tiny", "--no-warm"]
    subprocess.run(up, check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([*command, "down"], check=False)


def press(running: ServerProcess, painter: Painter, options: argparse.Namespace) -> list[Promise]:
    """All of it; what came of it."""
    process, dice = psutil.Process(running.process.pid), random.Random(options.seed)
    expected = directly(painter, 0, SEEDS + 1)
    log = LoadLog()

    def phase(name: str, jobs: int, clients: int) -> float:
        """Jobs shared among clients; the seconds that they took."""
        shares = [jobs // clients + (k < jobs % clients) for k in range(clients)]
        threads = [
            LoadClient(
                f"{name}-client-{k:02}", running.url, range(share), random.Random(dice.random()),
                expected, log,
            )
            for k, share in enumerate(shares)
        ]  # fmt: skip
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - begun

    phase("warm", options.clients, options.clients)  # what is loaded once is loaded after it
    wait_until_idle(running)
    readings = [ServerReading.of(process)]
    cpu = sum(process.cpu_times()[:2])
    half = options.jobs // 2
    took = 0.0
    for name, jobs in (("first", half), ("second", options.jobs - half)):
        took += phase(name, jobs, options.clients)
        wait_until_idle(running)
        readings.append(ServerReading.of(process))
    cpu = (sum(process.cpu_times()[:2]) - cpu) / max(1, options.jobs)
    print(
        f"{options.jobs} jobs of {options.clients} clients on {options.hosts} hosts in {took:.0f} "
        f"s, seed {options.seed}: {log.pictures} pictures of {SIDE}x{SIDE}; {log.left} clients "
        f"went away, {log.refused} were told to come again. A job of them waited and was painted "
        f"{statistics.median(log.seconds):.2f} s (median), and took {1e3 * cpu:.1f} ms of the "
        "server's processor."
    )
    for problem in log.problems[:20]:
        print(f"  PROBLEM {problem}")
    sent = options.jobs + options.clients  # with the first ones
    done = len(log.seconds) + log.stayed
    return [
        Promise(
            "jobs that came to their end, of those that were sent to it",
            f"{done} of {sent - log.left}", "all", done == sent - log.left and not log.problems,
        ),
        *counted(running, done, log.left),
        Promise("pictures with other bytes than without the server", str(log.wrong), "0",
            log.wrong == 0),
        *in_turn(log, options.clients),
        *flat(readings, options.clients),
        overhead(running, painter, options),
        Promise("tracebacks in its log", str(running.log.count("Traceback")), "0",
            "Traceback" not in running.log),
    ]  # fmt: skip


def counted(running: ServerProcess, done: int, left: int) -> list[Promise]:
    """What the server says itself of how its jobs ended, and who is left in line."""
    text = httpx2.get(f"{running.url}/metrics").text
    ends = {
        outcome: int(float(value))
        for line in text.splitlines()
        if line.startswith("fluxmesh_jobs_total{")
        for outcome, value in [(line.split('"')[1], line.rpartition(" ")[2])]
    }
    # Who goes before the request is looked at whole has no job yet.
    cancelled, failed = ends.get("cancelled", 0), ends.get("failed", 0)
    line = len(httpx2.get(f"{running.url}/api/status").json()["queue"])
    return [
        Promise("jobs done, by the server's count", str(ends.get("done", 0)), str(done),
            ends.get("done", 0) == done),
        Promise("jobs cancelled because their client went", str(cancelled), f"at most {left}",
            cancelled <= left),
        Promise("jobs failed, and jobs left in line", f"{failed}, {line}", "0, 0",
            failed == line == 0),
    ]  # fmt: skip


def in_turn(log: LoadLog, clients: int) -> list[Promise]:
    """Fairness: every client has one job at a time, so nobody stands behind two of another."""
    first = max((places[0] for places in log.places if places), default=0)
    grown = sum(places != sorted(places, reverse=True) for places in log.places)
    between = log.between()
    return [
        Promise("the last place that a job began at", str(first), f"at most {clients}",
            first <= clients),
        Promise("jobs whose place grew", str(grown), "0", grown == 0),
        Promise("pictures of one client between two of another", str(between),
            f"at most {BETWEEN}", between <= BETWEEN),
    ]  # fmt: skip


def flat(readings: list[ServerReading], clients: int) -> list[Promise]:
    """What the server holds, at the start, between the halves and at the end.

    Threads look things up beside the event loop, at most one for each client at once.
    """
    start, middle, end = readings
    limits = start.memory + FIRST_HALF, middle.memory + SECOND_HALF
    shown = ", ".join(f"{each.memory / 1e6:.0f}" for each in readings)
    return [
        Promise("memory at start, middle and end, MB", shown,
            f"{limits[0] / 1e6:.0f}, then {limits[1] / 1e6:.0f}",
            middle.memory <= limits[0] and end.memory <= limits[1]),
        *(
            Promise(f"{about} at start, middle and end", ", ".join(map(str, values)),
                f"at most {values[0] + more}", max(values) <= values[0] + more)
            for about, values, more in (
                ("descriptors", [each.files for each in readings], FILES),
                ("threads", [each.threads for each in readings], clients),
            )
        ),
    ]  # fmt: skip


def overhead(running: ServerProcess, painter: Painter, options: argparse.Namespace) -> Promise:
    """What the server adds to a request, alone and with all hosts at work; only one is promised.

    Where the clients need the same processors as the hosts, more of them is no server's doing.
    """
    measured = one_at_a_time(running, painter)
    print(measured.sentence())
    clients = min(options.clients, QueueBounds.per_address // 2)
    by_server, by_mesh = all_at_once(
        running, painter, hosts=options.hosts, clients=clients, pictures=SATURATED
    )
    print(
        f"All hosts at work: a picture every {1e3 * by_server:.0f} ms by the server for "
        f"{clients} clients, every {1e3 * by_mesh:.0f} ms by the mesh itself."
    )
    return Promise(
        "a request by the server, over the mesh's own", f"{1e3 * measured.seconds:.1f} ms",
        f"at most {1e3 * OVERHEAD:.0f} ms", measured.seconds <= OVERHEAD,
    )  # fmt: skip


def wait_until_idle(running: ServerProcess) -> None:
    """Those whose client went away end within a step, and are waited for."""
    limit = time.monotonic() + 60
    while httpx2.get(f"{running.url}/api/status").json()["queue"] and time.monotonic() < limit:
        time.sleep(0.1)


def report(promises: list[Promise]) -> int:
    """Prints the table; the exit code."""
    table = Table("promise", "measured", "bound", "")
    for each in promises:
        kept = "kept" if each.is_kept else "[bold]BROKEN[/bold]"
        table.add_row(each.about, each.measured, each.bound, kept)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(not all(each.is_kept for each in promises))


if __name__ == "__main__":
    main()
