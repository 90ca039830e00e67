"""Jobs of one program on shares of a mesh: at the same time, each on hosts of its own."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError, DoesNotFitError, HostUnreachableError
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from fluxmesh_coordinator.runtime.lent_hosts import HostBook, LentHosts
from tests.fakes import FakeMesh
from tests.unit.mesh_jobs import Heard, check, job, play
from tests.unit.meshes import FLUX, mac


def runner(pool: AgentPool, name: str, lent: LentHosts | None, heard: Heard, **keys: object):  # type: ignore[no-untyped-def]
    asked = job(name, **keys)
    return asked, JobRunner(pool, GenerationSession(asked), {}, heard, lent=lent)


async def until_steps(*heard: Heard) -> None:
    while not all(each.of(events.Step) for each in heard):
        await asyncio.sleep(0.005)


def test_a_share_has_what_was_free_and_what_it_does_not_need_is_free_again() -> None:
    woken: list[int] = []
    book = HostBook([0, 1, 2], lambda: woken.append(1))
    first, second = book.lend([0, 1, 2]), book.lend([0, 1, 2])
    assert (first.ranks, second.ranks, book.free) == ({0, 1, 2}, set(), set())
    first.settle([1])
    assert first.ranks == {1} and book.free == {0, 2} and woken == [1]
    assert second.may_grow and not book.is_awaited
    assert second.widen() and second.ranks == {0, 2} and book.is_awaited
    assert not second.widen()
    second.settle([0])
    assert book.free == {2} and not book.is_awaited
    first.give_back()
    first.give_back()
    assert book.free == {1, 2} and woken == [1, 1, 1]
    assert not second.may_grow


def test_jobs_of_two_shares_paint_at_the_same_time_each_on_its_own_host(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard = Heard(), Heard()
        jobs = [
            runner(pool, f"job {rank}", book.lend([rank]), heard[rank], steps=20, seed=rank)
            for rank in range(2)
        ]
        tasks = [asyncio.create_task(each.run()) for _, each in jobs]
        await until_steps(heard[0])
        mesh.engine(0).stop()  # until the other has begun: neither waits for the other's end
        await until_steps(heard[1])
        mesh.engine(0).go_on()
        await asyncio.gather(*tasks)
        for rank, (asked, _) in enumerate(jobs):
            check(heard[rank], asked)
            assert {event.host for event in heard[rank].of(events.Step)} == {rank}
        assert [len(mesh.engine(rank).made) for rank in range(2)] == [20, 20]

    play(tmp_path, 2, body)


def test_a_job_that_has_all_hosts_lets_go_of_those_that_its_plan_leaves_out(
    tmp_path: Path,
) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard, lent = Heard(), book.lend([0, 1])
        asked, first = runner(pool, "one", lent, heard, steps=20, placement="data")
        task = asyncio.create_task(first.run())
        await until_steps(heard)
        assert len(lent.ranks) == 1 and len(book.free) == 1
        (rank,) = lent.ranks
        mesh.engine(rank).stop()  # until the other is done
        other = Heard()
        second, running = runner(pool, "two", book.lend(book.free), other, steps=3)
        await running.run()
        assert not task.done()
        mesh.engine(rank).go_on()
        check(other, second)
        await task
        check(heard, asked)

    play(tmp_path, 2, body)


def test_a_plan_tells_what_is_so_of_the_mesh_and_not_of_the_hosts_that_were_leased(
    tmp_path: Path,
) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        slow = tuple(replace(link, rate=1.0) for link in pool.links.links)
        pool.links = replace(pool.links, links=slow)
        for lent, reason in (
            (None, r"data on 1 host is predicted to take .*; the next best, .* on 2 hosts .*\."),
            (HostBook([0, 1]).lend([1]), "One of the mesh's 2 hosts is free for this; the .*"),
        ):
            heard = Heard()
            asked, run = runner(pool, "one", lent, heard)
            await run.run()
            check(heard, asked)
            (planned,) = heard.of(events.Planned)
            assert len(planned.hosts) == 1 and re.fullmatch(reason, planned.reason), planned.reason

    play(tmp_path, 2, body)


def test_a_job_that_loses_its_only_host_goes_on_with_one_that_comes_free(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard = Heard(), Heard()
        shares = book.lend([0]), book.lend([1])
        survivor, first = runner(pool, "long", shares[0], heard[0], steps=300, seed=1)
        loser, second = runner(pool, "short", shares[1], heard[1], steps=40, seed=2)

        async def whole(run: JobRunner, lent: LentHosts) -> None:
            await run.run()
            lent.give_back()

        tasks = [
            asyncio.create_task(whole(first, shares[0])),
            asyncio.create_task(whole(second, shares[1])),
        ]
        await until_steps(*heard)
        await mesh.kill(1)
        while not book.is_awaited:
            await asyncio.sleep(0.005)
        assert not tasks[0].done()  # the death touches the other job not at all
        await asyncio.gather(*tasks)
        check(heard[0], survivor)
        check(heard[1], loser)
        assert not heard[0].of(events.HostLost)
        assert [event.host for event in heard[1].of(events.HostLost)] == [1]
        # Not one step that was told ran twice: the job went on from the latents that it had.
        steps = [event.step for event in heard[1].of(events.Step)]
        assert steps == sorted(set(steps)) and len(steps) == 40
        assert {event.host for event in heard[1].of(events.Step)} == {0, 1}

    # Nothing that is lost is waited for: only what the other job has.
    play(tmp_path, 2, body, deadlines=replace(DEADLINES, comes_back=0.0))


def test_of_jobs_that_are_all_short_the_last_one_waits_for_none_of_them() -> None:
    book = HostBook([0, 1, 2])
    first, second, third = (book.lend([rank]) for rank in range(3))
    for lent in (first, second):
        lent.widen()
        assert lent.may_grow  # the third goes on, and ends some time
    third.widen()
    assert first.may_grow and second.may_grow and not third.may_grow
    third.give_back()
    assert first.may_grow and not second.may_grow
    second.settle([1])
    assert not second.may_grow  # what it has is its own; the first one still waits for more


def test_jobs_whose_hosts_are_all_gone_end_and_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard = Heard(), Heard()
        shares = book.lend([0]), book.lend([1])

        async def whole(k: int) -> None:
            _, run = runner(pool, f"job {k}", shares[k], heard[k], steps=500, seed=k)
            try:
                await run.run()
            finally:
                shares[k].give_back()

        tasks = [asyncio.create_task(whole(k)) for k in range(2)]
        await until_steps(*heard)
        await mesh.kill(0)
        await mesh.kill(1)
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [HostUnreachableError] * 2
        assert book.free == {0, 1}

    play(tmp_path, 2, body, deadlines=replace(DEADLINES, comes_back=0.0))


def test_what_fits_on_no_host_is_told_at_once_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book, gib = HostBook([0, 1]), 1 << 30
        heard = Heard()
        asked, first = runner(pool, "one", book.lend([0]), heard, steps=500)
        task = asyncio.create_task(first.run())
        await until_steps(heard)
        small = {
            rank: mac(rank, holds=None, memory_bytes=11 * gib, free_bytes=gib, platform="metal")
            for rank in range(2)
        }

        async def infos() -> dict[int, HostInfo]:
            return small

        pool.infos = infos  # type: ignore[method-assign]
        share = book.lend([1])
        large = replace(job("large", height=1024, width=1024, placement="tensor"), sizes=FLUX)
        # Of all hosts, and not of the one that it has, which is too few for `tensor`.
        with pytest.raises(DoesNotFitError, match="needs .* GB and may use"):
            await JobRunner(pool, GenerationSession(large), {}, Heard(), lent=share).run()
        assert not task.done()
        share.give_back()
        await task
        check(heard, asked)

    play(tmp_path, 2, body)


def test_what_fits_once_others_are_done_waits_for_them(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book, heard = HostBook([0, 1]), (Heard(), Heard())
        other, lent = book.lend([0]), book.lend([1])
        asked, run = runner(pool, "both", lent, heard[0], placement="tensor")
        full = {rank: replace(info, free_bytes=0) for rank, info in (await pool.infos()).items()}
        infos = pool.infos

        async def crowded() -> dict[int, HostInfo]:
            return full if other in book._lent else await infos()

        pool.infos = crowded  # type: ignore[method-assign]
        task = asyncio.create_task(run.run())
        while not book.is_awaited:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert not task.done()
        other.give_back()
        await task
        check(heard[0], asked)

    play(tmp_path, 2, body)


def test_shares_that_overlap_by_mistake_still_never_share_an_engine(tmp_path: Path) -> None:
    """To its agent both jobs are one client's, which it would grant the lease twice."""

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        heard = Heard(), Heard()
        jobs = [
            runner(pool, f"job {k}", HostBook([0]).lend([0]), heard[k], steps=10, seed=k)
            for k in range(2)
        ]
        await asyncio.gather(*(each.run() for _, each in jobs))
        for k, (asked, _) in enumerate(jobs):
            check(heard[k], asked)
        order = list(mesh.engine(0).made)
        assert order == [(0, step) for step in range(1, 11)] * 2  # one after the other

    play(tmp_path, 1, body)


def test_one_that_is_cancelled_leaves_the_one_beside_it_alone(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard = Heard(), Heard()
        _, first = runner(pool, "one", book.lend([0]), heard[0], steps=500)
        asked, second = runner(pool, "two", book.lend([1]), heard[1], steps=30)
        tasks = [asyncio.create_task(first.run()), asyncio.create_task(second.run())]
        await until_steps(*heard)
        first.stop.set()
        with pytest.raises(CancelledError):
            await tasks[0]
        await tasks[1]
        check(heard[1], asked)
        assert not any(lock.locked() for lock in pool.turns.values())

    play(tmp_path, 2, body)


def test_a_host_that_is_lost_while_another_is_let_go_of_ends_nothing(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        book = HostBook([0, 1])
        heard = Heard()
        asked, first = runner(pool, "one", book.lend([0, 1]), heard, steps=40, n_images=2)
        leave = first._leave

        async def slowly(rank: int, client: AgentClient) -> None:
            await leave(rank, client)
            if rank == 0:
                first._gone(1, first._leased[1], "its machine has gone")

        task = asyncio.create_task(first.run())
        await until_steps(heard)
        first._leave = slowly  # type: ignore[method-assign]
        first._unneeded |= {0, 1}
        await first._let_go()
        assert not first._leased
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    play(tmp_path, 2, body)
