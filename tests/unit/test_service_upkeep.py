"""An agent that loads by itself what it is to hold, between coordinators and with a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.deadlines import DEADLINES
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.client import AgentClient
from tests.fakes import FakeMesh

WEIGHTS = ModelVariant("tiny")
PARTS = ("transformer", "autoencoder", "text encoders")
KEEP = messages.Keep(weights=WEIGHTS, shards=1, shard=0, components=PARTS)


def play(folder: Path, body: Callable[[FakeMesh], Awaitable[None]]) -> None:
    """Runs `body` with one agent."""

    async def run() -> None:
        async with FakeMesh(folder, 1, replace(DEADLINES, idle=0.1, left_out=0.3)) as mesh:
            await asyncio.wait_for(body(mesh), 60)

    asyncio.run(run())


def client(mesh: FakeMesh) -> AgentClient:
    return AgentClient(mesh.network.dialer("user"), mesh.record.members[0])


async def until(mesh: FakeMesh, is_so: Callable[[messages.Status], bool]) -> messages.Status:
    """The status of the host, as soon as it is so."""
    while not is_so(status := mesh.services[0].status()):
        await asyncio.sleep(0.02)
    return status


def has_all(status: messages.Status) -> bool:
    return status.state == "ready" and set(status.components) == set(PARTS)


def test_an_engine_that_dies_is_started_and_holds_the_model_again(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
            await until(mesh, has_all)
            mesh.engine(0).die()
            status = mesh.services[0].status()
            assert (status.state, status.holds, status.components) == ("failed", None, ())
            status = await until(mesh, has_all)
            assert status.holds is not None and status.holds.weights == WEIGHTS
            assert mesh.engine(0).starts == 2

    play(tmp_path, body)


def test_an_agent_that_is_killed_knows_what_to_hold_and_one_that_is_ended_forgets(
    tmp_path: Path,
) -> None:
    async def body(mesh: FakeMesh) -> None:
        home = mesh.services[0].home
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
        assert home.keep.stat().st_mode & 0o777 == 0o600
        await mesh.kill(0)
        mesh.start(0)
        await until(mesh, has_all)
        async with client(mesh) as connection:
            await connection.ask(messages.ShutDown(), messages.Done)
            while home.keep.exists():
                await asyncio.sleep(0.02)
        await mesh.kill(0)
        mesh.start(0)
        await asyncio.sleep(0.6)
        assert mesh.services[0].status().holds is None

    play(tmp_path, body)


def test_a_damaged_file_keeps_no_agent_from_starting(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        home = mesh.services[0].home
        await mesh.kill(0)
        home.keep.write_text("{")
        home.keep.chmod(0o600)
        mesh.start(0)
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
            await until(mesh, has_all)

    play(tmp_path, body)


def test_a_host_loads_beside_the_job_that_left_it_out(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        async with client(mesh) as connection:
            granted = await connection.lease("job", 1.0, lambda _: None)
            await connection.ask(KEEP, messages.Done)
            load = messages.Load(
                fence=granted.fence,
                job="job",
                ring_generation=granted.ring_generation,
                weights=WEIGHTS,
                components=("transformer",),
            )
            await connection.ask(load, messages.Done)
            await until(mesh, lambda status: status.state == "ready")
            await connection.ask(
                messages.Kill(fence=granted.fence, ring_generation=granted.ring_generation + 1),
                messages.Done,
            )
            assert mesh.services[0].status().holds is None
            status = await until(mesh, lambda status: status.holds is not None)
            assert (status.holder != "", status.job) == (True, "job")
            assert "text encoders" not in status.components
            await connection.ask(messages.LeaveQueue(), messages.Done)
            await until(mesh, has_all)

    play(tmp_path, body)


def test_a_lease_is_granted_while_the_host_loads_by_itself(tmp_path: Path) -> None:
    """And the job's own load ends with the agent's, of which it hears as if it were its own."""

    async def body(mesh: FakeMesh) -> None:
        mesh.engine(0).pause = 0.2  # a report: the load takes 1.4 s
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
            await until(mesh, lambda status: status.loading is not None)
            status = mesh.services[0].status()
            assert (status.state, status.job, status.holds) == ("loading", "", None)
            granted = await connection.lease("job", 1.0, lambda _: None)
            load = messages.Load(
                fence=granted.fence,
                job="job",
                ring_generation=granted.ring_generation,
                weights=WEIGHTS,
                shards=1,
                shard=0,
                components=PARTS,
            )
            await connection.ask(load, messages.Done)
            heard = [await connection.report()]
            while not isinstance(heard[-1], messages.Loaded):
                heard.append(await connection.report())
            assert {getattr(report, "job", "") for report in heard} == {"job"}
            assert sum(isinstance(report, messages.Loaded) for report in heard) == 1
            assert mesh.engine(0).starts == 1

    play(tmp_path, body)


def test_a_job_with_other_weights_does_not_wait(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        mesh.engine(0).pause = 0.2
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
            await until(mesh, lambda status: status.loading is not None)
            granted = await connection.lease("job", 1.0, lambda _: None)
            other = ModelVariant("dev")
            load = messages.Load(
                fence=granted.fence,
                job="job",
                ring_generation=granted.ring_generation,
                weights=other,
                shards=1,
                shard=0,
                components=PARTS,
            )
            await connection.ask(load, messages.Done)
            while not isinstance(await connection.report(), messages.Loaded):
                continue
            status = await until(mesh, lambda status: status.state == "ready")
            assert status.holds is not None and status.holds.weights == other
            await connection.ask(messages.LeaveQueue(), messages.Done)
            await asyncio.sleep(0.5)
            held = mesh.services[0].status().holds
            assert held is not None and held.weights == other  # somebody chose them

    play(tmp_path, body)


def test_an_idle_host_gets_ready_for_a_size_that_was_asked_for(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        async with client(mesh) as connection:
            await connection.ask(KEEP, messages.Done)
            await until(mesh, has_all)
            granted = await connection.lease("job", 1.0, lambda _: None)
            assert granted.fence
            await connection.ask(messages.NoteSize(WEIGHTS, 64, 96), messages.Done)
            await asyncio.sleep(0.5)
            assert mesh.services[0].status().compiled == ()  # a job has the host
            await connection.ask(messages.LeaveQueue(), messages.Done)
            status = await until(mesh, lambda status: bool(status.compiled))
            assert status.compiled == (StepShape.of(WEIGHTS, "data", 1, 64, 96),)

    play(tmp_path, body)
