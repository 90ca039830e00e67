"""A whole mesh in one process that loses engines, agents and messages: what goes on and is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, HostUnreachableError, WeightsError
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.mesh_file import Member
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.replay import from_bytes
from fluxmesh_coordinator.jobs.types import Reported
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.failed_jobs import FailedJobs
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.broken_transport import BrokenDialer, Faults
from tests.fakes import FakeMesh
from tests.unit.mesh_jobs import Heard, check, job, play, together


@pytest.mark.parametrize("placement", ["data", "sequence"])
def test_an_engine_that_dies_costs_no_acknowledged_step(tmp_path: Path, placement: Any) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = job(n_images=2, steps=6, placement=placement)
        heard = Heard(events.Step, lambda: mesh.engine(1).die())
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)
        assert [lost.host for lost in heard.of(events.HostLost)] == [1]
        steps = [(event.image, event.step) for event in heard.of(events.Step)]
        assert len(steps) == len(set(steps)) == 12
        if placement == "data":
            assert mesh.engine(0).starts == 1

    play(tmp_path, 2, body)


@pytest.mark.parametrize("fails", [None, FluxmeshError("It is not there."), OSError("No disk.")])
def test_an_agent_that_is_started_again_goes_on_from_the_last_step(
    tmp_path: Path, fails: Exception | None
) -> None:
    """Also where the first start of it fails, in whatever way."""
    tries: list[int] = []

    def restart(mesh: FakeMesh, loop: asyncio.AbstractEventLoop) -> Callable[[int], Member]:
        def again(rank: int) -> Member:
            tries.append(rank)
            if fails is not None and len(tries) == 1:
                raise fails
            loop.call_soon_threadsafe(mesh.start, rank)
            return mesh.record.members[rank]

        return again

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = job(steps=8)
        heard = Heard(events.Step, lambda: together(asyncio.get_running_loop(), mesh.kill(0)))
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)
        (lost,) = heard.of(events.HostLost)
        assert lost.host == 0
        made = mesh.engine(0).made
        assert made and made[0][1] > 1 and made[-1] == (0, 8)

    play(tmp_path, 1, body, restart=restart)


def test_the_others_go_on_when_an_agent_is_gone_for_good(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = job(n_images=6, placement="data")
        heard = Heard(events.Step, lambda: together(asyncio.get_running_loop(), mesh.kill(1)))
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)

    play(tmp_path, 3, body)


def test_a_mesh_none_of_whose_hosts_answers_is_exit_3(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        await mesh.kill(0)
        while pool.clients:
            for rank, known in list(pool.clients.items()):
                pool.lost(rank, known, "gone")
            await asyncio.sleep(0.05)
        with pytest.raises(HostUnreachableError, match="No host of mesh.json answers") as caught:
            await JobRunner(pool, GenerationSession(job()), {}, Heard()).run()
        assert caught.value.exit_code == 3

    play(tmp_path, 1, body)


def test_wait_is_how_long_a_host_may_take_to_return(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        await mesh.kill(0)
        for rank, known in list(pool.clients.items()):
            pool.lost(rank, known, "gone")
        asyncio.get_running_loop().call_later(1.0, mesh.start, 0)
        asked, heard = job(), Heard()
        await JobRunner(pool, GenerationSession(asked), {}, heard).run(wait=20)
        check(heard, asked)

    play(tmp_path, 1, body)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("placement", ["data", "tensor"])
def test_messages_that_come_twice_or_late_or_break_off_change_no_picture(
    tmp_path: Path, placement: Any, seed: int
) -> None:
    faults = Faults(seed=seed, repeat=0.2, delay=0.05, seconds=0.02, cut=0.002)

    async def body(mesh: FakeMesh, _: AgentPool) -> None:
        dialer = BrokenDialer(mesh.network.dialer("broken"), faults)
        async with AgentPool(mesh.record, dialer) as pool:
            asked, heard = job(n_images=6, placement=placement), Heard()
            await JobRunner(pool, GenerationSession(asked), {}, heard).run(wait=20)
            check(heard, asked)

    play(tmp_path, 3, body)


def test_a_word_that_is_lost_is_asked_for_again(
    tmp_path: Path,
) -> None:
    soon = replace(DEADLINES, hear_place=0.3, order=0.5)
    faults = Faults(seed=1, drop=0.4, only=(messages.Granted, messages.Ports))

    async def body(mesh: FakeMesh, _: AgentPool) -> None:
        dialer = BrokenDialer(mesh.network.dialer("broken"), faults)
        async with AgentPool(mesh.record, dialer, deadlines=soon) as pool:
            asked, heard = job(placement="sequence"), Heard()
            await JobRunner(pool, GenerationSession(asked), {}, heard).run(wait=20)
            check(heard, asked)

    play(tmp_path, 3, body)


def test_what_led_to_a_failure_is_written_down_and_replays(tmp_path: Path) -> None:
    """With real agents: what a session heard of them is enough to hear it again."""
    folder = tmp_path / "failed"

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        engine = mesh.engine(1).engine
        assert engine is not None
        engine.content = "newer"
        asked = job(prompt="my aunt Matilda", n_images=4, placement="sequence")
        runner = JobRunner(pool, GenerationSession(asked), {}, Heard(), FailedJobs(folder))
        with pytest.raises(WeightsError, match="different files") as caught:
            await runner.run()
        assert str(folder) in caught.value.__notes__[0]

    play(tmp_path, 3, body)
    (path,) = folder.iterdir()
    assert b"Matilda" not in path.read_bytes()
    replay = from_bytes(path.read_bytes())
    assert "different files" in replay.error and len(replay.log.noted) > 10
    assert replay.differences() == []


def test_a_mistake_of_a_session_is_written_down_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "failed"

    def wrong(*_: Any) -> None:
        raise ZeroDivisionError

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        session = GenerationSession(job())
        monkeypatch.setattr(session, "reported", wrong)
        with pytest.raises(ZeroDivisionError) as caught:
            await JobRunner(pool, session, {}, Heard(), FailedJobs(folder)).run()
        assert str(folder) in caught.value.__notes__[0]

    play(tmp_path, 1, body)
    (path,) = folder.iterdir()
    assert isinstance(from_bytes(path.read_bytes()).log.noted[-1].event, Reported)
