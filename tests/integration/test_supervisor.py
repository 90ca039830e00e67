"""A supervisor and a process that answers as an engine does, through a Mac's small socket pairs."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh.storage.homes import AgentHome
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
