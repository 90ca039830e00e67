"""The server's line on a mesh of two hosts: who is painted beside whom, and what is told of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path

from fluxmesh_coordinator.runtime.lent_hosts import HostBook
from fluxmesh_coordinator.server.catalogue import Catalogue
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.host_choice import PaintWay, Ways
from fluxmesh_coordinator.server.queue.journal import Journal
from fluxmesh_coordinator.server.queue.lane import Tell
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService
from tests.serving import SimulatedLane

SECONDS = 10.0


class TwoHostLane(SimulatedLane):
    """One of the lanes of a mesh of two hosts, on which `sequence` takes both."""

    def __init__(self, pictures: PictureFolder, first: TwoHostLane | None = None) -> None:
        super().__init__(pictures)
        self.shared: HostBook = (
            first.shared if first else HostBook([0, 1], lambda: self.painters.changed())
        )
        self.all: list[TwoHostLane] = first.all if first else []
        if first is not None:
            self.may_go = first.may_go
        self.all.append(self)

    def beside(self) -> TwoHostLane:
        return TwoHostLane(self.pictures, self.all[0])

    def book(self) -> HostBook:
        return self.shared

    def ways(self, busy: Mapping[int, float]) -> Ways:
        def ways(job: ServedJob, ranks: frozenset[int]) -> list[PaintWay]:
            wait = {rank: busy.get(rank, 0.0) for rank in ranks}
            if job.spread is not None and job.spread.placement == "sequence":
                last = max(wait.values())
                return [PaintWay(ranks, last + SECONDS, last)] if len(ranks) == 2 else []
            each = [PaintWay(frozenset([r]), wait[r] + SECONDS, wait[r]) for r in sorted(ranks)]
            return sorted(each, key=lambda way: way.seconds)

        return ways


class OneModelLane(TwoHostLane):
    """The lane of one host, which has one model in memory: that of the job before."""

    def __init__(self, pictures: PictureFolder) -> None:
        super().__init__(pictures)
        self.shared = HostBook([0], lambda: self.painters.changed())
        self.held: Hashable = None

    def paint(self, job: ServedJob, tell: Tell) -> None:
        self.held = job.denoiser
        super().paint(job, tell)

    def ways(self, busy: Mapping[int, float]) -> Ways:
        held = self.held

        def ways(job: ServedJob, ranks: frozenset[int]) -> list[PaintWay]:
            wait, load = max(busy.values(), default=0.0), 0.0 if job.denoiser == held else 30.0
            return [PaintWay(ranks, wait + load + SECONDS, wait, load)] if ranks else []

        return ways


def play(
    folder: Path,
    body: Callable[[PaintingService, TwoHostLane], Awaitable[None]],
    kind: type[TwoHostLane] = TwoHostLane,
) -> None:
    pictures = PictureFolder(folder / "pictures")
    lane = kind(pictures)
    journal = Journal(folder / "journal")
    service = PaintingService(Catalogue("tiny", folder), pictures, journal, lanes=[lane])

    async def run() -> None:
        await service.open()
        try:
            async with asyncio.timeout(60):
                await body(service, lane)
        finally:
            lane.may_go.set()
            await service.close()

    asyncio.run(run())


def asked(seed: int, placement: str | None = None) -> PaintRequest:
    return PaintRequest(
        prompt="a dog",
        width=64,
        height=64,
        steps=2,
        seed=seed,
        placement=placement,  # type: ignore[arg-type]
    )


async def running(service: PaintingService, count: int) -> list[str]:
    """The jobs that run, once they are so many."""
    while len(service.running()) != count:
        await asyncio.sleep(0.005)
    return [job.id for job in service.running()]


def test_jobs_of_two_clients_run_at_once_and_the_third_has_the_first_place(tmp_path: Path) -> None:
    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        lane.may_go.clear()
        first = await service.submit(asked(1), "anna")
        await running(service, 1)
        assert first.lent is not None and first.lent.ranks == {0, 1}  # alone: its plan decides
        first.lent.settle([0])
        second = await service.submit(asked(2), "ben")
        assert await running(service, 2) == [first.id, second.id]
        third = await service.submit(asked(3), "cleo")
        rows = service.rows()
        assert [(row.job.id, row.place) for row in rows] == [
            (first.id, 0), (second.id, 0), (third.id, 1),
        ]  # fmt: skip
        assert second.lent is not None and second.lent.ranks == {1}
        service.cancel(second)  # and nobody else
        await third.events.follow(0).__anext__()
        while third.stage == "queued":
            await asyncio.sleep(0.005)
        assert (first.stage, second.stage) == ("running", "cancelled")
        lane.may_go.set()
        assert (await third.events.over()).kind == "done"
        assert (await first.events.over()).kind == "done"
        assert [len(each.painted) for each in lane.all] == [1, 2]  # two lanes, the second twice

    play(tmp_path, body)


def test_a_job_on_all_hosts_is_not_starved_by_small_ones(tmp_path: Path) -> None:
    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        lane.may_go.clear()
        first = await service.submit(asked(1), "anna")
        await running(service, 1)
        assert first.lent is not None
        first.lent.settle([0])
        while first.events.latest("planned") is None:  # which says how long it takes, too
            await asyncio.sleep(0.005)
        first.expected = 1000.0
        service._durations.learn(first.model, first.work, SECONDS)
        whole = await service.submit(asked(2, "sequence"), "ben")
        small = [await service.submit(asked(3 + k), f"client {k}") for k in range(3)]
        while not service._is_held_up:
            await asyncio.sleep(0.005)
        assert [job.id for job in service.running()] == [first.id]  # host 1 is kept for it
        places = service.places()
        assert [places[job.id].number for job in (whole, *small)] == [1, 2, 3, 4]
        assert places[whole.id].seconds_left > 500  # the host that is idle is of no use to it
        lane.may_go.set()
        for job in (first, whole, *small):
            assert (await job.events.over()).kind == "done"
        assert whole.began < min(job.began for job in small)

    play(tmp_path, body)


def test_of_several_models_the_one_in_memory_goes_first_and_not_for_ever(tmp_path: Path) -> None:
    """Two clients that keep the line full, each with a model of its own."""

    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        lane.may_go.clear()
        models: dict[str, str] = {}
        jobs = []
        for number in range(8):
            for client, bits in (("anna", 4), ("ben", 8)):
                request = replace(asked(number), bits=bits)
                jobs.append(await service.submit(request, client))
                models[jobs[-1].id] = client
        await running(service, 1)
        lane.may_go.set()
        for job in jobs:
            assert (await job.events.over()).kind == "done"
        order = "".join(models[job.id][0] for each in lane.all for job in each.painted)
        assert order == "aaaaa" + "bbbbb" + "aaa" + "bbb"  # in turns it would read 15 models
        of_each = [[job.seed for job in lane.painted if models[job.id] == name] for name in
                   ("anna", "ben")]  # fmt: skip
        assert of_each == [list(range(8))] * 2  # a client's own keep their order

    play(tmp_path, body, OneModelLane)


def test_nobody_begins_on_hosts_for_which_a_job_that_runs_waits(tmp_path: Path) -> None:
    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        lane.may_go.clear()
        first = await service.submit(asked(1), "anna")
        await running(service, 1)
        assert first.lent is not None
        first.lent.settle([0])
        second = await service.submit(asked(2), "ben")
        await running(service, 2)
        assert second.lent is not None
        second.lent.widen()  # it has lost its host, and takes the next that comes free
        third = await service.submit(asked(3), "cleo")
        service.cancel(first)
        assert (await first.events.over()).kind == "cancelled"
        await asyncio.sleep(0.1)
        assert third.stage == "queued"
        assert second.lent.widen() and second.lent.ranks == {0, 1}
        second.lent.settle([0])
        while third.stage == "queued":
            await asyncio.sleep(0.005)
        assert third.lent is not None and third.lent.ranks == {1}

    play(tmp_path, body)


def test_a_job_that_is_cancelled_before_its_lane_has_begun_paints_nothing(tmp_path: Path) -> None:
    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        lane.may_go.clear()
        job = await service.submit(asked(1), "anna")
        while job.stage == "queued":
            await asyncio.sleep(0)  # the very moment in which it has left the line
        service.cancel(job)
        assert (await job.events.over()).kind == "cancelled"
        assert lane.shared.free == {0, 1}

    play(tmp_path, body)


def test_a_job_sent_again_while_hosts_are_chosen_for_the_one_that_was_cancelled_is_painted(
    tmp_path: Path,
) -> None:
    """Its client's connection broke, and came back with the same id: both names are in play."""

    class SlowToChooseLane(TwoHostLane):
        def __init__(self, pictures: PictureFolder, first: TwoHostLane | None = None) -> None:
            super().__init__(pictures, first)
            self.is_choosing, self.may_choose = threading.Event(), threading.Event()

        def book(self) -> HostBook:
            self.is_choosing.set()
            assert self.may_choose.wait(60)
            return super().book()

    async def body(service: PaintingService, lane: TwoHostLane) -> None:
        assert isinstance(lane, SlowToChooseLane)
        first = await service.submit(asked(1), "anna", "the-same-id")
        assert await asyncio.to_thread(lane.is_choosing.wait, 60)
        service.cancel(first)
        again = await service.submit(asked(1), "anna", "the-same-id")
        assert again is not first
        lane.may_choose.set()
        await again.events.over()
        assert (first.stage, again.stage) == ("cancelled", "done")

    play(tmp_path, body, SlowToChooseLane)
