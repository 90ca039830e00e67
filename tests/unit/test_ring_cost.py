"""A step of hosts together is predicted from what collectives take, and as GPUs and cables took it.

The H100s' numbers: FLUX.1-dev at 1024x1024 in bfloat16 on one host of four H100s (NVLink), one
run. "False ranks" are ranks whose collectives send nothing: their arithmetic alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    LinkInfo,
    MeshView,
    Placement,
    RingPlace,
    RingTiming,
    StepTiming,
    Timings,
)
from fluxmesh.planning.collectives import (
    PlainLink,
    collective_seconds,
    compute_share,
    exposed_seconds,
    fitted,
    interpolated,
)
from fluxmesh.planning.plan import Option, plan
from fluxmesh.planning.workload import Workload
from tests.unit.meshes import FLUX, ask, full, mac

MIB = 1 << 20
ALONE = 129.2e-3  # seconds of a step of one H100
# ranks -> (placement -> (false ranks, real ones), gather, sum, hidden); seconds of each. The gather
# is of 27 and 13.5 MiB a rank, the sum of 27 MiB, on four at the rate of the gathers there.
H100: dict[int, tuple[dict[Placement, tuple[float, float]], float, float, float]] = {
    2: ({"sequence": (74.0e-3, 93.4e-3), "tensor": (75.5e-3, 97.8e-3)}, 0.20e-3, 0.27e-3, 0.625),
    4: ({"sequence": (40.5e-3, 67.1e-3), "tensor": (52.6e-3, 71.7e-3)}, 0.23e-3, 0.25e-3, 0.29),
}
# On one core of a processor, in bfloat16: the part of a step alone that false ranks took of it, the
# slowest one, of `tiny` and of FLUX.2 klein's shape at 128x128, and of 4 blocks of 384 channels.
PROCESSOR: list[tuple[Placement, int, float]] = [
    *(("sequence", 2, 0.532), ("sequence", 2, 0.547), ("sequence", 2, 0.521)),
    *(("sequence", 3, 0.396), ("sequence", 3, 0.384)),
    *(("tensor", 2, 0.544), ("tensor", 2, 0.549), ("tensor", 2, 0.525)),
    *(("tensor", 3, 0.379), ("tensor", 3, 0.388)),
]
SOCKETS = PlainLink(4e9, 5e-5)  # what plain sockets carried there


def timing(ranks: tuple[int, ...], gather: float, total: float, **keys: Any) -> RingTiming:
    """A ring's table with one large size, and a small one at a tenth of the time."""
    gathers = (CollectiveTime(4096, gather / 10), CollectiveTime(54 * MIB // len(ranks), gather))
    sums = (CollectiveTime(4096, total / 10), CollectiveTime(27 * MIB, total))
    return RingTiming(**{"backend": "nccl", "hidden": 0.5, **keys}, ranks=ranks,
                      gathers=gathers, sums=sums)  # fmt: skip


def h100s(size: int) -> MeshView:
    """The mesh that was measured: sockets see little of its links."""
    _, gather, total, hidden = H100[size]
    ranks = tuple(range(size))
    step = StepTiming(
        model="m",
        height=1024,
        width=1024,
        dtype="bfloat16",
        bits=None,
        step_seconds=ALONE,
        decode_seconds=0.057,
    )
    places = [RingPlace("up", rank, size, "nccl") for rank in ranks]
    hosts = [mac(rank, measured=(step,), ring=place) for rank, place in enumerate(places)]
    view = full(*hosts, rate=4e9, backend="nccl")
    rings = (timing(ranks, gather, total, hidden=hidden),)
    return replace(view, timings=Timings(rings))


def step_of(view: MeshView, placement: Placement) -> float:
    return option(view, placement).phases[0].step_seconds


def option(view: MeshView, placement: Placement) -> Option:
    """That of all hosts."""
    (candidate,) = [
        option
        for option in plan(ask(), view, FLUX).options
        if (option.name, option.ranks) == (placement, view.ranks)
    ]
    return candidate


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_the_arithmetic_of_a_rank_is_predicted_as_false_ranks_took_it(
    placement: Placement, size: int
) -> None:
    false, _ = H100[size][0][placement]
    assert ALONE * compute_share(placement, 1 / size, "cuda") == pytest.approx(false, rel=0.05)


@pytest.mark.parametrize(("placement", "size", "false"), PROCESSOR)
def test_small_products_cost_a_processor_less_than_a_gpu(
    placement: Placement, size: int, false: float
) -> None:
    assert compute_share(placement, 1 / size, "cpu") == pytest.approx(false, rel=0.05)
    assert compute_share(placement, 1 / size, "metal") > false


def test_a_mesh_of_processors_is_planned_with_what_they_lose() -> None:
    gpus = h100s(2)
    processors = replace(gpus, hosts=tuple(replace(h, platform="cpu") for h in gpus.hosts))
    for placement in ("sequence", "tensor"):
        assert step_of(processors, placement) < step_of(gpus, placement)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_step_is_predicted_as_h100s_took_it(placement: Placement, size: int) -> None:
    _, real = H100[size][0][placement]
    assert step_of(h100s(size), placement) == pytest.approx(real, rel=0.08)


def test_the_sockets_of_that_host_predicted_something_else() -> None:
    blind = replace(h100s(4), timings=Timings())
    assert step_of(blind, "sequence") > 5 * 67.1e-3
    assert plan(ask(), blind, FLUX).winner == option_of_data(blind)
    seeing = plan(ask(n_images=1, steps=28), h100s(4), FLUX)
    assert seeing.winner is not None and seeing.winner.name == "sequence"


def option_of_data(view: MeshView) -> Option:
    return next(o for o in plan(ask(), view, FLUX).options if o.name == "data")


def test_a_slow_ring_is_not_taken_for_what_sockets_carry() -> None:
    """RDMA that fell back, a cable that went bad: sockets are fast, and collectives are not."""
    fast = full(*(mac(rank) for rank in range(2)), rate=5e9)
    assert plan(ask(), fast, FLUX).winner == option(fast, "sequence")
    slow = replace(fast, timings=Timings((timing((0, 1), 0.5, 0.6, backend="ring"),)))
    choice = plan(ask(), slow, FLUX)
    assert choice.winner is not None and choice.winner.name == "data"
    assert option(slow, "sequence").phases[0].figure == "collectives"


@pytest.mark.parametrize(
    ("backend", "ranks"), [("jaccl", (0, 1)), ("ring", (1, 0)), ("ring", (0,))]
)
def test_a_table_counts_for_its_own_members_and_backend(
    backend: str, ranks: tuple[int, ...]
) -> None:
    plain = full(*(mac(rank) for rank in range(2)))
    other = replace(plain, timings=Timings((timing(ranks, 0.5, 0.6, backend=backend),)))
    assert step_of(other, "sequence") == step_of(plain, "sequence")
    assert option(other, "tensor").phases[0].figure == "links"


def test_a_gather_hides_behind_no_more_than_stands_beside_it() -> None:
    work = Workload.of(ask(), FLUX)

    def exposed(alone: float, gather: float, hidden: float = 1.0) -> float:
        ring = timing((0, 1), gather, gather, hidden=hidden)
        return exposed_seconds(work, "sequence", 2, alone, ring, SOCKETS)

    bare = 57 * (20e-3 + 0.27e-3)
    nbytes = work.collective_bytes("sequence", 2)
    assert nbytes == 27 * MIB
    assert exposed(1.4, 20e-3, hidden=0.0) == pytest.approx(bare)
    # Of 1.4 s, 24.6 ms a block, a third of a single block and 7% of a double one stand beside.
    parts = dict(work.beside_gathers)
    assert parts == pytest.approx({19: 1 / 15, 38: 1 / 3}, rel=0.01)
    hidden = 1.4 / 57 * (19 * parts[19] + 38 * parts[38])
    assert exposed(1.4, 20e-3) == pytest.approx(bare - hidden)
    assert exposed(1e3, 20e-3) == pytest.approx(57 * 0.27e-3)  # all of it
    assert exposed(1e3, 20e-3, hidden=0.25) == pytest.approx(57 * (15e-3 + 0.27e-3))


def test_nothing_stands_beside_a_sum() -> None:
    work, ring = Workload.of(ask(), FLUX), timing((0, 1), 20e-3, 30e-3, hidden=1.0)
    assert exposed_seconds(work, "tensor", 2, 1e3, ring, SOCKETS) == pytest.approx(76 * 30e-3)


TABLE = (CollectiveTime(1000, 1e-3), CollectiveTime(3000, 2e-3), CollectiveTime(5000, 6e-3))


def test_between_measured_sizes_time_is_a_straight_line() -> None:
    assert interpolated(TABLE, 10) == interpolated(TABLE, 1000) == 1e-3
    assert interpolated(TABLE, 2000) == pytest.approx(1.5e-3)
    assert interpolated(TABLE, 4000) == pytest.approx(4e-3)
    assert interpolated(TABLE, 7000) == pytest.approx(10e-3)
    assert interpolated(TABLE[:1], 4000) == pytest.approx(4e-3)
    assert interpolated(TABLE[::-1], 4000) == pytest.approx(4e-3)


def test_a_larger_message_is_never_predicted_faster() -> None:
    odd = (CollectiveTime(1000, 4e-3), CollectiveTime(2000, 1e-3), CollectiveTime(9000, 8e-3))
    assert interpolated(odd, 2000) == 4e-3
    flat = (CollectiveTime(1000, 1e-3), CollectiveTime(2000, 5e-3), CollectiveTime(3000, 5e-3))
    assert interpolated(flat, 5000) == pytest.approx(5e-3 + 2000 * 4e-3 / 2000)


def test_a_table_is_told_as_a_latency_and_a_rate() -> None:
    latency, rate = fitted(TABLE)
    assert latency == 1e-3 and rate == pytest.approx(4000 / 5e-3)
    assert fitted(TABLE[:1]) == (1e-3, pytest.approx(1e6))


def test_without_a_table_the_slowest_link_and_its_latency_count_for_each_hop() -> None:
    links = PlainLink(1e9, 1e-3)
    assert collective_seconds("sequence", 4, 10**6, None, links) == pytest.approx(3 * 2e-3)
    assert collective_seconds("tensor", 4, 4 * 10**6, None, links) == pytest.approx(6 * 2e-3)


TABLES = st.lists(
    st.builds(CollectiveTime, st.integers(1, 1 << 30), st.floats(1e-7, 1e3)), min_size=1, max_size=9
)


@settings(max_examples=200, deadline=None)
@given(TABLES, st.integers(1, 1 << 32), st.integers(0, 1 << 32))
def test_every_table_gives_a_time_that_grows_with_the_size(
    table: list[CollectiveTime], nbytes: int, more: int
) -> None:
    seconds = interpolated(table, nbytes)
    assert min(point.seconds for point in table) * (1 - 1e-9) <= seconds
    assert seconds <= interpolated(table, nbytes + more) * (1 + 1e-9)
    latency, rate = fitted(table)
    assert latency > 0 and rate > 0


@settings(max_examples=100, deadline=None)
@given(TABLES, TABLES, st.floats(0, 5), st.floats(1e-6, 1e3))
def test_what_shows_of_collectives_is_never_less_than_nothing(
    gathers: list[CollectiveTime], sums: list[CollectiveTime], hidden: float, alone: float
) -> None:
    ring = RingTiming(
        backend="ring", ranks=(0, 1), gathers=tuple(gathers), sums=tuple(sums), hidden=hidden
    )
    work = Workload.of(ask(), FLUX)
    for placement in ("sequence", "tensor"):
        assert exposed_seconds(work, placement, 2, alone, ring, SOCKETS) >= 0


# Slow cables, as other rings were measured: a gather's bytes at the rate of the wire.


@pytest.mark.parametrize(
    ("rate", "winner"), [(3.6e9, "sequence"), (1.2e9, "sequence"), (0.11e9, "data")]
)
def test_on_a_slow_wire_what_is_gathered_decides(rate: float, winner: str) -> None:
    """Thunderbolt 5 with RDMA, thunderbolt 4, gigabit Ethernet; two M2 Ultras."""
    plain = full(*(mac(rank) for rank in range(2)), rate=rate)
    gathers = tuple(CollectiveTime(4 << k, 2e-4 + (4 << k) / rate) for k in range(10, 24, 2))
    ring = RingTiming(backend="ring", ranks=(0, 1), gathers=gathers, sums=gathers, hidden=0.9)
    choice = plan(ask(), replace(plain, timings=Timings((ring,))), FLUX)
    assert choice.winner is not None and choice.winner.name == winner


def test_a_ring_of_hosts_that_share_a_link_name_is_found_by_its_members() -> None:
    links = (LinkInfo(source=0, target=1, rate=1e9), LinkInfo(source=1, target=0, rate=1e9))
    view = MeshView((mac(0), mac(1)), links, "nccl", Timings((timing((0, 1), 1e-3, 1e-3),)))
    assert view.ring_timing((0, 1)) is not None and view.ring_timing((0,)) is None
