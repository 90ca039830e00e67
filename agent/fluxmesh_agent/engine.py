"""The engine's main: the only process of a host that imports mlx. A child of the agent.

    python -m fluxmesh_agent.engine '{"fd": 5, ...}'

Work comes over an inherited socket (`stream.py`), one unit after another is done by a `Worker`,
and its reports go back. Three threads: this one computes; one reads, so that a `Cancel` is heard
during a step, and ends the process when the agent is gone; one says each second that a unit which
gives no other sign is still at work.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from fluxmesh.bounds import sendable
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.engine import device_memory as memory
from fluxmesh.engine.gpu_errors import RELAX, explain, gpu_end
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.errors import FluxmeshError, WeightsError
from fluxmesh.events import Loading
from fluxmesh.kernels import ops
from fluxmesh.machine.open_files import allow_many_files
from fluxmesh.models.collectives import Ranks
from fluxmesh.training.worker import TrainingWorker
from fluxmesh.wire.messages import (
    PEER_LATE,
    Account,
    Beat,
    Cancel,
    Cancelled,
    Device,
    Failed,
    Join,
    Joined,
    LoadProgress,
    Message,
    Report,
    Work,
)
from fluxmesh.wire.transport import local_network
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.stream import Channel
from fluxmesh_agent.model_paths import Roots

log = logging.getLogger("engine")

PROGRESS_SECONDS = 0.05  # between two reports of bytes
BROKEN = 70  # exit code: the engine told why, or could not
DELAYS = "FLUXMESH_DELAYS"  # "step=0.5,load=1": seconds, so that a test can hit a phase


@dataclass(frozen=True)
class Config:
    """What the agent starts an engine with."""

    fd: int  # of the socket
    scratch: str  # folder for the files of a ring
    adapters: str
    models: str | None
    roots: list[str]
    memory: int | None  # bytes that it may use at most


class Engine:
    """One life: from the first message to the end of the stream."""

    def __init__(self, config: Config, channel: Channel, deadlines: Deadlines = DEADLINES) -> None:
        self.config, self.channel, self.deadlines = config, channel, deadlines
        roots = Roots(
            Path(config.adapters),
            Path(config.models) if config.models else None,
            [Path(root) for root in config.roots],
        )
        self.worker = TrainingWorker(
            WorkerOptions(
                locate=roots.locate,
                memory_bytes=config.memory,
                hear=self._hear,
                stopping=self._is_cancelled,
                pause=_pauses(os.environ.get(DELAYS, "")),
            )
        )
        self._line: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled: Counter[str] = Counter()  # `Cancel`s of each job that are in line
        self._lock = threading.Lock()
        self._work: Work | None = None
        self._told = 0.0  # when bytes were last reported

    def run(self) -> None:
        """Works until the agent is gone."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        if self.config.memory is not None:
            mx.set_memory_limit(self.config.memory)
        memory.bound_cache()
        self.channel.send(device(self.config.memory))
        while True:
            message = self._next()
            if isinstance(message, Cancel):
                self._cancel(message.job, -1)  # what comes after it is new work
                if message.fence:  # else the agent's own, for a coordinator that is gone
                    self.channel.send(
                        Cancelled(job=message.job, ring_generation=0)
                    )  # the agent knows the ring generation
                else:
                    self.worker.end_job()
                continue
            last: Report | None = None
            if isinstance(message, Join):
                last = self._join(message)
            elif isinstance(message, Work):
                last = self._do(message)
            # Before the last report: whoever hears it finds the host free.
            self._account(is_over=True)
            if last is not None:
                self.channel.send(last)

    def _next(self) -> Message:
        """What is next in line. An engine that waits for it keeps weights in memory, and no more.

        Not after each unit: what one frees the next one takes.
        """
        try:
            return self._line.get(timeout=self.deadlines.engine_idle)
        except queue.Empty:
            memory.give_back()
            return self._line.get()

    def _account(self, *, is_over: bool) -> None:
        worker = self.worker
        self.channel.send(
            Account(
                is_over=is_over,
                holds=worker.holding,
                text=worker.text_holding,
                counters=worker.counters,
                load_rate=worker.load_rate,
                components=worker.components,
                compiled=worker.compiled,
                kept=worker.kept_models,
            )
        )

    # Work

    def _do(self, work: Work) -> Report | None:
        """Does a unit and sends its reports, but for the last one, which is returned."""
        # In a ring even what is cancelled begins: the ranks must agree that they stop.
        if work.job in self._cancelled and not work.is_collective:
            return None
        self._work = work
        last: Report | None = None
        try:
            for report in self.worker.do(work):
                if work.is_ended_by(report):
                    last = report
                    continue
                if not isinstance(report, LoadProgress):
                    self._account(is_over=False)
                self.channel.send(report)
            return last
        except FluxmeshError as error:
            if isinstance(error, ConnectionClosed):
                raise
            return failed_of(work, error)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:  # a file that it reads
                text = f"Can't read {error.filename}: {error.strerror or type(error).__name__}."
                return failed_of(work, WeightsError(text))
            end = gpu_end(error)
            if end is None:
                return self._give_up(
                    work.ring_generation, work.job, f"while {self.worker.doing}", error
                )
            in_ring = work.is_collective
            relaxed = os.environ.get(RELAX) == "1"
            text = explain(end, self.worker.doing, in_ring=in_ring, relaxed=relaxed)
            kind = PEER_LATE if in_ring and end.is_late else "Raised"
            return self._end(
                Failed(
                    ring_generation=work.ring_generation,
                    job=work.job,
                    kind=kind,
                    text=text,
                    fatal=True,
                ),
                error,
            )
        finally:
            self._work = None

    def _join(self, join: Join) -> Report:
        """Forms the ring with the others, and makes sure that they are the others."""
        try:
            for variable, text in join.files:
                path = Path(self.config.scratch) / f"{variable}.json"
                path.write_text(text)
                os.environ[variable] = str(path)
            os.environ.update(join.envs)
            ranks = Ranks.join("jaccl" if join.backend.startswith("jaccl") else join.backend)
            if (ranks.rank, ranks.size) != (join.rank, join.size):
                raise RuntimeError(
                    f"rank {join.rank} of {join.size} became {ranks.rank} of {ranks.size}"
                )
            if not ranks.agree(join.nonce):
                raise RuntimeError("a rank does not know the nonce of this ring generation")
        except Exception as error:
            return self._give_up(join.ring_generation, "", "while joining the ring", error)
        self.worker.join(ranks)
        return Joined(ring_generation=join.ring_generation, rank=join.rank)

    def _give_up(self, ring_generation: int, job: str, doing: str, error: Exception) -> NoReturn:
        """Ends the process: what raised such a thing may have left anything behind."""
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        said = local_network.explained(said)
        text = f"The engine failed {doing}: {said.rstrip('.')}."
        self._end(
            Failed(
                ring_generation=ring_generation,
                job=job,
                kind="Raised",
                text=sendable(text),
                fatal=True,
            ),
            error,
        )

    def _end(self, failed: Failed, error: Exception) -> NoReturn:
        """Tells why, and ends the process."""
        log.error("%s", failed.text, exc_info=error)
        self.channel.send(failed)
        os._exit(BROKEN)

    def _cancel(self, job: str, count: int) -> None:
        """A `Cancel` of a job has come, or what was before it in line is over."""
        with self._lock:
            self._cancelled[job] += count
            if not self._cancelled[job]:
                del self._cancelled[job]

    def _is_cancelled(self) -> bool:
        return self._work is not None and self._work.job in self._cancelled

    def _hear(self, event: Loading) -> None:
        now, work = time.monotonic(), self._work
        if work is not None and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self.channel.send(
                LoadProgress(
                    job=work.job,
                    ring_generation=work.ring_generation,
                    component=event.component,
                    done_bytes=event.done_bytes,
                    total_bytes=event.total_bytes,
                )
            )

    # The other threads

    def _read(self) -> None:
        try:
            while True:
                _, message = self.channel.receive()
                if isinstance(message, Cancel):
                    self._cancel(message.job, 1)
                self._line.put(message)
        except ConnectionClosed:
            os._exit(0)  # the agent is gone; the main thread may sit in a collective for ever
        except BaseException:
            log.exception("the engine can't read its agent")
            os._exit(BROKEN)

    def _beat(self) -> None:
        while True:
            time.sleep(self.deadlines.heartbeat)
            work, doing = self._work, self.worker.quiet
            if work is not None and doing:
                try:
                    self.channel.send(
                        Beat(job=work.job, ring_generation=work.ring_generation, doing=doing)
                    )
                except ConnectionClosed:
                    return  # the reader ends the process


def failed_of(work: Work, error: FluxmeshError) -> Failed:
    """What is told of work that could not be done; the engine lives, and does the next."""
    # A kind of a module's own travels as the one of `errors.py` that it is one of.
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == FluxmeshError.__module__)
    return Failed(
        ring_generation=work.ring_generation,
        job=work.job,
        kind=next(ours).__name__,
        text=sendable(str(error)),
        fatal=False,
        setting=error.setting,
    )


def device(limit: int | None = None) -> Device:
    """What this process computes on; takes some 50 ms to find out how fast it is."""
    known = mx.device_info()
    kind = str(known.get("device_name") or known.get("name") or _cpu_name())
    total = memory.memory_of_device()
    return Device(
        kind=kind,
        name=f"{mx.default_device()}{os.environ.get('CUDA_VISIBLE_DEVICES', '')}",
        mlx_version=metadata.version("mlx"),
        memory_bytes=total if limit is None else min(limit, total),
        flops_per_second=_flops(),
        platform=ops.device(),
    )


def _flops(seconds: float = 0.01) -> float:
    """FLOP a second of square bfloat16 products, as large as take `seconds`: a first guess."""
    size, rate = 128, 1e9
    while size <= 8192:
        x = mx.ones((size, size), mx.bfloat16)
        mx.eval(x @ x)
        start = time.perf_counter()
        mx.eval(x @ x)
        spent = max(time.perf_counter() - start, 1e-9)
        rate = 2 * size**3 / spent
        if spent >= seconds:
            break
        size *= 2
    return rate


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")


def _pauses(text: str) -> Callable[[str], None]:
    """What makes an engine slower in each phase, from "step=0.5,load=1"."""
    seconds = {
        name: float(value)
        for name, _, value in (p.partition("=") for p in text.split(","))
        if value
    }
    return lambda phase: time.sleep(seconds.get(phase, 0.0))


def main() -> None:
    """Runs the engine on the socket that the agent has opened."""
    logging.basicConfig(format="%(asctime)s engine %(levelname)s %(message)s", level=logging.INFO)
    allow_many_files()
    config = Config(**json.loads(sys.argv[1]))
    os.set_inheritable(config.fd, False)  # a compiler that mlx calls must not keep it open
    channel = Channel(socket.socket(fileno=config.fd))
    try:
        Engine(config, channel).run()
    except ConnectionClosed:
        os._exit(0)


if __name__ == "__main__":
    main()
