"""A whole mesh in one process: real sessions and real agents, without sockets and without MLX."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import (
    CancelledError,
    DoesNotFitError,
    FluxmeshError,
    HostUnreachableError,
    ModelNotFoundError,
    WeightsError,
)
from fluxmesh.request import AdapterRef
from fluxmesh.wire import messages
from fluxmesh_agent.adapter_store import AdapterStore
from fluxmesh_coordinator.agents import client
from fluxmesh_coordinator.agents.mesh_file import Member
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.jobs.replay import from_bytes
from fluxmesh_coordinator.jobs.types import Reported
from fluxmesh_coordinator.runtime import adapter_upload
from fluxmesh_coordinator.runtime.adapter_upload import by_hash, with_names
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.failed_jobs import FailedJobs
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.broken_transport import BrokenDialer, Faults
from tests.fakes import FakeMesh, FakeSupervisor, expected
from tests.unit.meshes import FLUX, ask, mac, small

SIZES = small()


def job(name: str = "job", **keys: Any) -> GenerationJob:
    placement, force = keys.pop("placement", None), keys.pop("force_shard", False)
    request = ask(**{"height": 32, "width": 32, "steps": 3, **keys})
    return GenerationJob(
        id=name,
        secret=b"secret",
        request=request,
        sizes=SIZES,
        placement=placement,
        force_shard=force,
    )


class Heard(list[events.Event]):
    """The events of a job, and something to do when the first of a kind comes."""

    def __init__(self, kind: type[Any] | None = None, do: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.kind, self.do = kind, do

    def __call__(self, event: events.Event) -> None:
        self.append(event)
        if self.do is not None and self.kind is not None and isinstance(event, self.kind):
            do, self.do = self.do, None
            do()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


def check(heard: Heard, done: GenerationJob) -> None:
    """Every picture came once, and is right."""
    pictures = {event.image: event.pixels for event in heard.of(events.Picture)}
    assert len(heard.of(events.Picture)) == len(pictures) == done.request.n_images
    for image, pixels in pictures.items():
        assert np.array_equal(pixels, expected(done.request, SIZES, image))


def play(
    folder: Path, hosts: int, body: Callable[[FakeMesh, AgentPool], Awaitable[None]], **more: Any
) -> None:
    """Runs `body` on a mesh of that many hosts and a coordinator connected to it."""

    async def run() -> None:
        async with FakeMesh(folder, hosts) as mesh:
            restart = more.get("restart")
            if restart is not None:
                restart = restart(mesh, asyncio.get_running_loop())
            deadlines = more.get("deadlines", DEADLINES)
            pool = AgentPool(mesh.record, mesh.network.dialer(), restart, deadlines=deadlines)
            async with pool:
                await asyncio.wait_for(body(mesh, pool), 60)

    asyncio.run(run())


def together(loop: asyncio.AbstractEventLoop, work: Any) -> None:
    """Starts a coroutine and keeps it alive."""
    task = loop.create_task(work)
    task.add_done_callback(lambda _: None)
    _TASKS.append(task)


_TASKS: list[Any] = []


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


def test_an_agent_that_is_started_again_goes_on_from_the_last_step(tmp_path: Path) -> None:
    def restart(mesh: FakeMesh, loop: asyncio.AbstractEventLoop) -> Callable[[int], Member]:
        def again(rank: int) -> Member:
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


@pytest.mark.parametrize("placement", ["data", "tensor"])
def test_a_cancelled_job_leaves_the_mesh_idle_and_warm(tmp_path: Path, placement: Any) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = job("one", n_images=2, steps=100, placement=placement)
        heard = Heard(events.Step, lambda: runner.stop.set())
        runner = JobRunner(pool, GenerationSession(asked), {}, heard)
        with pytest.raises(CancelledError):
            await runner.run()
        assert len(heard.of(events.Step)) < 10
        assert all(service.lifecycle.is_free for service in mesh.services.values())
        assert [mesh.engine(rank).starts for rank in range(2)] == [1, 1]
        again, heard = job("two", placement=placement), Heard()
        await JobRunner(pool, GenerationSession(again), {}, heard).run()
        check(heard, again)

    play(tmp_path, 2, body)


def test_who_waits_in_line_can_leave_it(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer("other")) as other:
            asked, heard = job("one", n_images=3, steps=20), Heard()
            session = GenerationSession(asked)
            first = asyncio.create_task(JobRunner(pool, session, {}, heard).run())
            while not heard.of(events.Step):
                await asyncio.sleep(0.01)
            waiting = Heard(events.Queued, lambda: second.stop.set())
            second = JobRunner(other, GenerationSession(job("two")), {}, waiting)
            with pytest.raises(CancelledError):
                await second.run()
            assert mesh.services[0].leases.waiting == 0
            await first
            check(heard, asked)

    play(tmp_path, 1, body)


def test_a_host_that_a_job_uses_no_more_is_free_for_others(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        session = GenerationSession(job(n_images=40, steps=500, placement="data"))
        runner = JobRunner(pool, session, {}, Heard())
        running = asyncio.create_task(runner.run())
        while session.given_up([1]) is None:
            if 1 in runner._leased:
                runner._gone(1, runner._leased[1], "The cable was pulled.")
            await asyncio.sleep(0.01)
        while 1 not in pool.clients:
            await pool.change(1.0)
        await asyncio.sleep(1.5)
        assert not running.done() and mesh.services[0].leases.holder
        assert mesh.services[1].leases.holder == ""
        runner.stop.set()
        with pytest.raises(CancelledError):
            await running

    play(tmp_path, 2, body)


def test_a_host_whose_engine_failed_too_often_is_free_for_others(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        session = GenerationSession(job(n_images=40, steps=500, placement="data"))
        runner = JobRunner(pool, session, {}, Heard())
        running = asyncio.create_task(runner.run())
        while session.given_up([1]) is None:
            if mesh.engine(1).made:
                mesh.engine(1).die()
            await asyncio.sleep(0.01)
        while mesh.services[1].leases.holder:
            await asyncio.sleep(0.05)
        assert not running.done() and mesh.services[0].leases.holder
        runner.stop.set()
        with pytest.raises(CancelledError):
            await running

    play(tmp_path, 2, body)


def test_adapters_travel_once_and_by_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(bytes(range(256)) * 40000)
    named, files = by_hash([AdapterRef(str(path), 0.5)])
    asked = job(adapters=named)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        heard = Heard()
        await JobRunner(pool, GenerationSession(asked), files, heard).run()
        check(heard, asked)
        stored = tmp_path / "agent-0" / "adapters" / f"{named[0].path}.safetensors"
        assert stored.read_bytes() == path.read_bytes()
        path.unlink()  # the host has it: nothing is read again
        await JobRunner(
            pool, GenerationSession(dataclasses.replace(asked, id="two")), files, Heard()
        ).run()

    play(tmp_path, 1, body)


def test_an_adapter_that_takes_long_to_send_is_no_reason_to_call_an_engine_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(bytes(600))
    named, files = by_hash([AdapterRef(str(path))])
    monkeypatch.setattr(adapter_upload, "PIECE", 100)
    put, soon = AdapterStore.put, replace(DEADLINES, silence=0.5)

    def slowly(self: AdapterStore, *piece: Any) -> None:
        time.sleep(0.2)
        put(self, *piece)

    monkeypatch.setattr(AdapterStore, "put", slowly)
    asked, heard = job(adapters=named), Heard()

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        await JobRunner(pool, GenerationSession(asked, soon), files, heard).run()
        check(heard, asked)
        assert heard.of(events.HostLost) == []
        loadings = [event for event in heard.of(events.Loading) if event.component == "adapter"]
        assert [event.done_bytes for event in loadings] == [0, 100, 200, 300, 400, 500, 600]

    play(tmp_path, 1, body)


def test_sentences_of_agents_name_adapters_as_the_user_did(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"dog")
    (adapter,), files = by_hash([AdapterRef(str(path))])
    said = f"The adapter /state/adapters/{adapter.path}.safetensors fits no key."
    assert with_names(said, files) == f"The adapter {path} fits no key."
    with pytest.raises(ModelNotFoundError, match="cat"):
        by_hash([AdapterRef(str(tmp_path / "cat.safetensors"))])


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
        with pytest.raises(FluxmeshError, match="nobody"):
            next(mesh.generate(dataclasses.replace(request, model="nobody")))
        asyncio.run_coroutine_threadsafe(fake[0].__aexit__(), mesh._loop).result()
    mesh.close()


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

    async def slowly(self: FakeSupervisor, engine: Any) -> None:
        if self.home_rank == 1:
            await asyncio.sleep(1.5)
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
        asked, heard = job(placement="sequence"), Heard()
        await JobRunner(pool, GenerationSession(asked), {}, heard).run()
        check(heard, asked)

    play(tmp_path, 2, body, deadlines=replace(DEADLINES, others=0.2))
