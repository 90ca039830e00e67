"""Starts, watches and ends the engine's process, and carries messages to and from it.

The engine runs in a session of its own and is joined to the agent by a socket pair: when either
ends, the other reads the end of the stream. Which process it is stands in the state folder, so that
an agent that is started again can end an engine that its predecessor left behind.

SIGKILL ends whatever an engine does, unless that waits in the kernel: for a disk that does not
answer, or a driver. Until such a process is gone no other one starts: two would share the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.engine.gpu_errors import ON_DARWIN
from fluxmesh.errors import FluxmeshError
from fluxmesh.machine import mlx_backend
from fluxmesh.storage.homes import AgentHome, private_folder, write_private
from fluxmesh.storage.log_tail import last_lines
from fluxmesh.storage.processes import end_process, read_record, started_at
from fluxmesh.wire.messages import Message
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.stream import AsyncChannel, pair
from fluxmesh_agent import kernels
from fluxmesh_agent.threads import in_thread

log = logging.getLogger(__name__)

LOGGED = re.compile(r"\d{4}-\d\d-\d\d \S+ (agent|engine) [A-Z]+ ")  # a line of our own log
WORDS = 3  # lines of an engine that died which are told
LONGEST = 300  # characters of one


@dataclass(frozen=True)
class EngineOptions:
    """What every engine of this agent is started with."""

    models: Path | None = None
    roots: tuple[Path, ...] = ()
    memory: int | None = None  # bytes
    envs: tuple[tuple[str, str], ...] = ()
    keeps_kernels: bool = True  # that were compiled; not where the agent's folder goes with it


class _Life:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], log_begin: int) -> None:
        self.process = process
        self.log_begin = log_begin  # where in the log what it writes begins
        self.outbox: asyncio.Queue[Message] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.is_wanted = True


@dataclass(frozen=True)
class _Ending:
    """A process that was killed, and is not gone yet."""

    pid: int
    task: asyncio.Task[None]  # done once it is


class EngineStays(FluxmeshError):
    """An engine that was killed does not end."""


class OnEnd(Protocol):
    def __call__(self, text: str, *, is_killed: bool) -> None:
        """`is_killed`: by another program, or by the system, and not by what it did itself."""


class Supervisor:
    """At most one engine at a time."""

    def __init__(
        self,
        home: AgentHome,
        options: EngineOptions,
        on_message: Callable[[Message], None],
        on_end: OnEnd,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """`on_end` hears why an engine ended that nobody here has ended."""
        self.home, self.options, self.deadlines = home, options, deadlines
        self.on_message, self.on_end = on_message, on_end
        self._life: _Life | None = None
        self._ending: _Ending | None = None

    @property
    def pid(self) -> int | None:
        return self._life.process.pid if self._life else None

    def end_orphan(self) -> None:
        """Ends the engine of an agent that was killed, if it is still there: see `kill`."""
        with contextlib.suppress(OSError):  # nobody saw when it ended
            kernels.drop_written_since(self.home, self.home.engine.stat().st_mtime)
        known = read_record(self.home.engine)
        if known is None or started_at(known["pid"]) != known["start"]:
            self.home.engine.unlink(missing_ok=True)
            return
        pid, start = known["pid"], known["start"]
        log.warning("ends engine %d, which an agent before this one has left", pid)

        def wait() -> None:
            while not end_process(pid, start):  # it is no child of ours
                pass

        self._see_out(pid, wait)

    def start(self, envs: tuple[tuple[str, str], ...] = ()) -> None:
        """Starts an engine; messages may be sent at once. Raises `FluxmeshError`."""
        assert self._life is None and self._ending is None, "end the engine first"
        near, far = pair()
        scratch = private_folder(self.home.folder / "engine")
        config = {
            "fd": far.fileno(),
            "scratch": str(scratch),
            "adapters": str(self.home.adapters),
            "models": str(self.options.models) if self.options.models else None,
            "roots": [str(root) for root in self.options.roots],
            "memory": self.options.memory,
        }
        compiled = kernels.folder_for(self.home) if self.options.keeps_kernels else None
        environment = {
            **({} if compiled is None else {kernels.VARIABLE: str(compiled)}),
            # MLX computes on one GPU; with two in sight and float32, it was seen to abort.
            "CUDA_VISIBLE_DEVICES": "0",
            # Of all engines: one that paints now may train later.
            **(ON_DARWIN if sys.platform == "darwin" else {}),
            **os.environ,
            # float32 means float32; bfloat16 doesn't care. Read when mlx loads.
            "MLX_ENABLE_TF32": "0",
            **dict(self.options.envs),
            **dict(envs),
        }
        try:
            with open(self.home.log, "ab") as file:
                log_begin = file.tell()
                process = subprocess.Popen(
                    [sys.executable, "-m", "fluxmesh_agent.engine", json.dumps(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd=scratch,  # an empty folder: no relative name leads anywhere
                    env=environment,
                    pass_fds=[far.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            near.close()
            raise FluxmeshError(f"The engine does not start: {error.strerror}.") from None
        finally:
            far.close()
        record = {"pid": process.pid, "start": started_at(process.pid)}
        try:
            write_private(self.home.engine, json.dumps(record))
        except FluxmeshError:  # a full disk: an engine that no record names could be left behind
            process.kill()
            process.wait()
            near.close()
            raise
        log.info("engine %d started", process.pid)
        life = self._life = _Life(process, log_begin)
        life.task = asyncio.create_task(self._serve(life, near))

    def send(self, message: Message) -> None:
        """Puts a message in line for the engine; one that has ended gets nothing."""
        if self._life is not None:
            self._life.outbox.put_nowait(message)

    async def kill(self) -> None:
        """Ends the engine, whatever it does, and waits until it is gone.

        Raises `EngineStays` where it is not in time, also when asked again; once it is gone, the
        next one may start.
        """
        life, self._life = self._life, None
        if life is not None and life.task is not None:
            life.is_wanted = False
            life.process.kill()
            self._see_out(life.process.pid, life.process.wait)
        ending = self._ending
        await self.gone(self.deadlines.engine_ends)
        if life is not None and life.task is not None:
            await end(life.task)
        if ending is not None and not ending.task.done():
            log.error("engine %d was killed and does not end", ending.pid)
            raise EngineStays(
                f"The engine (process {ending.pid}) was killed and does not end: its system holds "
                "it. This host starts no other one beside it; if it stays, restart the machine."
            )

    async def gone(self, seconds: float | None = None) -> None:
        """Waits until no engine is ending any more, so many seconds at most."""
        if self._ending is not None:
            await asyncio.wait({self._ending.task}, timeout=seconds)

    def _see_out(self, pid: int, wait: Callable[[], object]) -> None:
        """From now on the engine with that id is ending, until `wait()` returns, in a thread."""
        self._ending = _Ending(pid, asyncio.create_task(self._until_gone(pid, wait)))

    async def _until_gone(self, pid: int, wait: Callable[[], object]) -> None:
        await in_thread(wait)
        self._ending = None
        log.info("engine %d was ended", pid)
        kernels.drop_half_written(self.home)
        self.home.engine.unlink(missing_ok=True)

    async def _serve(self, life: _Life, near: socket.socket) -> None:
        channel = await AsyncChannel.open(near)
        writer = asyncio.create_task(self._write(life, channel))
        try:
            while life.is_wanted:
                _, message = await channel.receive()
                if life.is_wanted:
                    self.on_message(message)
        except FluxmeshError as error:
            if not isinstance(error, ConnectionClosed):
                log.error("the engine sends what is no message: %s", error)
                life.process.kill()
        finally:
            writer.cancel()
            await channel.close()
        code = await in_thread(life.process.wait)
        if life.is_wanted:
            self._life = None
            kernels.drop_half_written(self.home)
            text = _ending(
                life.process.pid, code, last_words(last_lines(self.home.log, 50, life.log_begin))
            )
            log.error("%s", text)
            self.on_end(text, is_killed=-code in (signal.SIGKILL, signal.SIGTERM))

    async def _write(self, life: _Life, channel: AsyncChannel) -> None:
        try:
            while True:
                await channel.send(await life.outbox.get())
        except ConnectionClosed:
            return  # `_serve` reads the same end


def _ending(pid: int, code: int, said: Sequence[str] = ()) -> str:
    """Why it may have ended; `said` is what it wrote on stderr beside its log."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if not said:
        return f"The engine (process {pid}) {how}."
    last = " / ".join(line.rstrip(".") for line in said)
    more = f"; {mlx_backend.remedy()}" if mlx_backend.is_missing(last) else ""
    return f"The engine (process {pid}) {how}: {last}{more}."


def last_words(lines: Sequence[str]) -> list[str]:
    """Of what an engine's process has written, the end that tells why: not its log.

    Of a traceback the last line, which names the error.
    """
    said = [line.strip() for line in lines if line.strip() and not LOGGED.match(line)]
    is_traceback = any(line.startswith("Traceback ") for line in said)
    return [line[:LONGEST] for line in said[-1 if is_traceback else -WORDS :]]
