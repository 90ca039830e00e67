"""What a job leaves with the agents for the time after it, through `Mesh` and with fake engines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError
from fluxmesh.request import FilledRequest
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.runtime.lent_hosts import HostBook
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.fakes import FakeMesh
from tests.unit.meshes import ask

KEEP = messages.Keep(
    weights=ModelVariant("tiny"), shards=1, shard=0, components=("transformer", "autoencoder")
)
REQUEST = ask(model="tiny", height=32, width=48, steps=20, n_images=1)


@contextmanager
def mesh_of(folder: Path, hosts: int) -> Iterator[tuple[Mesh, FakeMesh]]:
    """A mesh whose agents know what to hold; they run in its own loop."""
    fake = FakeMesh(folder, hosts, replace(DEADLINES, idle=0.2))

    def dialer() -> Any:
        for rank in range(hosts):
            fake.start(rank)
        return fake.network.dialer()

    with Mesh(fake.record, dialer) as mesh:
        try:
            mesh._run(mesh._pool.tell(dict.fromkeys(range(hosts), KEEP)))
            yield mesh, fake
        finally:
            asyncio.run_coroutine_threadsafe(fake.__aexit__(), mesh._loop).result()


def wait(mesh: Mesh, is_so: Callable[[messages.Status], bool]) -> None:
    """Until it is so of every host."""
    end = time.monotonic() + 60.0
    while not all(isinstance(s, messages.Status) and is_so(s) for s in mesh.status().values()):
        assert time.monotonic() < end, mesh.status()
        time.sleep(0.05)


def test_a_job_that_is_cancelled_as_it_begins_waits_for_no_host(tmp_path: Path) -> None:
    with mesh_of(tmp_path, 1) as (mesh, _):
        resolved = mesh.resolve(REQUEST)
        book = HostBook([0])
        other, lent = book.lend([0]), book.lend([0])  # it waits for the host, and hears of nothing
        stream = mesh.paint(resolved, lent=lent)
        mesh.cancel(lent)  # in the very moment before the mesh knows of it
        giving = threading.Timer(60.0, other.give_back)
        giving.start()
        begun = time.monotonic()
        with pytest.raises(CancelledError):
            next(stream)
        assert time.monotonic() - begun < 30.0
        giving.cancel()


def test_hosts_that_did_not_make_a_picture_get_ready_for_its_size(tmp_path: Path) -> None:
    with mesh_of(tmp_path, 2) as (mesh, _):
        wait(mesh, lambda status: status.holds is not None)
        job_events = list(mesh.generate(REQUEST, "data"))
        assert any(isinstance(event, events.Picture) for event in job_events)
        way = StepShape.of(ModelVariant("tiny"), "data", 1, 32, 48)
        wait(mesh, lambda status: way in status.compiled)


def test_a_size_is_told_once_and_again_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[messages.Message] = []
    ask_agent = AgentClient.ask

    async def counted(client: AgentClient, message: messages.Message, *more: Any) -> Any:
        asked.append(message)
        return await ask_agent(client, message, *more)

    def asked_of(request: FilledRequest, kind: type[messages.Message]) -> int:
        asked.clear()
        list(mesh.generate(request, "data"))
        return sum(isinstance(message, kind) for message in asked)

    with mesh_of(tmp_path, 2) as (mesh, _):
        wait(mesh, lambda status: status.holds is not None)
        monkeypatch.setattr(AgentClient, "ask", counted)
        small, large = replace(REQUEST, steps=1), replace(REQUEST, steps=1, height=64)
        notes = [asked_of(request, messages.NoteSize) for request in (small, small, large, small)]
        assert notes == [2, 0, 2, 2]
        # One status a host to plan with: whoever knows the size is asked nothing after the job.
        assert asked_of(small, messages.AskStatus) == 2


def test_a_mesh_that_ends_with_the_program_is_told_nothing(tmp_path: Path) -> None:
    with mesh_of(tmp_path, 2) as (mesh, _):
        mesh.keeps_warm = False
        list(mesh.generate(REQUEST, "data"))
        time.sleep(1.0)
        statuses = [
            answer for answer in mesh.status().values() if isinstance(answer, messages.Status)
        ]
        assert sorted(len(status.compiled) for status in statuses) == [0, 1]  # who made it


@pytest.mark.parametrize("deaths", [0, 2])
def test_a_ring_is_left_where_it_was_made_of_what_a_loss_had_left(
    tmp_path: Path, deaths: int
) -> None:
    """Of two deaths host 2 is to blame, and the job goes on without it."""
    with mesh_of(tmp_path, 3) as (mesh, fake):
        for rank in range(3):
            fake.engine(rank).pause = 0.1  # a step: this thread hears of it before the job is over
        left, plans = deaths, []
        for event in mesh.generate(REQUEST, "sequence"):
            if isinstance(event, events.Planned):
                plans.append(event.hosts)
            if isinstance(event, events.Step) and left and event.step % 5 == 0:
                left -= 1
                mesh._loop.call_soon_threadsafe(fake.engine(2).die)
        if deaths:
            assert plans[0] == (0, 1, 2) and plans[-1] == (0, 1)
            wait(mesh, lambda status: status.ring_size == 1 and status.holds is not None)
        else:
            assert plans == [(0, 1, 2)]
            time.sleep(1.0)
            wait(mesh, lambda status: status.ring_size == 3 and status.holds is not None)
            assert [fake.engine(rank).starts for rank in range(3)] == [1, 1, 1]
