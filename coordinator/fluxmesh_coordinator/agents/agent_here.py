"""The agent at one port of this machine: what is on record of it, how it starts and ends."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import AgentHome, private_folder, read_own, write_private
from fluxmesh.storage.log_tail import last_lines
from fluxmesh.storage.processes import end_process, kill_recorded, read_record, started_at
from fluxmesh.version import __version__

SOMEBODY = "whoever started it there"  # neither of `up`'s users: launchd, or a person by hand

Spec = dict[str, Any]  # address, port, models, memory, envs, roots: what an agent is started with


def agent_command(state: Path, spec: Spec, *more: str) -> list[str]:
    """The command line of an agent; its keys and the engines' environment go over stdin."""
    command = [sys.executable, "-m", "fluxmesh_agent", "run", "--state", str(state)]
    command += ["--address", spec["address"], "--port", str(spec["port"]), "--keys-stdin"]
    if spec.get("models"):
        command += ["--models", os.path.expanduser(spec["models"])]
    if spec.get("memory"):
        command += ["--memory", str(spec["memory"])]
    for root in spec.get("roots", ()):
        command += ["--root", root]
    return [*command, *more]


class Agent:
    """The agent at one port of this machine: its folder, and the process that runs now."""

    def __init__(self, port: int) -> None:
        self.home = AgentHome.default(port)
        self.state, self.log = self.home.folder, self.home.log
        self._running = self.state / "started.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two `fluxmesh up` at once come one after the other."""
        with open(self.state / "started.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def recorded(self) -> dict[str, Any] | None:
        """What was written when one was started, which may be gone; None where none was, or it was
        ended on purpose."""
        return read_record(self._running)

    def running(self) -> dict[str, Any] | None:
        """What was written when it was started; None where that process is gone.

        Its "endpoint" is "" where it does not listen yet, and whoever started it did not wait.
        """
        record = self.recorded()
        if record and started_at(record["pid"]) == record["start"]:
            said = {} if record["endpoint"] else self._as_it_says(record["pid"])
            return {**record, **said}
        said = self._as_it_says()
        # One that somebody else has started here, such as launchd after a restart.
        return {"version": "", **said, "spec": None, "by": [SOMEBODY]} if said else None

    def _as_it_says(self, pid: int | None = None) -> dict[str, Any]:
        """What an agent that listens has written of itself; nothing where there is none."""
        record = read_record(self.home.agent)
        if record is None or started_at(record["pid"]) != record["start"]:
            return {}
        if pid is not None and record["pid"] != pid:
            return {}
        try:
            key = read_own(self.state / "agent.pub").strip()
        except (FileNotFoundError, ValueError):
            return {}
        return {**record, "public_key": key}

    def start(
        self, spec: Spec, authorized: dict[str, str], *, asker: str, kept: bool
    ) -> dict[str, Any]:
        """Starts it for the users `authorized` (names to keys), who may change how from now on.

        `asker` is the name of the `up` that wants it, "" for others; `kept` says that this process
        goes on as long as the agent lives. Waits until it listens. Raises `FluxmeshError` with what
        it said last.
        """
        private_folder(self.home.authorized)
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        record: dict[str, Any] = {"endpoint": "", "public_key": "", "boot": "", "spec": spec}
        record |= {"version": __version__, "by": list(authorized)}
        record |= {"started_by": asker, "asked_by": asker}
        process: subprocess.Popen[bytes] | None = None
        try:
            with interrupts.uninterrupted(), os.fdopen(handle, "ab") as log:
                begin = log.tell()
                process = subprocess.Popen(
                    agent_command(self.state, spec),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                )
                record |= {"pid": process.pid, "start": started_at(process.pid)}
            # Before it is told whom to let in, without which it does not begin: whatever becomes
            # of us from here on, `stop` and the next `start` know of it.
            self.remember(record)
            ready = hand_over(process, authorized, dict(spec.get("envs", ())))
            if ready is None:
                said = [line for line in last_lines(self.log, 5, begin) if line.strip()]
                why = said[-1] if said else "it said nothing"
                raise FluxmeshError(f"Its agent did not start: {why.rstrip('.')}.")
        except BaseException:
            with interrupts.uninterrupted():
                if process is not None:
                    process.kill()
                    process.wait()
                    for pipe in (process.stdin, process.stdout):
                        if pipe is not None:
                            with suppress(OSError):  # what it did not read is lost
                                pipe.close()
                self._running.unlink(missing_ok=True)
            raise
        record |= {name: ready[name] for name in ("endpoint", "public_key", "pid", "boot")}
        if kept:
            record["kept_by"] = {"pid": os.getpid(), "start": started_at(os.getpid())}
        return record

    def remember(self, record: dict[str, Any]) -> None:
        """Keeps what `start` or `running` told, for every starter to come."""
        write_private(self._running, json.dumps(record))

    def stop(self) -> bool:
        """Ends it, by force where it does not go; False where none ran."""
        record, known = self.running(), not self.was_stopped
        self._running.unlink(missing_ok=True)  # first: nobody starts it again from now on
        if record is None:
            if known:
                self._end_engine()
            return False
        pid, start = record["pid"], record["start"]
        asked = end_process(pid, start, signal.SIGTERM, DEADLINES.agent_ends)
        if not asked and not end_process(pid, start):
            raise FluxmeshError(f"Its agent, process {pid}, does not end; restart the machine.")
        self._end_engine()  # one that hangs does not see that its agent is gone
        return True

    def _end_engine(self) -> None:
        kill_recorded(self.home.engine)
        left = read_record(self.home.engine)
        if left is not None and started_at(left["pid"]) == left["start"]:
            pid = left["pid"]
            raise FluxmeshError(f"Its engine, process {pid}, does not end; restart the machine.")

    def is_only_of(self, asker: str) -> bool:
        """Whether that `up` has started it and nobody else has asked for it since; or it would lose
        the connection that keeps it."""
        record = self.recorded() or {}
        is_alone = record.get("asked_by") == asker or "kept_by" in record
        return record.get("started_by") == asker and is_alone

    def kill(self) -> None:
        """Ends it by force, in order to start it again."""
        record = self.running()
        if record is not None:
            end_process(record["pid"], record["start"])
        kill_recorded(self.home.engine)

    @property
    def was_stopped(self) -> bool:
        """Whether it was ended on purpose, or never started."""
        return not self._running.exists()


def hand_over(
    process: subprocess.Popen[bytes], authorized: dict[str, str], envs: dict[str, str]
) -> dict[str, Any] | None:
    """Gives a new agent its keys; returns the line that it answers, None where it ends first.

    stdin stays open: closing it ends an `--ephemeral` agent. The others don't mind.
    """
    assert process.stdin is not None and process.stdout is not None
    watch = time.monotonic()
    try:
        handover = {"authorized": authorized, "envs": envs}
        process.stdin.write(json.dumps(handover).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = b""
    while not line.endswith(b"\n"):
        left = DEADLINES.agent_listens - (time.monotonic() - watch)
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return None
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            return None
        line += piece
    try:
        ready: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return ready
