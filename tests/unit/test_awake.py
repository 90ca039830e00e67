"""Who works on a Mac keeps it awake: an agent that is leased, a coordinator that has a job."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fluxmesh import events
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.fakes import FakeMesh
from tests.mac import Mac, mac
from tests.unit.meshes import ask, small


@pytest.fixture
def a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mac:
    made = mac(tmp_path / "mac", monkeypatch)
    made.caffeinate()
    return made


async def until(made: Mac, *, awake: bool) -> None:
    async with asyncio.timeout(60):
        while made.is_awake() is not awake:
            await asyncio.sleep(0.05)


def test_an_agent_keeps_its_mac_awake_from_lease_to_lease(tmp_path: Path, a_mac: Mac) -> None:
    async def scene() -> None:
        async with FakeMesh(tmp_path, 1) as mesh:
            client = AgentClient(mesh.network.dialer("user"), mesh.record.members[0])
            await client.__aenter__()
            await asyncio.sleep(0.6)  # two of its looks
            assert a_mac.caffeinated() == [], "nobody works"
            for count in (1, 2):
                await client.lease("job", 1.0, lambda _: None)
                await until(a_mac, awake=True)
                assert len(a_mac.caffeinated()) == count
                await client.ask(messages.LeaveQueue(), messages.Done)
                await until(a_mac, awake=False)
            await client.lease("job", 1.0, lambda _: None)
            await until(a_mac, awake=True)
            await client.close()
        assert not a_mac.is_awake(), "the agent has ended"

    asyncio.run(scene())


def test_a_coordinator_keeps_its_mac_awake_while_it_has_a_job(tmp_path: Path, a_mac: Mac) -> None:
    """Not by way of its agents, which are elsewhere here: they know of no caffeinate."""

    async def scene() -> None:
        async with FakeMesh(tmp_path, 1) as mesh:
            for service in mesh.services.values():
                service._wakefulness.hold = lambda: None  # type: ignore[method-assign]
            async with AgentPool(mesh.record, mesh.network.dialer()) as pool:
                assert a_mac.caffeinated() == []
                heard: list[events.Event] = []

                mesh.engine(0).pause = 0.4
                request = ask(height=32, width=32, steps=3)
                asked = GenerationJob(id="job", secret=b"s", request=request, sizes=small())
                work = asyncio.create_task(
                    JobRunner(pool, GenerationSession(asked), {}, heard.append).run()
                )
                await until(a_mac, awake=True)
                await work
                assert not a_mac.is_awake()
                assert len(a_mac.caffeinated()) == 1
                assert any(isinstance(event, events.Picture) for event in heard)

    asyncio.run(scene())
