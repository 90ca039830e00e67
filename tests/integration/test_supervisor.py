"""A supervisor and a process that answers as an engine does, through a Mac's small socket pairs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage import processes
from fluxmesh.storage.homes import AgentHome, write_private
from fluxmesh.storage.processes import started_at
from fluxmesh.wire.messages import Message, Stepped
from fluxmesh_agent.supervisor import EngineOptions, Supervisor
from tests.messages import same
from tests.paths import python_path

ECHO = """\
import json, socket, sys
sys.path[:0] = {paths!r}
from fluxmesh.wire.transport.stream import Channel
sock = socket.socket(fileno=json.loads(sys.argv[1])["fd"])
print("buffer", sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), file=sys.stderr)
channel = Channel(sock)
while True:
    seq, message = channel.receive()
    channel.send(message, seq)
"""
BUFFER = 8192  # bytes: net.local.stream.sendspace of macOS
PAIRS = socket.socketpair


class Small(socket.socket):
    """A socket whose buffers stay as small as they are, whatever is asked."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if (level, option) not in {
            (socket.SOL_SOCKET, socket.SO_SNDBUF),
            (socket.SOL_SOCKET, socket.SO_RCVBUF),
        }:
            super().setsockopt(level, option, *value)


def small_pair(*arguments: Any) -> tuple[Small, Small]:
    ends = PAIRS(*arguments)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER // 2)  # Linux doubles it
    near, far = (Small(fileno=end.detach()) for end in ends)
    return near, far


def test_latents_of_megabytes_pass_to_an_engine_and_back_eight_kilobytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, python = tmp_path / "echo.py", tmp_path / "python"
    echo.write_text(ECHO.format(paths=python_path().split(":")))
    # Called as Python is, with "-m", the engine's module and its options.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{echo}" "$3"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(socket, "socketpair", small_pair)
    home = AgentHome(tmp_path / "agent")
    home.folder.mkdir(mode=0o700)
    values = np.random.default_rng(1).standard_normal((1, 4096, 256), np.float32)  # 4 MB
    sent = [
        Stepped(
            job="job",
            ring_generation=1,
            image=0,
            step=step,
            is_last=False,
            seconds=0.5,
            peak_bytes=0,
            latents=values + step,
        )
        for step in (1, 2, 3)
    ]

    async def main() -> tuple[list[Message], list[str]]:
        came, ended = asyncio.Queue[Message](), list[str]()

        def on_end(text: str, *, is_killed: bool) -> None:
            ended.append(text)

        supervisor = Supervisor(home, EngineOptions(), came.put_nowait, on_end)
        supervisor.start()
        for message in sent:
            supervisor.send(message)
        try:
            return [await asyncio.wait_for(came.get(), 60) for _ in sent], ended
        finally:
            await supervisor.kill()

    received, ended = asyncio.run(main())
    assert all(same(message, returned) for message, returned in zip(sent, received, strict=True))
    assert ended == []
    assert f"buffer {BUFFER}\n" in home.log.read_text()


@pytest.mark.parametrize(
    ("name", "is_killed"), [("SEGV", False), ("ABRT", False), ("KILL", True), ("TERM", True)]
)
def test_an_engine_that_others_end_is_told_apart_from_one_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_killed: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    home = AgentHome(tmp_path / "agent")
    home.folder.mkdir(mode=0o700)

    async def main() -> tuple[str, bool]:
        ended = asyncio.Queue[tuple[str, bool]]()

        def on_end(text: str, *, is_killed: bool) -> None:
            ended.put_nowait((text, is_killed))

        Supervisor(home, EngineOptions(), lambda _: None, on_end).start()
        return await asyncio.wait_for(ended.get(), 60)

    text, was_killed = asyncio.run(main())
    assert f"was killed by signal {getattr(signal, f'SIG{name}').value}" in text
    assert was_killed is is_killed


# An engine that waits in the kernel does not end by SIGKILL. No test can make one, so that here
# the signal does not reach it until `it_ends`.

SLEEPER = "import time; time.sleep(600)"
SOON = replace(DEADLINES, engine_ends=0.3)


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """A supervisor whose engines sleep, and can't be killed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{SLEEPER}"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: None)
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: None)
    home = AgentHome(tmp_path / "agent")
    home.folder.mkdir(mode=0o700)
    supervisor = Supervisor(home, EngineOptions(), lambda _: None, lambda *_, **__: None, SOON)
    yield supervisor
    with contextlib.suppress(OSError, ValueError):
        KILL(json.loads(home.engine.read_text())["pid"], signal.SIGKILL)


KILL = os.kill


def test_no_engine_starts_beside_one_that_does_not_end(stuck: Supervisor) -> None:
    async def main() -> None:
        stuck.start()
        pid = stuck.pid
        assert pid is not None
        for _ in range(2):  # also who asks again is told
            with pytest.raises(
                FluxmeshError, match=rf"process {pid}\) was killed and does not end"
            ):
                await stuck.kill()
            assert stuck.pid is None and json.loads(stuck.home.engine.read_text())["pid"] == pid
        with pytest.raises(AssertionError, match="end the engine first"):
            stuck.start()
        KILL(pid, signal.SIGKILL)
        stuck.deadlines = DEADLINES
        await stuck.kill()  # waits until it is gone
        assert started_at(pid) is None and not stuck.home.engine.exists()
        stuck.start()
        assert stuck.pid not in (None, pid)
        KILL(stuck.pid, signal.SIGKILL)
        await stuck.kill()

    asyncio.run(main())


def test_no_engine_starts_beside_an_orphan_that_does_not_end(stuck: Supervisor) -> None:
    with subprocess.Popen([sys.executable]) as orphan:
        record = {"pid": orphan.pid, "start": started_at(orphan.pid)}
        write_private(stuck.home.engine, json.dumps(record))

        async def main() -> None:
            stuck.end_orphan()
            with pytest.raises(FluxmeshError, match=rf"process {orphan.pid}\) was killed and does"):
                await stuck.kill()
            KILL(orphan.pid, signal.SIGKILL)
            stuck.deadlines = DEADLINES
            await stuck.kill()
            assert started_at(orphan.pid) is None and not stuck.home.engine.exists()

        asyncio.run(main())
