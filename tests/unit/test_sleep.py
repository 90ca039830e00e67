"""A machine that slept loses no weights by it: neither the coordinator's nor an agent's.

What a sleep does is put in by hand: clocks that went on while nobody ran, and conversations that
ZeroMQ has ended because of that. Agents and coordinators are real, engines count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import HostUnreachableError
from fluxmesh.machine import clock
from fluxmesh.wire import messages
from fluxmesh_agent import service
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import Member
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.fakes import FakeMesh, expected
from tests.unit.meshes import ask, small

SIZES = small()


class Sleeper:
    """The clocks of this process, which can jump as they do for one that stood still."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def time(self) -> float:
        return time.time() + self.slept


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> Sleeper:
    made = Sleeper()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=made.monotonic, time=made.time))
    return made


def play(
    folder: Path,
    body: Callable[[FakeMesh], Awaitable[None]],
    hosts: int = 1,
    **deadlines: float,
) -> None:
    async def run() -> None:
        async with FakeMesh(folder, hosts, replace(DEADLINES, **deadlines)) as mesh:
            await asyncio.wait_for(body(mesh), 60)

    asyncio.run(run())


async def leased(mesh: FakeMesh) -> tuple[AgentClient, messages.Load]:
    client = AgentClient(mesh.network.dialer("user"), mesh.record.members[0])
    await client.__aenter__()
    granted = await client.lease("job", 1.0, lambda _: None)
    return client, messages.Load(
        fence=granted.fence,
        job="job",
        ring_generation=granted.ring_generation,
        weights=ModelVariant("tiny"),
    )


async def loaded(client: AgentClient, load: messages.Load) -> None:
    await client.ask(load, messages.Done)
    while not isinstance(await client.report(), messages.Loaded):
        continue


@pytest.mark.parametrize("placement", ["data", "sequence"])
def test_a_job_whose_conversations_broke_in_a_sleep_goes_on_with_the_weights_that_are_there(
    tmp_path: Path, placement: Any
) -> None:
    """A step takes longer than an engine has to let go; to load the weights again, longer still."""
    request = ask(height=32, width=32, steps=4)
    heard: list[events.Event] = []

    async def body(mesh: FakeMesh) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer()) as held:

            def tell(event: events.Event) -> None:
                heard.append(event)
                steps = [
                    step_event.step for step_event in heard if isinstance(step_event, events.Step)
                ]
                if isinstance(event, events.Step) and steps == [1]:
                    slow(0.5)
                elif isinstance(event, events.Step) and steps == [1, 2]:
                    for rank, client in list(held.clients.items()):
                        held.lost(rank, client, "It is silent for too long.")
                elif isinstance(event, events.HostLost):
                    slow(0.002)  # from the next report on

            def slow(pause: float) -> None:
                for rank in range(2):
                    mesh.engine(rank).pause = pause

            asked = GenerationJob(
                id="job",
                secret=b"secret",
                request=request,
                sizes=SIZES,
                placement=placement,
                force_shard=placement != "data",
            )
            await JobRunner(held, GenerationSession(asked), {}, tell).run()
            assert [mesh.engine(rank).starts for rank in range(2)] == [1, 1]

    play(tmp_path, body, hosts=2, letting_go=0.2)
    (picture,) = [event for event in heard if isinstance(event, events.Picture)]
    assert np.array_equal(picture.pixels, expected(request, SIZES, 0))


def test_an_agent_that_slept_has_not_heard_its_coordinators_silence(
    tmp_path: Path, sleeper: Sleeper
) -> None:
    async def body(mesh: FakeMesh) -> None:
        client, _ = await leased(mesh)
        holder = mesh.services[0].leases.holder
        sleeper.slept += 600.0
        await asyncio.sleep(1.0)
        assert mesh.services[0].leases.holder == holder
        await client.close()

    play(tmp_path, body)


def test_the_silence_of_a_coordinator_that_did_not_wake_counts_from_then(
    tmp_path: Path, sleeper: Sleeper
) -> None:
    async def body(mesh: FakeMesh) -> None:
        client, _ = await leased(mesh)
        sleeper.slept += 600.0
        for task in client._tasks:  # it says nothing any more
            task.cancel()
        await asyncio.sleep(0.5)
        assert mesh.services[0].leases.holder
        async with asyncio.timeout(60):
            while mesh.services[0].leases.holder:
                await asyncio.sleep(0.05)
        await client.close()

    play(tmp_path, body, silence=3.0)


def test_an_engine_that_slept_with_its_agent_is_given_its_time_after_that(
    tmp_path: Path, sleeper: Sleeper
) -> None:
    async def body(mesh: FakeMesh) -> None:
        client, load = await leased(mesh)
        await loaded(client, load)
        mesh.engine(0).stop()
        await client.ask(load, messages.Done)
        await client.ask(messages.LeaveQueue(), messages.Done)
        sleeper.slept += 600.0
        await asyncio.sleep(1.0)
        assert mesh.engine(0).engine is not None
        async with asyncio.timeout(60):  # one that hangs is still ended
            while mesh.engine(0).engine is not None:
                await asyncio.sleep(0.05)
        await client.close()

    play(tmp_path, body, letting_go=2.5)


def test_an_agent_that_is_slow_to_wake_is_not_started_again_with_its_weights(
    tmp_path: Path,
) -> None:
    slow, restarts = replace(DEADLINES, answer_again=0.2, waking=1.5), list[float]()

    async def body(mesh: FakeMesh) -> None:
        async def hang(*_: Any) -> None:
            await asyncio.sleep(60)

        def restart(rank: int) -> Member:
            restarts.append(time.monotonic())
            return mesh.record.members[rank]

        async with AgentPool(mesh.record, mesh.network.dialer(), restart, deadlines=slow) as held:
            mesh.services[0]._welcome = hang  # type: ignore[method-assign, assignment]
            woke = held._clock._woke = time.monotonic()
            held.lost(0, held.clients[0], "It is silent for too long.")
            async with asyncio.timeout(60):
                while not restarts:  # one that still hangs then is
                    await asyncio.sleep(0.05)
            assert restarts[0] - woke >= 1.5

    play(tmp_path, body)


def test_a_coordinator_that_slept_has_not_heard_its_agents_silence(
    tmp_path: Path, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(mesh: FakeMesh) -> None:
        client, _ = await leased(mesh)
        holder = mesh.services[0]._clients[mesh.services[0].leases.holder]
        monkeypatch.setattr(holder, "tell", lambda _report: None)  # its agent wakes later
        sleeper.slept += 600.0
        await asyncio.sleep(2.5)
        await client.ask(messages.AskStatus(), messages.Status)
        client.deadlines = replace(DEADLINES, silence=1.5)
        with pytest.raises(HostUnreachableError, match="silent"):
            async with asyncio.timeout(60):
                while True:
                    await client.report()
        await client.close()

    play(tmp_path, body)


def test_an_agent_that_stood_still_loads_what_is_missing_no_later_than_before(
    tmp_path: Path, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after as long again as it stood still: when it was used last is told by one clock."""
    monkeypatch.setattr(service, "time", clock.time)
    weights = ModelVariant("tiny")
    keep = messages.Keep(weights=weights, shards=1, shard=0, components=("transformer",))

    async def until_held(mesh: FakeMesh) -> None:
        while (holds := mesh.services[0].status().holds) is None or holds.weights != weights:
            await asyncio.sleep(0.02)

    async def body(mesh: FakeMesh) -> None:
        async with AgentClient(mesh.network.dialer("user"), mesh.record.members[0]) as client:
            await client.ask(keep, messages.Done)
        await until_held(mesh)
        sleeper.slept += 3600
        await asyncio.sleep(4 * DEADLINES.tick)
        mesh.engine(0).die()
        assert mesh.services[0].status().holds is None
        await until_held(mesh)
        assert mesh.engine(0).starts == 2

    play(tmp_path, body, idle=0.1)
