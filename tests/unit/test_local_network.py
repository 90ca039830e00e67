"""macOS keeps a process out of the local network: everything that dials says so in one sentence.

Emulated: connections fail with EHOSTUNREACH, and `local_network` takes this machine for a Mac.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, LocalNetworkError
from fluxmesh.planning.workload import Workload
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys
from fluxmesh.wire.messages import Failed, Join
from fluxmesh.wire.transport import local_network
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.dialer import CurveDialer
from fluxmesh.wire.transport.stream import Channel
from fluxmesh_agent import engine, links
from fluxmesh_coordinator.deploy import reach
from fluxmesh_coordinator.deploy.checks import Finding
from fluxmesh_coordinator.deploy.warmup import Warming
from tests.fakes import FakeMesh
from tests.ports import free_ports
from tests.unit.meshes import ask, small
from tests.unit.test_warming import Told

WHERE = "System Settings > Privacy & Security > Local Network"


def unreachable(*_place: Any, **_more: Any) -> socket.socket:
    raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))


@pytest.fixture(params=["Darwin", "Linux"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system that this machine seems to be; nothing can be dialled on it."""
    monkeypatch.setattr(local_network, "platform", SimpleNamespace(system=lambda: request.param))
    monkeypatch.setattr(socket, "create_connection", unreachable)
    system: str = request.param
    return system


def test_a_link_that_macos_forbids_is_told_with_the_permission(system: str) -> None:
    with pytest.raises(FluxmeshError, match="The link to 10.0.0.2 can't be measured") as caught:
        asyncio.run(links.probe("10.0.0.2", 4000, b"token", 1))
    is_mac = system == "Darwin"
    assert (type(caught.value) is LocalNetworkError) == is_mac
    assert (WHERE in str(caught.value)) == is_mac
    assert "\n" not in str(caught.value) and ".." not in str(caught.value)


def test_another_failure_of_a_link_is_told_as_it_is(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_place: Any, **_more: Any) -> socket.socket:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(FluxmeshError, match="measured: Connection refused.$") as caught:
        asyncio.run(links.probe("10.0.0.2", 4000, b"token", 1))
    assert type(caught.value) is FluxmeshError


@pytest.mark.parametrize(
    "text",
    [
        f"[ring] Rank 1 Couldn't connect (error: {errno.EHOSTUNREACH})",
        f"[jaccl] Couldn't connect (error: {errno.EHOSTUNREACH})",
        "connect: No route to host",
    ],
)
def test_what_mlx_says_of_a_ring_is_explained(system: str, text: str) -> None:
    explained = local_network.explained(text)
    assert explained.startswith(text)
    assert (WHERE in explained) == (system == "Darwin")
    assert local_network.explained("Couldn't connect (error: 61)") == "Couldn't connect (error: 61)"


def test_an_engine_that_gives_up_for_it_tells_so(
    system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def join(_backend: str) -> None:
        raise RuntimeError(f"[ring] Rank 0 Couldn't connect (error: {errno.EHOSTUNREACH})\n at 0x1")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(engine.Ranks, "join", join)
    monkeypatch.setattr(engine.os, "_exit", leave)
    config = engine.Config(0, str(tmp_path), str(tmp_path), None, [], None)
    near, far = map(Channel, socket.socketpair())
    with contextlib.closing(near), contextlib.closing(far):
        with pytest.raises(SystemExit) as ended:
            engine.Engine(config, near)._join(Join(fence=1, ring_generation=7, rank=0, size=2))
        _, failed = far.receive()
    assert ended.value.code == engine.BROKEN
    assert isinstance(failed, Failed) and failed.ring_generation == 7 and failed.fatal
    assert (WHERE in failed.text) == (system == "Darwin")
    assert failed.text.startswith("The engine failed while joining the ring: [ring] Rank 0")
    assert failed.text.endswith(".") and not failed.text.endswith("..")


def test_a_coordinator_that_macos_keeps_out_is_told_so_and_not_that_nobody_listens(
    system: str,
) -> None:
    (port,) = free_ports(1)

    async def scene() -> None:
        dialer = CurveDialer(Keys.new())
        try:
            await dialer.connect(f"127.0.0.1:{port}", Keys.new().public)
        finally:
            await dialer.close()

    with pytest.raises(ConnectionClosed) as caught:
        asyncio.run(scene())
    assert (WHERE in str(caught.value)) == (system == "Darwin")
    assert ("Nobody listens" in str(caught.value)) == (system == "Linux")


def test_up_tells_of_a_host_without_a_single_link_once(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> list[str]:
        async with FakeMesh(tmp_path, 3, replace(DEADLINES, link_open=0.5)) as mesh:
            while any(mesh.engine(rank).engine is None for rank in range(3)):
                await asyncio.sleep(0.01)
            reporter, dialer = Told(), mesh.network.dialer()
            unmeasured = replace(mesh.record, links=())
            work = Workload.of(ask(height=32, width=32), small())
            try:
                await Warming(unmeasured, work, reporter, Home(tmp_path)).run_with(dialer)
            finally:
                await dialer.close()
            return reporter.notes

    notes = [note for note in asyncio.run(scene()) if "can't be measured" in note]
    assert len(notes) == (3 if system == "Darwin" else 0)
    assert all(WHERE in note for note in notes)


@pytest.mark.parametrize("over_ssh", [True, False])
def test_doctor_asks_agents_and_tries_the_same_from_ssh(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_ssh: bool
) -> None:
    async def scene() -> tuple[list[reach.Denied], list[Finding]]:
        async with FakeMesh(tmp_path, 2, replace(DEADLINES, link_open=3.0)) as mesh:
            dialer = mesh.network.dialer()
            try:
                denied = await reach.denied(mesh.record, dialer)
                if not over_ssh:  # nobody reaches a port that is closed
                    (closed,) = free_ports(1)
                    denied = [(*connection[:3], closed) for connection in denied]
                return denied, await asyncio.to_thread(reach.judged, mesh.record, denied)
            finally:
                await dialer.close()

    denied, judged = asyncio.run(scene())
    if system == "Linux":
        assert denied == judged == []
        return
    assert [(source, target, ip) for source, target, ip, _ in denied] == [
        (0, 1, "127.0.0.1"),
        (1, 0, "127.0.0.1"),
    ]
    assert [finding.rank for finding in judged] == [0, 1]
    for finding in judged:
        assert (finding.check, finding.level) == ("local network", "fail" if over_ssh else "warn")
        assert WHERE in finding.text
        assert ("over ssh this Mac reaches host" in finding.text) == over_ssh
