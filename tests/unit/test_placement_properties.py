"""What holds for every plan: it is total, fits memory, and counts every image once."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    HostInfo,
    JobTiming,
    LinkInfo,
    MeshView,
    RingPlace,
    RingTiming,
    StepShape,
    StepTiming,
    Timings,
)
from fluxmesh.planning.plan import CLOSE, Option, Plan, plan
from fluxmesh.planning.workload import tensor_problem
from tests.unit.meshes import FLUX, ask, full, held, mac, ring, small, won

MODELS = [
    small(heads=heads, head_dim=dim, mlp_ratio=ratio)
    for heads, dim, ratio in ((4, 16, 4.0), (3, 32, 2.5), (12, 16, 4.0), (6, 8, 3.0))
]


REQUESTS = st.builds(
    lambda images, height, width, steps, bits, dtype, low, batch: ask(
        n_images=images,
        height=16 * height,
        width=16 * width,
        steps=steps,
        bits=bits,
        dtype=dtype,
        low_memory=low,
        decoding_batch_size=batch,
    ),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(1, 8),
    st.none() | st.integers(1, 6),
    st.sampled_from([None, None, 4, 8]),
    st.sampled_from(["bfloat16", "float32"]),
    st.booleans(),
    st.integers(1, 3),
)


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers from 10^low to 10^high, each size as likely as the next."""
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def _ranks(count: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, 9), min_size=count, max_size=count)


def tables() -> st.SearchStrategy[tuple[CollectiveTime, ...]]:
    points = st.builds(CollectiveTime, st.integers(1, 1 << 25), powers(-6, 1))
    return st.lists(points, max_size=4).map(tuple)


@st.composite
def timings(draw: st.DrawFn, ranks: list[int]) -> Timings:
    """Tables of some rings, and times of some jobs, on any of these hosts."""
    members = [tuple(ranks), tuple(ranks[:2]), tuple(ranks[1:])] if len(ranks) > 1 else []
    if not members:
        return Timings()
    some, seconds = st.sampled_from(members), powers(-6, 2)
    maybe = st.none() | seconds
    rings = st.builds(
        RingTiming,
        backend=st.sampled_from(["ring", "nccl"]),
        ranks=some,
        gathers=tables(),
        sums=tables(),
        hidden=st.floats(0, 2),
        forming_seconds=st.just(0.0) | seconds,
        when=seconds,
    )
    measured = st.builds(
        StepTiming,
        model=st.just("m"),
        height=st.sampled_from([32, 64, 128]),
        width=st.just(64),
        dtype=st.sampled_from(["bfloat16", "float32"]),
        bits=st.sampled_from([None, 4]),
        step_seconds=seconds,
        decode_seconds=maybe,
        placement=st.sampled_from(["data", "sequence", "tensor"]),
        hosts=st.just(1),
        first_seconds=maybe,
        when=seconds,
    )
    jobs = st.builds(
        lambda measured, ranks, **times: JobTiming(
            backend="" if measured.placement == "data" else "ring",
            ranks=ranks[:1] if measured.placement == "data" else ranks,
            measured=replace(measured, hosts=1 if measured.placement == "data" else len(ranks)),
            **times,
        ),
        measured,
        some,
        last_seconds=seconds,
        begin_seconds=maybe,
        gap_seconds=maybe,
    )
    few = st.lists(rings, max_size=3), st.lists(jobs, max_size=6)
    return Timings(tuple(draw(few[0])), tuple(draw(few[1])))


@st.composite
def views(draw: st.DrawFn) -> MeshView:
    """Up to six hosts, of any speed and size, some of them on one device, some links missing."""
    ranks = sorted(draw(st.sampled_from([0, 1, 2, 3, 4, 6]).flatmap(_ranks)))
    sizes, slow = powers(6, 8.5).map(int), draw(powers(-3, 2))
    hosts: list[HostInfo] = []
    for rank in ranks:
        shards = draw(st.integers(1, 4))
        bits = draw(st.sampled_from([None, 4]))
        holds = held(shards, draw(st.integers(0, shards - 1)), bits=bits)
        made = StepShape(
            model="m",
            dtype="bfloat16",
            bits=bits,
            placement="data",
            hosts=1,
            height=64,
            width=64,
        )
        holds = replace(holds, nbytes=draw(st.integers(0, 10**6)))
        hosts.append(
            mac(
                rank,
                memory_bytes=draw(sizes),
                free_bytes=draw(sizes),
                flops_per_second=draw(powers(9, 10)) * slow,
                load_rate=draw(powers(6, 9)),
                holds=draw(st.sampled_from([None, holds])),
                device=draw(st.sampled_from(["", "", "gpu", "other"])),
                compiled=draw(st.sampled_from([(), (made,)])),
                ring=RingPlace(draw(st.sampled_from(["", "a"])), len(hosts), len(ranks)),
            )
        )
    missing = draw(st.sets(st.tuples(*[st.sampled_from(ranks)] * 2), max_size=3)) if ranks else ()
    links = [
        LinkInfo(
            source=a, target=b, rate=draw(powers(7, 9)), latency=draw(st.sampled_from([0.0, 1e-4]))
        )
        for a in ranks
        for b in ranks
        if a != b and (a, b) not in missing
    ]
    backend = draw(st.sampled_from(["ring", "nccl"]))
    return MeshView(tuple(hosts), tuple(links), backend, draw(timings(ranks)))


def check_memory(view: MeshView, option: Option) -> None:
    """Each host has what it needs, and so have all of those on one device together."""
    needed = {need.rank: need.needed for need in option.memory}
    for host in view.hosts:
        same = [other for other in view.hosts if other.device_key == host.device_key]
        used = [other for other in same if other.rank in needed]
        room = min(other.free_bytes for other in same) + sum(other.held_bytes for other in used)
        assert not used or sum(needed[other.rank] for other in used) <= room
        assert needed.get(host.rank, 0) <= host.memory_bytes


def check(choice: Plan, view: MeshView, option: Option) -> None:
    """An option that can be taken does all the work, on hosts that can do it together."""
    work = choice.work
    assert math.isfinite(option.seconds) and option.seconds > 0
    assert 0 <= option.load_seconds <= option.seconds * (1 + 1e-9)
    assert 0 <= option.cold_seconds <= option.seconds * (1 + 1e-9)
    images = [image for phase in option.phases for image in phase.images]
    assert images == list(range(work.images))
    assert {rank for phase in option.phases for rank in phase.ranks} == set(option.ranks)
    assert set(option.ranks) <= set(view.ranks) and option.text_rank in view.ranks
    assert [need.rank for need in option.memory] == list(option.ranks)
    check_memory(view, option)
    for phase in option.phases:
        assert len(phase.owners) == len(phase.images)
        assert set(phase.owners) <= set(phase.ranks)
        assert phase.layout == "replicated" or phase.placement == "tensor"
        if phase.placement == "data":
            continue
        assert len(phase.ranks) > 1 and list(phase.ranks) == sorted(phase.ranks)
        for a, b in zip(phase.ranks, phase.ranks[1:] + phase.ranks[:1], strict=True):
            assert view.link(a, b) is not None
        if phase.placement == "tensor":
            assert tensor_problem(work, len(phase.ranks), phase.shares) == ""
        else:
            assert sum(phase.tokens) == work.tokens and min(phase.tokens) > 0
            assert len(phase.tokens) == len(phase.ranks)


@settings(max_examples=200, deadline=None)
@given(
    REQUESTS,
    views(),
    st.sampled_from(MODELS),
    st.sampled_from([None, None, "data", "sequence", "tensor"]),
    st.booleans(),
)
def test_every_request_on_every_mesh_has_a_plan(
    request: Any, view: MeshView, model: Any, placement: Any, force: bool
) -> None:
    choice = plan(request, view, model, placement=placement, force_shard=force)
    assert choice.reason.endswith(".") and "\n" not in choice.reason
    for option in choice.options:
        if option.problem:
            assert math.isinf(option.seconds)
        else:
            check(choice, view, option)
    seconds = [option.seconds for option in choice.options]
    assert seconds == sorted(seconds)
    names = Counter(option.name for option in choice.options)
    assert names["data"] == (1 if view.hosts else 0)
    assert names["sequence"] == names["tensor"] == max(len(view.hosts) - 1, 0)
    allowed = [
        option
        for option in choice.options
        if not option.problem
        and placement in (None, option.name)
        and (not force or option.name in ("sequence", "tensor"))
    ]
    if choice.winner is None:
        assert not allowed
    else:
        assert choice.winner in allowed
        assert choice.winner.seconds <= CLOSE * min(option.seconds for option in allowed)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.floats(1e8, 1e11))
def test_another_equal_host_never_makes_it_slower(hosts: int, images: int, rate: float) -> None:
    fewer, more = (
        plan(ask(n_images=images), full(*(mac(rank) for rank in range(size)), rate=rate), FLUX)
        for size in (hosts, hosts + 1)
    )
    assert more.options[0].seconds <= fewer.options[0].seconds * 1.02


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 40))
def test_equal_hosts_get_images_within_one_of_even(hosts: int, images: int) -> None:
    view = ring(*(mac(rank) for rank in range(hosts)), rate=1e6)
    owners = won(plan(ask(n_images=images), view, FLUX, placement="data")).phases[0].owners
    counts = [owners.count(rank) for rank in range(hosts)]
    assert max(counts) - min(counts) <= 1


def test_the_same_question_has_the_same_answer() -> None:
    view = full(*(mac(rank) for rank in range(4)))
    assert plan(ask(n_images=5), view, FLUX) == plan(ask(n_images=5), view, FLUX)
