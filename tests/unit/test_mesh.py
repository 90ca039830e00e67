"""A whole mesh in one process: real sessions and real agents, without sockets and without MLX."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError, DoesNotFitError, FluxmeshError, UsageError
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import client
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.fakes import FakeMesh, FakeSupervisor
from tests.unit.mesh_jobs import Heard, check, job, play
from tests.unit.meshes import FLUX, ask, mac


@pytest.mark.parametrize("placement", ["data", "sequence", "tensor"])
def test_all_hosts_take_part_in_a_request(tmp_path: Path, placement: Any) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked, heard = job(n_images=4, placement=placement), Heard()
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)
        counts = [len(mesh.engine(rank).made) for rank in range(4)]
        assert counts == ([3] * 4 if placement == "data" else [12] * 4)
        statuses = await pool.statuses()
        assert [status.holder for status in statuses.values()] == [""] * 4
        assert sum(status.counters.encodes for status in statuses.values()) == 1

    play(tmp_path, 4, body)


def test_the_next_job_goes_on_in_the_ring_of_the_last(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        for name in ("one", "two"):
            asked, heard = job(name, placement="tensor"), Heard()
            await JobRunner(pool, GenerationSession(asked), {}, heard).run()
            check(heard, asked)
        statuses = await pool.statuses()
        assert {status.ring_generation for status in statuses.values()} == {1}
        assert [mesh.engine(rank).starts for rank in range(2)] == [1, 1]

    play(tmp_path, 2, body)


def test_two_coordinators_wait_for_each_other_and_both_finish(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer("other")) as other:
            asked = [job("one", n_images=6, steps=8), job("two", n_images=2)]
            heard = [Heard(), Heard()]
            session = GenerationSession(asked[0])
            first = asyncio.create_task(JobRunner(pool, session, {}, heard[0]).run())
            while not heard[0].of(events.Step):
                await asyncio.sleep(0.01)
            await JobRunner(other, GenerationSession(asked[1]), {}, heard[1]).run()
            assert first.done()
            for job_heard, job_asked in zip(heard, asked, strict=True):
                check(job_heard, job_asked)
            queued = heard[1].of(events.Queued)
            assert [(event.place, event.host) for event in queued][:1] == [(1, 0)]

    play(tmp_path, 2, body)


def test_what_fits_nowhere_is_exit_4(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        with pytest.raises(DoesNotFitError, match="which needs two hosts") as caught:
            await JobRunner(pool, GenerationSession(job(placement="tensor")), {}, Heard()).run()
        assert caught.value.exit_code == 4

    play(tmp_path, 1, body)


def test_what_would_make_it_fit_is_told_with_the_refusal(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        gib = 1 << 30
        small_mac = mac(0, memory_bytes=11 * gib, free_bytes=15 * gib, platform="metal", holds=None)

        async def infos() -> dict[int, Any]:
            return {0: small_mac}

        pool.infos = infos  # type: ignore[method-assign]
        asked = dataclasses.replace(job(height=1024, width=1024), sizes=FLUX)
        with pytest.raises(DoesNotFitError) as caught:
            await JobRunner(pool, GenerationSession(asked), {}, Heard()).run()
        assert str(caught.value) == (
            "No placement can be done: host 0 needs 28.1 GB and may use 11.8 GB. "
            "It fits with `quantize` `bits` 8 `low_memory` (9.9 GB)."
        )

    play(tmp_path, 1, body)


def test_a_program_holds_a_mesh_and_streams_a_job(tmp_path: Path) -> None:
    """Through `Mesh` itself, whose loop runs in a thread of its own."""
    fake: list[FakeMesh] = []

    def dialer() -> Any:
        fake.append(FakeMesh(tmp_path, 2))
        fake[0].start(0)
        fake[0].start(1)
        return fake[0].network.dialer()

    record = FakeMesh(tmp_path, 2).record
    request = ask(model="tiny", height=32, width=32, n_images=2)
    with Mesh(record, dialer) as mesh:
        assert [host.rank for host in mesh.view.hosts] == [0, 1]
        assert mesh.plan(request).winner is not None
        job_events = list(mesh.generate(request, placement="data"))
        assert [type(event) for event in job_events].count(events.Picture) == 2
        stream = mesh.generate(dataclasses.replace(request, steps=500))
        assert next(event for event in stream if isinstance(event, events.Step)).step == 1
        stream.close()
        status = mesh.status()
        assert {rank: getattr(answer, "job", answer) for rank, answer in status.items()} == {
            0: "",
            1: "",
        }
        with pytest.raises(UsageError, match="`placement` is 'pipeline'"):
            next(mesh.generate(request, cast(Any, "pipeline")))
        with pytest.raises(UsageError, match="exclude each other"):
            mesh.plan(request, "data", force_shard=True)
        with pytest.raises(FluxmeshError, match="nobody"):
            next(mesh.generate(dataclasses.replace(request, model="nobody")))
        asyncio.run_coroutine_threadsafe(fake[0].__aexit__(), mesh._loop).result()
    mesh.close()


def test_hosts_are_told_what_they_work_at_and_how_far_it_is(tmp_path: Path) -> None:
    quick = dataclasses.replace(DEADLINES, heartbeat=0.02, tick=0.01)

    def dialer() -> Any:
        fake = FakeMesh(tmp_path, 1, quick)
        fake.start(0)
        made = fake.network.dialer("anna@studio")
        made.close = fake.__aexit__  # type: ignore[method-assign]
        return made

    with Mesh(FakeMesh(tmp_path, 1).record, dialer, deadlines=quick) as mesh:
        assert not any(isinstance(each, str) or each.lease for each in mesh.status().values())
        stream = mesh.generate(ask(model="tiny", height=32, width=32, steps=1000, n_images=3))
        for event in stream:
            if isinstance(event, events.Step) and event.step == 200:
                break
        status = mesh.status()[0]
        stream.close()
        assert not isinstance(status, str) and status.lease is not None
        progress = status.lease.progress
        assert (status.lease.user, status.lease.title) == ("anna@studio", "3 images, 32x32")
        assert (progress.unit, progress.done, progress.total) == ("image", 0, 3)
        assert progress.steps == 1000 and progress.step > 0 and progress.seconds > 0


def test_closing_a_mesh_cancels_what_runs_on_it(tmp_path: Path) -> None:
    holders: list[str] = []

    def dialer() -> Any:
        fake = FakeMesh(tmp_path, 1)
        fake.start(0)
        made = fake.network.dialer()

        async def close() -> None:
            holders.append(fake.services[0].leases.holder)
            await fake.__aexit__()

        made.close = close  # type: ignore[method-assign]
        return made

    mesh = Mesh(FakeMesh(tmp_path, 1).record, dialer)
    stream = mesh.generate(ask(model="tiny", height=32, width=32, steps=1000))
    assert next(event for event in stream if isinstance(event, events.Step)).step == 1
    mesh.close()
    mesh.close()
    assert holders == [""]
    with pytest.raises(CancelledError):
        list(stream)


@pytest.mark.parametrize("placement", ["data", "sequence", "tensor"])
def test_a_warm_job_asks_each_host_for_its_work_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Any
) -> None:
    """Each question is a round trip that the user waits for."""
    asked: dict[int, list[str]] = {}
    post = client.AgentClient.post

    async def posted(self: client.AgentClient, message: messages.Message) -> Any:
        if not isinstance(message, messages.TellProgress):  # told by the clock, each second
            asked.setdefault(self.member.rank, []).append(type(message).__name__)
        return await post(self, message)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        await JobRunner(
            pool, GenerationSession(job("cold", placement=placement)), {}, Heard()
        ).run()
        monkeypatch.setattr(client.AgentClient, "post", posted)
        await JobRunner(
            pool, GenerationSession(job("warm", placement=placement)), {}, Heard()
        ).run()
        first = ["AskStatus", "AskLease", "Encode", "Load", "Paint", "Decode", "LeaveQueue"]
        other = ["AskStatus", "AskLease", "Load", "Paint", "LeaveQueue"]
        assert asked == {0: first, 1: ["AskStatus"] if placement == "data" else other}

    play(tmp_path, 2, body)


def test_a_host_that_is_slow_to_answer_is_waited_for_where_the_job_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine has just been started, on a machine that does much else."""
    run = FakeSupervisor._run
    may_begin = asyncio.Event()

    async def slowly(self: FakeSupervisor, engine: Any) -> None:
        if self.home_rank == 1:
            await may_begin.wait()
        await run(self, engine)

    started = iter(range(2))
    begin = FakeSupervisor.start

    def start(self: FakeSupervisor, envs: tuple[tuple[str, str], ...] = ()) -> None:
        self.home_rank = next(started, 0)  # type: ignore[attr-defined]
        begin(self, envs)

    monkeypatch.setattr(FakeSupervisor, "_run", slowly)
    monkeypatch.setattr(FakeSupervisor, "start", start)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        assert list(pool.clients) == [0] and pool.reasons == {}
        asyncio.get_running_loop().call_later(1.0, may_begin.set)
        asked, heard = job(placement="sequence"), Heard()
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)

    play(tmp_path, 2, body, deadlines=replace(DEADLINES, others=0.2))
