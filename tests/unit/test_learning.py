"""What jobs measure becomes what is known, and what is known becomes plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh.cluster.snapshot import (
    FIRSTS,
    CollectiveTime,
    HostInfo,
    JobTiming,
    MeshView,
    ModelVariant,
    Placement,
    RingPlace,
    RingTiming,
    StepShape,
    StepTiming,
    TextTiming,
    Timings,
)
from fluxmesh.planning.learning import MOST, dated, kind, learned
from fluxmesh.planning.plan import Option, plan
from fluxmesh.request import AdapterRef
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from tests.unit.meshes import FLUX, ask, full, held, mac, without


def timed(seconds: float, when: float = 0.0, side: int = 1024, **keys: Any) -> StepTiming:
    return StepTiming(
        model="m",
        height=side,
        width=side,
        dtype="bfloat16",
        bits=None,
        step_seconds=seconds,
        when=when,
        **keys,
    )


def job(
    seconds: float,
    ranks: tuple[int, ...] = (0, 1),
    when: float = 1.0,
    side: int = 1024,
    **keys: Any,
) -> JobTiming:
    placement: Placement = keys.pop("placement", "sequence" if len(ranks) > 1 else "data")
    more = {"begin_seconds": None, "gap_seconds": None, **keys}
    firsts = {name: more.pop(name, None) for name in FIRSTS}
    measured = timed(seconds, when, side, placement=placement, hosts=len(ranks), **firsts)
    backend = more.pop("backend", "ring" if len(ranks) > 1 else "")
    return JobTiming(backend=backend, ranks=ranks, measured=measured, last_seconds=seconds, **more)


def ring_of(ranks: tuple[int, ...] = (0, 1), **keys: Any) -> RingTiming:
    table = (CollectiveTime(4096, 1e-5), CollectiveTime(1 << 25, 1e-3))
    return RingTiming(backend="ring", ranks=ranks, gathers=table, sums=table, hidden=0.5, **keys)


def view_of(*hosts: Any, jobs: Any = (), rings: Any = ()) -> MeshView:
    return replace(full(*(hosts or (mac(0), mac(1)))), timings=Timings(tuple(rings), tuple(jobs)))


def option(view: MeshView, name: str, hosts: int = 2, **keys: Any) -> Option:
    options = plan(ask(**keys), view, FLUX).options
    return next(o for o in options if o.name == name and (len(o.ranks) == hosts or name == "data"))


# What is typical


def after(*seconds: float) -> StepTiming:
    """What is known of a step after jobs that took so long a step, one after another."""
    known = Timings()
    for when, each in enumerate(seconds, 1):
        news = job(each, when=float(when), begin_seconds=each, gap_seconds=each, first_seconds=each)
        known = learned(known, Timings(jobs=(news,)))
    (kept,) = known.jobs
    assert (kept.last_seconds, kept.measured.when) == (seconds[-1], float(len(seconds)))
    m = kept.measured
    assert kept.begin_seconds == kept.gap_seconds == m.first_seconds == m.step_seconds
    return m


@pytest.mark.parametrize("place", range(4))
def test_a_job_beside_other_work_counts_for_nothing_once_another_is_done(place: int) -> None:
    """The first one too, by which a plan was off for jobs."""
    seconds = [1.0] * 4
    seconds[place] = 9.0
    for count in (2, 3, 4):
        assert after(*seconds[:count]).step_seconds == 1.0


def test_a_link_that_became_slow_is_believed_after_two_jobs() -> None:
    assert after(1.0, 1.0, 1.0, 2.0).step_seconds == 1.0
    assert after(1.0, 1.0, 1.0, 2.0, 2.0).step_seconds == 2.0
    assert after(2.0, 2.0, 2.0, 1.0, 1.0).step_seconds == 1.0


def test_what_is_known_of_a_step_outlives_the_file_and_one_that_kept_averages(
    tmp_path: Path,
) -> None:
    """mesh.json, which `generate` reads anew each time."""
    tmp_path.chmod(0o700)
    home, text = Home(tmp_path), TextTiming(rank=0, model="m", dtype="d", bits=None, seconds=1.0)
    record = MeshRecord("m", "[]", (Member(0, "h:1", Keys.new().public, "", "", ""),))
    mesh_file.save(record, home)
    for seconds in (9.0, 1.0, 1.5):
        news = Timings(jobs=(job(seconds),), texts=(replace(text, seconds=seconds),))
        mesh_file.learn("[]", [news], home)
    known = mesh_file.load(home)
    assert known is not None
    assert known.timings.jobs[0].measured.step_seconds == known.timings.texts[0].seconds == 1.5
    data = json.loads(home.mesh.read_text())
    for kept in (*data["timings"]["jobs"], *data["timings"]["texts"]):
        assert kept.pop("recent")
    home.mesh.write_text(json.dumps(data))
    mesh_file.learn("[]", [Timings(jobs=(job(1.0),))], home)
    known = mesh_file.load(home)
    assert known is not None and known.timings.jobs[0].measured.step_seconds == 1.0


def test_what_a_job_did_not_measure_stays_as_it_was() -> None:
    rich = job(1.0, begin_seconds=0.2, gap_seconds=0.1, first_seconds=9.0)
    known = Timings(jobs=(rich,))
    for _ in range(5):
        known = learned(known, Timings(jobs=(job(1.0),)))
    (kept,) = known.jobs
    assert (kept.begin_seconds, kept.gap_seconds) == (0.2, 0.1)
    assert kept.measured.first_seconds == 9.0
    (kept,) = learned(Timings(jobs=(job(1.0),)), Timings(jobs=(rich,))).jobs
    assert (kept.begin_seconds, kept.measured.first_seconds) == (0.2, 9.0)


@pytest.mark.parametrize(
    "other",
    [job(1.0, (0, 2)), job(1.0, side=512), job(1.0, placement="tensor"), job(1.0, (0,))]
    + [job(1.0, backend="jaccl")],
)
def test_other_hosts_sizes_placements_and_backends_are_kept_apart(other: JobTiming) -> None:
    assert kind(other) != kind(job(1.0))
    assert len(learned(Timings(jobs=(job(1.0),)), Timings(jobs=(other,))).jobs) == 2


def test_a_ring_is_measured_anew_and_remembers_how_long_it_took_to_form() -> None:
    old, new = ring_of(forming_seconds=4.0), replace(ring_of(), hidden=0.9, when=2.0)
    (ring,) = learned(Timings((old,)), Timings((new,))).rings
    assert (ring.hidden, ring.forming_seconds, ring.when) == (0.9, 4.0, 2.0)
    only_formed = replace(new, gathers=(), sums=(), forming_seconds=7.0)
    (ring,) = learned(Timings((old,)), Timings((only_formed,))).rings
    assert ring == replace(old, forming_seconds=7.0)


def test_news_are_dated_by_who_has_a_clock() -> None:
    timings = dated(Timings((ring_of(),), (job(1.0, when=0.0),)), 5.0)
    assert (timings.rings[0].when, timings.jobs[0].measured.when) == (5.0, 5.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=400))
def test_only_the_latest_kinds_of_jobs_are_remembered(sides: list[int]) -> None:
    known = Timings()
    for when, side in enumerate(sides):
        known = learned(known, Timings(jobs=(job(1.0, side=side, when=float(when)),)))
    latest = list(dict.fromkeys(reversed(sides)))[:MOST]
    assert {kept.measured.height for kept in known.jobs} == set(latest)


# What comes of them


def test_a_step_that_jobs_took_is_what_the_next_plan_goes_by() -> None:
    before, after = view_of(), view_of(jobs=[job(9.0), job(9.0, placement="tensor")])
    assert option(before, "sequence").phases[0].figure == "links"
    phase = option(after, "sequence").phases[0]
    assert (phase.step_seconds, phase.figure, phase.figure_when) == (9.0, "step", 1.0)
    assert (phase.last_seconds, phase.last_when) == (9.0, 1.0)
    assert plan(ask(), before, FLUX).winner == option(before, "sequence")
    winner = plan(ask(), after, FLUX).winner
    assert winner is not None and winner.name == "data"


def test_what_a_ring_was_off_by_at_one_size_it_is_off_by_at_another() -> None:
    plain = view_of()
    step = option(plain, "sequence").phases[0].step_seconds
    slow = view_of(jobs=[job(3 * step)])
    phase = option(slow, "sequence", height=512, width=512).phases[0]
    reckoned = option(plain, "sequence", height=512, width=512).phases[0].step_seconds
    assert phase.step_seconds == pytest.approx(3 * reckoned)
    assert phase.figure == "step of another size" and phase.last_seconds is None


def test_other_members_and_other_backends_tell_nothing() -> None:
    hosts = [mac(rank) for rank in range(3)]
    for other in (job(9.0, (0, 1, 2)), job(9.0, (0, 2)), job(9.0, backend="jaccl")):
        view = replace(without(full(*hosts), 2), timings=Timings(jobs=(other,)))
        assert option(view, "sequence").phases[0].figure == "links"


def test_whole_images_are_predicted_as_jobs_painted_them() -> None:
    view = view_of(jobs=[job(1.0, (0,)), job(3.0, (1,))])
    steps = [option(view, "data", n_images=4).phases[0], option(view, "data").phases[0]]
    assert [phase.step_seconds for phase in steps] == [3.0, 1.0]
    assert steps[0].owners.count(0) == 3


def test_of_two_measurements_of_a_step_the_later_counts() -> None:
    up = timed(2.0, when=10.0)
    older, newer = job(1.0, (0,), when=5.0), job(1.0, (0,), when=20.0)
    for known, seconds in ((older, 2.0), (newer, 1.0)):
        view = view_of(mac(0, measured=(up,)), mac(1, measured=(up,)), jobs=[known])
        assert option(view, "data").phases[0].step_seconds == min(seconds, 2.0)


def test_a_host_that_timed_nothing_is_taken_to_be_as_fast_as_others_of_its_kind() -> None:
    view = view_of(mac(0, measured=(timed(2.0, when=1.0),)), mac(1), mac(2, kind="other"))
    phase = option(view, "data", n_images=2).phases[0]
    assert set(phase.owners) <= {0, 1, 2}
    only = replace(view, hosts=view.hosts[1:2])
    assert option(only, "data").phases[0].figure == "arithmetic"
    two = replace(view, hosts=view.hosts[:2])
    candidate = option(two, "data", n_images=2)
    assert candidate.phases[0].step_seconds == 2.0 and candidate.ranks == (0, 1)


# What is not warm


def made(placement: Placement, hosts: int = 2, side: int = 1024) -> StepShape:
    return StepShape.of(ModelVariant("m"), placement, hosts, side, side)


def warm(rank: int, *placements: Placement, **keys: Any) -> Any:
    return mac(rank, **{"compiled": tuple(map(made, placements)), **keys})


def in_ring(rank: int, size: int = 2, name: str = "ring", **keys: Any) -> Any:
    shapes = (made("data"), made("sequence", size))
    return mac(rank, **{"compiled": shapes, "ring": RingPlace(name, rank, size), **keys})


def test_a_first_step_that_compiles_is_counted_once_and_told() -> None:
    jobs = [job(0.1, kernels_seconds=20.0), job(0.5, (0,), kernels_seconds=6.0)]
    cold = option(view_of(jobs=jobs), "sequence", steps=50)
    ready = option(view_of(in_ring(0), in_ring(1), jobs=jobs), "sequence", steps=50)
    assert (cold.cold_seconds, ready.cold_seconds) == (20.0, 0.0)
    assert cold.seconds == pytest.approx(ready.seconds + 20.0)
    choice = plan(ask(steps=50, n_images=9), view_of(jobs=jobs), FLUX, placement="sequence")
    assert choice.notice == "The first picture at this size takes about 20 s longer than the next."
    assert plan(ask(steps=50), view_of(in_ring(0), in_ring(1), jobs=jobs), FLUX).notice == ""


def test_a_cold_ring_is_taken_only_where_it_pays() -> None:
    """One quick picture is painted by the host that is warm; fifty steps are worth a ring."""
    jobs = [job(0.4, first_seconds=8.0, kernels_seconds=99.0), job(1.0, (0,)), job(1.0, (1,))]
    rings = [ring_of(forming_seconds=5.0)]
    hosts = [warm(0, "data"), warm(1, "data")]
    choice = plan(ask(steps=4), view_of(*hosts, jobs=jobs, rings=rings), FLUX)
    quick, later = choice.winner, choice.warm
    long = plan(ask(steps=50), view_of(*hosts, jobs=jobs, rings=rings), FLUX).winner
    assert quick is not None and later is not None and long is not None
    assert (quick.name, quick.cold_seconds) == ("data", 0.0)
    assert (later.name, later.cold_seconds) == ("sequence", 13.0)  # what a mesh should warm
    assert " Once it is warm, sequence on 2 hosts would take 2.6" in choice.reason
    assert (long.name, long.cold_seconds) == ("sequence", 13.0)
    there = [in_ring(0), in_ring(1)]
    quick = plan(ask(steps=4), view_of(*there, jobs=jobs, rings=rings), FLUX).winner
    assert quick is not None and quick.name == "sequence"


def test_engines_that_end_to_form_another_ring_load_again() -> None:
    hosts = [in_ring(rank, size=3) for rank in range(3)]
    view = view_of(*hosts)
    three, two = option(view, "sequence", 3), option(view, "sequence", 2)
    assert three.cold_seconds == 0.0
    assert two.cold_seconds == pytest.approx(24.05e9 / 3e9, rel=0.01)  # all of it, from the disk
    assert two.load_seconds == 0.0
    empty = view_of(*(replace(host, holds=None) for host in hosts))
    assert option(empty, "sequence", 2).cold_seconds == 0.0  # they load in any case
    assert option(empty, "sequence", 2).load_seconds > 0


def over(backend: str, host: HostInfo) -> HostInfo:
    return replace(host, ring=replace(host.ring, backend=backend))


def test_an_engine_that_begins_anew_for_nccl_loses_what_it_holds() -> None:
    alone = replace(view_of(), backend="nccl")
    assert option(alone, "sequence").cold_seconds > 7
    joined = view_of(*(over("nccl", in_ring(rank)) for rank in range(2)))
    joined = replace(joined, backend="nccl")
    assert option(joined, "sequence").cold_seconds == 0.0


@pytest.mark.parametrize(
    "places",
    [
        [RingPlace("a", 0, 2), RingPlace("b", 1, 2)],
        [RingPlace("a", 1, 2), RingPlace("a", 0, 2)],
        [RingPlace("a", 0, 3), RingPlace("a", 1, 3)],
    ],
)
def test_engines_that_are_not_this_very_ring_are_none(places: list[RingPlace]) -> None:
    hosts = [warm(rank, "sequence", ring=place) for rank, place in enumerate(places)]
    rings = [ring_of(forming_seconds=5.0)]
    assert option(view_of(*hosts, rings=rings), "sequence").cold_seconds > 5.0


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"dtype": "float32"}, {"bits": 4}],
    ids=lambda changed: next(iter(changed)),
)
def test_kernels_of_another_model_or_precision_are_no_help(other: dict[str, Any]) -> None:
    jobs = [job(1.0, (0,), kernels_seconds=6.0, first_seconds=0.1)]
    engine = mac(0, compiled=(replace(made("data"), **other),))
    assert option(view_of(engine, jobs=jobs), "data").cold_seconds == 6.0
    assert option(view_of(warm(0, "data"), jobs=jobs), "data").cold_seconds == 0.0


def test_kernels_outlast_what_the_engine_holds_and_serve_other_adapters() -> None:
    jobs = [job(1.0, (0,), kernels_seconds=6.0)]
    for holds in (None, held(model="other")):
        candidate = option(view_of(warm(0, "data", holds=holds), jobs=jobs), "data")
        assert candidate.load_seconds > 0 and candidate.cold_seconds == 0.0
    adapter = AdapterRef("style.safetensors")
    candidate = option(view_of(warm(0, "data"), jobs=jobs), "data", adapters=(adapter,))
    assert candidate.cold_seconds == 0.0


def test_an_unseen_shape_costs_an_engine_with_kernels_what_unseen_shapes_cost() -> None:
    """Not what the very first step of a process took, which compiled all kernels."""
    up = timed(1.0, kernels_seconds=19.0)
    hosts = [warm(rank, "data", measured=(up,)) for rank in range(2)]
    unseen = {"height": 512, "width": 512}
    assert option(view_of(*hosts), "data", **unseen).cold_seconds == 0.0  # nobody knows yet
    assert option(view_of(*hosts), "sequence").cold_seconds == 0.0
    view = view_of(*hosts, jobs=[job(0.6, side=768, first_seconds=0.125)])
    assert option(view, "data", **unseen).cold_seconds == 0.125
    assert option(view, "sequence", **unseen).cold_seconds == 0.125
    assert option(view, "data").cold_seconds == 0.0
    assert plan(ask(**unseen), view, FLUX, placement="sequence").notice == ""


def test_a_placement_never_taken_costs_more_than_a_size_never_seen() -> None:
    """The kernels of a placement are compiled at its first step, whatever its size."""
    jobs = [
        job(0.6, placement_seconds=12.0),
        job(0.6, side=768, first_seconds=0.125),
        job(1.0, (0,), side=768, first_seconds=0.25),
    ]
    hosts = [in_ring(rank) for rank in range(2)]
    view, unseen = view_of(*hosts, jobs=jobs), {"height": 512, "width": 512}
    assert option(view, "sequence", **unseen).cold_seconds == 0.125
    assert option(view, "data", **unseen).cold_seconds == 0.25
    assert option(view, "tensor", **unseen).cold_seconds == 12.0
    assert option(view, "tensor").cold_seconds == 12.0
    renewed = learned(Timings(jobs=(jobs[0],)), Timings(jobs=(job(0.6, placement_seconds=3.0),)))
    assert renewed.jobs[0].measured.placement_seconds == 3.0
    again = learned(renewed, Timings(jobs=(job(0.6),)))
    assert again.jobs[0].measured.placement_seconds == 3.0


def test_a_ring_of_other_sizes_has_shapes_of_its_own() -> None:
    hosts = [in_ring(rank, 3) for rank in range(3)]
    jobs = [job(0.5, (0, 1, 2), first_seconds=0.25, kernels_seconds=9.0)]
    alone = [replace(host, ring=RingPlace("two", host.rank, 2)) for host in hosts[:2]]
    assert option(view_of(*hosts, jobs=jobs), "sequence", 3).cold_seconds == 0.0
    assert option(view_of(*alone, jobs=jobs), "sequence", 2).cold_seconds == 0.25


def test_an_engine_that_ends_for_its_ring_compiles_all_kernels_again() -> None:
    hosts = [warm(rank, "data", "sequence", holds=None) for rank in range(2)]
    jobs = [job(0.5, kernels_seconds=9.0, first_seconds=0.25, backend="nccl")]
    apart = replace(view_of(*hosts, jobs=jobs), backend="nccl")
    assert option(apart, "sequence").cold_seconds == 9.0
    assert option(apart, "data").cold_seconds == 0.0


def test_kernels_take_as_long_at_every_size_as_the_engine_that_compiled_them_last() -> None:
    """Which may have found on its disk what others compiled: no average with the first one's."""
    first, second = job(1.0, kernels_seconds=69.0), job(1.0, kernels_seconds=3.0, when=2.0)
    (averaged,) = learned(Timings(jobs=(first,)), Timings(jobs=(second,))).jobs
    assert averaged.measured.kernels_seconds == 3.0
    (averaged,) = learned(Timings(jobs=(averaged,)), Timings(jobs=(job(1.0, when=3.0),))).jobs
    assert averaged.measured.kernels_seconds == 3.0
    near, late = job(1.0, kernels_seconds=69.0), job(1.0, when=9.0, side=512, kernels_seconds=3.0)
    assert option(view_of(jobs=[near, late]), "sequence").cold_seconds == 3.0


def test_a_ring_that_never_formed_takes_as_long_as_one_of_about_its_size() -> None:
    hosts = [mac(rank) for rank in range(4)]
    rings = [
        ring_of((0, 1), forming_seconds=2.0),
        ring_of((0, 1, 2, 3), forming_seconds=6.0),
    ]
    view = view_of(*hosts, rings=rings)
    seconds = [option(view, "sequence", hosts).cold_seconds for hosts in (2, 3, 4)]
    assert seconds[0] == 2.0 and seconds[1] in (2.0, 6.0) and seconds[2] == 6.0


def test_what_travels_and_waits_is_part_of_the_time() -> None:
    plain = [job(1.0), job(1.0, (0,)), job(1.0, (1,))]
    full_of = [
        job(1.0, begin_seconds=0.5, gap_seconds=0.25),
        job(1.0, (0,), begin_seconds=0.5, gap_seconds=0.125),
        job(1.0, (1,), begin_seconds=0.5, gap_seconds=0.125),
    ]
    for name, images, more in (("sequence", 4, 0.5 + 4 * 0.25), ("data", 4, 0.5 + 2 * 0.125)):
        few, many = (option(view_of(jobs=jobs), name, n_images=images) for jobs in (plain, full_of))
        assert many.seconds == pytest.approx(few.seconds + more)
    mixed = [
        next(
            o for o in plan(ask(n_images=3), view_of(jobs=jobs), FLUX).options if o.name == "mixed"
        )
        for jobs in (plain, full_of)
    ]
    # The prompt is read once; two images go hand in hand, and then one by both.
    assert mixed[1].seconds - mixed[0].seconds == pytest.approx(0.5 + 0.125 + 0.25)
