"""What a session learns from its job: from its hosts' own reports, and from when they came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.cluster.shares import EVEN
from fluxmesh.cluster.snapshot import LinkInfo, RingTiming, StepShape, Timings
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.planning.learning import learned, typical
from fluxmesh.planning.workload import Workload
from fluxmesh.storage.homes import Home
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import MeshRecord, learn
from fluxmesh_coordinator.deploy.warmup import Warming
from fluxmesh_coordinator.jobs.generation.job_times import JobTimes, _later
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.runtime.agent_pool import AgentPool, News
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.fakes import FakeMesh
from tests.unit.mesh_jobs import Heard, job, play
from tests.unit.meshes import ask, held, small
from tests.unit.simulated_jobs import GenerationSimulation
from tests.unit.simulation import SimulatedMachine
from tests.unit.test_warming import Told

RING = ("sequence", (0, 2), EVEN)


def times(**keys: Any) -> JobTimes:
    request = ask(**{"height": 32, "width": 48, "steps": 4, **keys})
    return JobTimes(Workload.of(request, small()), request)


def paint(
    on: JobTimes, image: int = 0, first: float = 1.0, readiness: Any = "warm", **keys: Any
) -> None:
    """An image of four steps of a second each, with 0.4 s in between and 0.3 s round its decode."""
    members = keys.get("members", RING)
    on.given(image, members, 10.0, readiness)
    for step in range(1, 5):
        seconds = first if step == 1 else 1.0
        on.stepped(image, step, seconds, first + step - 1 + 0.1 * step)
    on.decoded(image, 2.0, 2.3)


# By itself


def test_an_image_tells_its_steps_its_decode_and_what_stands_between() -> None:
    seen = times()
    seen.begin(9.5)
    paint(seen)
    (job,) = seen.news(lambda _: "jaccl").jobs
    assert (job.backend, job.ranks, job.last_seconds) == ("jaccl", (0, 2), 1.0)
    measured = job.measured
    assert (measured.step_seconds, measured.decode_seconds) == (1.0, 2.0)
    assert (measured.placement, measured.hosts) == ("sequence", 2)
    assert (measured.height, measured.width, measured.first_seconds) == (32, 48, None)
    assert job.begin_seconds == 0.5
    assert job.gap_seconds == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("steps", "learnt"),
    [
        ((9.0, 1.0), 1.0),
        ((9.0, 1.2, 0.8), 1.0),
        ((9.0, 1.2, 1.0, 0.8), 1.0),
        ((9.0, 1.2, 1.0, 1.0, 0.8), 1.0),
    ],
)
def test_a_last_step_that_began_early_makes_no_step_short(
    steps: tuple[float, ...], learnt: float
) -> None:
    assert typical(_later(list(steps))) == pytest.approx(learnt)


def test_by_data_what_goes_on_round_the_decode_is_time_of_the_image() -> None:
    seen = times()
    paint(seen, members=("data", (1,), EVEN))
    (job,) = seen.news(lambda _: "ring").jobs
    assert (job.backend, job.ranks) == ("", (1,))
    assert job.gap_seconds == pytest.approx(0.4 + 0.3)


def test_a_first_step_that_compiled_is_told_apart_and_spoils_nothing() -> None:
    seen = times()
    paint(seen, first=21.0, readiness="new engine")
    (job,) = seen.news(lambda _: "ring").jobs
    assert job.measured.step_seconds == 1.0
    assert job.measured.kernels_seconds == pytest.approx(20.0)
    assert (job.measured.decode_seconds, job.gap_seconds) == (None, None)
    paint(seen, 1)
    paint(seen, 2, first=1.5, readiness="new shape")
    paint(seen, 4, first=13.0, readiness="new placement")
    paint(seen, 3, first=90.0, readiness="loading")  # its weights came first: nobody counts on it
    (job,) = seen.news(lambda _: "ring").jobs
    assert job.measured.kernels_seconds == pytest.approx(20.0)
    assert job.measured.placement_seconds == pytest.approx(12.0)
    assert job.measured.first_seconds == pytest.approx(0.5)
    assert job.gap_seconds == pytest.approx(0.4)


def test_one_step_that_is_cold_tells_nothing() -> None:
    seen = times(steps=1)
    seen.given(0, RING, 0.0, "new engine")
    seen.stepped(0, 1, 30.0, 30.0)
    seen.decoded(0, 1.0, 1.0)
    assert seen.news(lambda _: "ring") == Timings()


def test_a_job_that_had_to_load_tells_not_how_long_a_warm_one_takes_to_begin() -> None:
    seen = times()
    seen.begin(0.0)
    seen.prepares()
    paint(seen)
    seen.prepares()
    assert seen.news(lambda _: "ring").jobs[0].begin_seconds is None


@pytest.mark.parametrize("keys", [{"cache": 0.1}, {"low_memory": True}, {"stepwise": True}])
def test_jobs_whose_steps_are_not_plain_ones_tell_nothing(keys: dict[str, Any]) -> None:
    seen = times(**keys)
    paint(seen)
    assert seen.news(lambda _: "ring") == Timings()


def test_images_that_were_not_seen_from_the_first_step_on_tell_nothing() -> None:
    seen = times()
    seen.stepped(0, 3, 1.0, 1.0)
    seen.decoded(0, 1.0, 1.0)
    seen.given(1, RING, 0.0, "warm")
    seen.stepped(1, 1, 1.0, 1.0)
    seen.stepped(1, 3, 1.0, 1.0)
    seen.decoded(1, 1.0, 1.0)
    assert seen.news(lambda _: "ring") == Timings()


def test_hosts_that_share_a_device_tell_nothing_of_data() -> None:
    seen = times()
    for image, members in enumerate((RING, ("data", (1,), EVEN), ("data", (2,), EVEN))):
        paint(seen, image, members=members)
    members_seen = {job.ranks for job in seen.news(lambda _: "ring", shared=[2]).jobs}
    assert members_seen == {(0, 2), (1,)}


# As a session has it


def passing(simulation: GenerationSimulation) -> None:
    """Time goes on also between the reports of two hosts."""
    simulation.now += 0.01


def test_a_job_leaves_what_each_host_took() -> None:
    done = GenerationSimulation(2, n_images=4, placement="data").run()
    by_ranks = {job.ranks: job for job in done.learned.jobs}
    assert by_ranks.keys() == {(0,), (1,)} and done.learned.rings == ()
    for timing in by_ranks.values():
        assert timing.measured.step_seconds == timing.last_seconds == 0.1
        assert timing.measured.decode_seconds == 0.1


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_ring_that_is_new_is_measured_while_it_forms(placement: Any) -> None:
    done = GenerationSimulation(2, n_images=2, placement=placement, faults=passing).run()
    (ring,), (timing,) = done.learned.rings, done.learned.jobs
    assert (ring.backend, ring.ranks) == ("ring", (0, 1))
    assert len(ring.gathers) == 3 and ring.forming_seconds > 0
    assert (timing.ranks, timing.backend) == ((0, 1), "ring")
    assert timing.measured.placement == placement
    kinds = [type(send.message) for send in done.sent]
    assert kinds.count(messages.MeasureRing) == 2
    first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    last_join = max(i for i, kind in enumerate(kinds) if kind is messages.Join)
    assert last_join < first[messages.MeasureRing] < first[messages.Load] < first[messages.Paint]


def test_a_ring_that_is_known_is_not_measured_again_but_its_forming_is() -> None:
    known = GenerationSimulation(2, placement="sequence").run().learned
    again = GenerationSimulation(2, placement="sequence", faults=passing)
    again.links = replace(again.links, timings=known)
    again.run()
    assert again.messages(messages.MeasureRing) == []
    (ring,) = again.learned.rings
    assert ring.gathers == () and ring.forming_seconds > 0
    other = GenerationSimulation(3, placement="sequence")
    other.links = replace(other.links, timings=known)
    assert len(other.run().messages(messages.MeasureRing)) == 3


def test_whether_a_first_step_compiled_is_known_from_what_the_engines_say() -> None:
    shape = StepShape.of(held().weights, "sequence", 2, 32, 32)
    for warm in ([], [0], [0, 1]):
        simulation = GenerationSimulation(2, placement="sequence")
        for rank, machine in simulation.machines.items():
            info = replace(
                machine.leased.info, holds=held(), compiled=(shape,) if rank in warm else ()
            )
            machine.leased = replace(machine.leased, info=info)
        (timing,) = simulation.run().learned.jobs
        assert (timing.measured.kernels_seconds is None) == (warm == [0, 1])


def test_an_engine_that_ends_to_join_another_ring_has_nothing_compiled() -> None:
    shape = StepShape.of(held().weights, "sequence", 2, 32, 32)
    simulation = GenerationSimulation(2, placement="sequence")
    for rank, machine in simulation.machines.items():
        info = replace(machine.leased.info, holds=held(), compiled=(shape,))
        machine.leased = replace(
            machine.leased, info=info, ring="another", ring_rank=rank, ring_size=3
        )
    (timing,) = simulation.run().learned.jobs
    assert timing.measured.kernels_seconds is not None


def test_engines_that_painted_apart_teach_what_the_first_step_in_a_ring_compiles() -> None:
    """Once: the next size of that placement is another size, and no new placement."""

    def job_on(side: int, *shapes: StepShape) -> Any:
        simulation = GenerationSimulation(2, placement="sequence", width=side)
        for machine in simulation.machines.values():
            info = replace(machine.leased.info, holds=held(), compiled=shapes)
            machine.leased = replace(machine.leased, info=info)
            machine.engine.shape_seconds = 7.0
        (timing,) = simulation.run().learned.jobs
        return timing.measured.placement_seconds, timing.measured.first_seconds

    alone = StepShape.of(held().weights, "data", 1, 32, 32)
    together = StepShape.of(held().weights, "sequence", 2, 32, 32)
    assert job_on(48, alone) == (pytest.approx(7.0), None)
    assert job_on(48, alone, together) == (None, pytest.approx(7.0))


@pytest.mark.parametrize("placement", ["data", "sequence", "tensor"])
def test_a_plan_knows_what_compiles_once_an_engine_and_what_once_a_shape(placement: Any) -> None:
    """Engines that compile all kernels for 19 s, and for an eighth of a second at each new size."""

    def job_on(
        machines: dict[int, SimulatedMachine], side: int, known: Timings
    ) -> GenerationSimulation:
        simulation = GenerationSimulation(2, placement=placement, width=side, n_images=2)
        for rank, machine in machines.items():
            engine, info = machine.engine, machine.leased.info
            engine.kernels_seconds, engine.shape_seconds = 19.0, 0.125
            info = replace(info, holds=engine.holding, compiled=engine.compiled)
            is_ring = engine.size > 1
            place = {"ring": "ring", "ring_rank": engine.rank, "ring_size": 2} if is_ring else {}
            leased = replace(machine.leased, info=info, **place)
            simulation.machines[rank] = SimulatedMachine(leased, engine)
        simulation.links = replace(simulation.links, timings=known)
        return simulation

    def cold(simulation: GenerationSimulation) -> float:
        candidates = [
            o for o in simulation.plan().options if (o.name, len(o.ranks)) == (placement, 2)
        ]
        return candidates[0].cold_seconds

    first = job_on(GenerationSimulation(2).machines, 32, Timings())
    assert cold(first) == 0.0  # nobody knows
    known = first.run().learned
    second = job_on(first.machines, 48, known)
    assert cold(second) == 0.0
    known = learned(known, second.run().learned)
    third = job_on(second.machines, 64, known)
    assert cold(third) == pytest.approx(0.125)
    taken = learned(Timings(), third.run().learned).jobs
    assert {round(job.measured.first_seconds or 0.0, 9) for job in taken} == {0.125}
    new = job_on(GenerationSimulation(2).machines, 64, known)
    assert cold(new) == pytest.approx(19.125, abs=0.02)  # and a ring that forms
    assert cold(job_on(third.machines, 64, known)) == 0.0


@pytest.mark.parametrize("fault", ["kill_engine", "stop_engine", "lose"])
@pytest.mark.parametrize("placement", ["data", "sequence"])
def test_a_job_in_which_a_host_was_lost_tells_nothing_of_its_times(
    fault: str, placement: Any
) -> None:
    def strike(simulation: GenerationSimulation) -> None:
        if simulation.acknowledged.get(0, 0) == 2 and not struck:
            struck.append(True)
            getattr(simulation, fault)(1)

    struck: list[bool] = []
    done = GenerationSimulation(3, n_images=3, placement=placement, faults=strike).run()
    assert struck and done.end is not None and done.end.error is None
    assert done.learned.jobs == ()


def test_an_engine_that_dies_while_it_measures_costs_a_ring_and_no_picture() -> None:
    def strike(simulation: GenerationSimulation) -> None:
        at = simulation.machines[1].at
        if isinstance(at, messages.MeasureRing) and not struck:
            struck.append(True)
            simulation.kill_engine(1)

    struck: list[bool] = []
    done = GenerationSimulation(3, n_images=2, placement="sequence", faults=strike).run()
    assert struck and done.end is not None and done.end.error is None
    assert len(done.of(events.Picture)) == 2
    assert len(done.messages(messages.MeasureRing)) == 3  # the ring that follows goes on at once
    assert done.learned == Timings()


# Through real agents and the record, with backends that are not what sockets say


def up(folder: Path, mesh: FakeMesh, sockets: float, collectives: float) -> MeshRecord:
    """What the mesh looks like to `up`: links as sockets found them, engines with their ring."""
    for rank in mesh.services:
        engine = mesh.engine(rank).engine
        assert engine is not None
        engine.collective_rate = collectives
    links = tuple(
        LinkInfo(source=a.source, target=a.target, rate=sockets) for a in mesh.record.links
    )
    return replace(mesh.record, links=links)


@pytest.mark.parametrize(
    ("sockets", "collectives", "chosen"),
    [(4e4, 90e9, "sequence"), (5e9, 4e4, "data"), (5e9, 90e9, "sequence"), (4e4, 4e4, "data")],
)
def test_what_the_ring_carries_chooses_and_not_what_sockets_do(
    tmp_path: Path, sockets: float, collectives: float, chosen: str
) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        home, work = Home(tmp_path), Workload.of(job().request, small())
        made = up(tmp_path, mesh, sockets, collectives)
        dialer = mesh.network.dialer()
        await Warming(made, work, Told(), home).run_with(dialer)
        await dialer.close()
        kept = mesh_file.load(home)
        assert kept is not None and kept.timings.ring("ring", (0, 1)) is not None
        async with AgentPool(kept, mesh.network.dialer()) as knowing:
            heard = Heard()
            await JobRunner(knowing, GenerationSession(job()), {}, heard).run()
        assert [event.placement for event in heard.of(events.Planned)] == [chosen]

    tmp_path.chmod(0o700)
    play(tmp_path, 2, body)


def test_what_a_job_took_is_on_record_and_changes_the_next_one(tmp_path: Path) -> None:
    """The ring looks fast, and its steps are not: the next picture is painted by one host."""

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        home, work = Home(tmp_path), Workload.of(job().request, small())
        dialer = mesh.network.dialer()
        made = await Warming(up(tmp_path, mesh, 5e9, 90e9), work, Told(), home).run_with(dialer)
        await dialer.close()
        for rank in range(2):
            engine = mesh.engine(rank).engine
            assert engine is not None
            engine.ring_step_seconds = 5.0
        placements: list[str] = []
        for name in ("one", "two", "three"):
            known = mesh_file.load(home)
            assert known is not None

            def keep(news: Sequence[News]) -> None:
                learn(made.text, news, home)

            async with AgentPool(known, mesh.network.dialer(), None, keep) as knowing:
                heard = Heard()
                await JobRunner(knowing, GenerationSession(job(name)), {}, heard).run()
            placements += [event.placement for event in heard.of(events.Planned)]
        assert placements == ["sequence", "tensor", "data"]
        known = mesh_file.load(home)
        assert known is not None
        timings = {
            (timing.measured.placement, timing.ranks): timing for timing in known.timings.jobs
        }
        assert timings["sequence", (0, 1)].measured.step_seconds == 5.0
        assert timings["sequence", (0, 1)].measured.when > 1.7e9
        assert any(placement == "data" for placement, _ in timings)

    tmp_path.chmod(0o700)
    play(tmp_path, 2, body)


def test_what_cannot_be_kept_costs_no_picture(tmp_path: Path) -> None:
    def keep(news: Sequence[News]) -> None:
        raise FluxmeshError("The disk is full.")

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer(), None, keep) as knowing:
            heard = Heard()
            await JobRunner(knowing, GenerationSession(job()), {}, heard).run()
            assert len(heard.of(events.Picture)) == 1
            assert knowing.links.timings.jobs

    play(tmp_path, 2, body)


def test_who_stops_a_job_does_not_wait_for_a_disk(tmp_path: Path) -> None:
    """A sync takes a second where the disk is slow, and Ctrl-C is to end the command at once."""
    written: list[Sequence[News]] = []

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer(), None, written.append) as knowing:
            heard = Heard(events.Step, lambda: runner.stop.set())
            asked = job("stopped", steps=100, placement="sequence")
            runner = JobRunner(knowing, GenerationSession(asked), {}, heard)
            with pytest.raises(CancelledError):
                await runner.run()
        assert written == []

    play(tmp_path, 2, body)


def test_a_job_is_over_before_what_it_measured_is_on_the_disk(tmp_path: Path) -> None:
    """What more comes meanwhile is written once, together, and all of it by the end."""
    written: list[Sequence[News]] = []
    is_writing, may_go = threading.Event(), threading.Event()

    def keep(news: Sequence[News]) -> None:
        is_writing.set()
        assert may_go.wait(60)
        written.append(news)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer(), None, keep) as knowing:
            for number in range(4):
                await JobRunner(knowing, GenerationSession(job(str(number))), {}, Heard()).run()
                assert knowing.links.timings.jobs and written == []
                assert await asyncio.to_thread(is_writing.wait, 60)
            may_go.set()
        first, others = written
        assert len(others) >= 3 and first

    play(tmp_path, 2, body)


def test_what_was_measured_on_another_mesh_is_not_added_to_this_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    home, mesh = Home(tmp_path), FakeMesh(tmp_path, 2)
    mesh_file.save(mesh.record, home)
    news = Timings((RingTiming(backend="ring", ranks=(0, 1), gathers=(), sums=(), hidden=0.5),))
    learn("[]", [news], home)
    assert mesh_file.load(home) == mesh.record
    learn(mesh.record.text, [news], home)
    kept = mesh_file.load(home)
    assert kept is not None and kept.timings == news
