"""The planner is total, fits memory, counts every image once, and explains itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
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
from fluxmesh.errors import UsageError
from fluxmesh.planning.plan import CLOSE, Option, Plan, plan
from fluxmesh.planning.workload import tensor_problem
from tests.unit.meshes import FLUX, GB, ask, full, held, mac, ring, small, without


def option(choice: Plan, name: str, hosts: int | None = None) -> Option:
    """The plan's option of that name and, for rings, on so many hosts."""
    (match,) = [
        option
        for option in choice.options
        if option.name == name and (hosts is None or len(option.ranks) == hosts)
    ]
    return match


def won(choice: Plan) -> Option:
    assert choice.winner is not None, choice.reason
    return choice.winner


# What FLUX does on meshes that people have


def test_one_host_needs_no_ring() -> None:
    choice = plan(ask(), ring(mac(0)), FLUX)
    assert [option.name for option in choice.options] == ["data"]
    assert won(choice).ranks == (0,)
    assert choice.reason == "The mesh has one host."


def test_one_image_is_spread_over_a_ring_and_four_are_handed_out() -> None:
    view = ring(*(mac(rank) for rank in range(4)))
    single, four = plan(ask(), view, FLUX), plan(ask(n_images=4), view, FLUX)
    assert (won(single).name, won(single).ranks) == ("sequence", (0, 1, 2, 3))
    assert won(single).phases[0].tokens == (1152,) * 4
    assert (won(four).name, won(four).phases[0].owners) == ("data", (0, 1, 2, 3))
    assert won(four).phases[0].sent_a_step == 0
    assert "sequence on 4 hosts is predicted to take" in single.reason
    assert "the next best, sequence on 2 hosts" in single.reason


def test_five_images_on_four_hosts_are_four_and_one() -> None:
    choice = plan(ask(n_images=5), ring(*(mac(rank) for rank in range(4))), FLUX)
    first, last = won(choice).phases
    assert won(choice).name == "mixed"
    assert (first.placement, first.images, first.owners) == ("data", (0, 1, 2, 3), (0, 1, 2, 3))
    assert (last.placement, last.images, last.ranks) == ("sequence", (4,), (0, 1, 2, 3))
    alone = plan(ask(n_images=4), found_view := ring(*(mac(r) for r in range(4))), FLUX)
    assert won(choice).seconds == pytest.approx(
        won(alone).seconds + won(plan(ask(), found_view, FLUX)).seconds
    )


def test_slow_links_keep_images_whole() -> None:
    choice = plan(ask(), ring(mac(0), mac(1), rate=1e8), FLUX)
    assert won(choice).name == "data"
    assert option(choice, "sequence").seconds > option(choice, "data").seconds


def test_predicted_seconds_are_the_slowest_share_and_the_bytes_on_the_wire() -> None:
    timed = (
        StepTiming(
            model="m",
            height=1024,
            width=1024,
            dtype="bfloat16",
            bits=None,
            step_seconds=2.8,
            decode_seconds=0.5,
        ),
    )
    view = ring(mac(0, measured=timed), mac(1, measured=timed), rate=1.2e9)
    view = replace(view, links=tuple(replace(link, latency=0.0) for link in view.links))
    choice = plan(ask(), view, FLUX)
    tensor = option(choice, "tensor")
    assert tensor.measured
    share = 2.8 * (0.19 + 0.81 / 2)  # some of it is not less on two hosts
    assert tensor.phases[0].step_seconds == pytest.approx(share + 1.8, rel=0.01)  # 2.15 GB: 1.8 s
    gather = 4 * 344 * 3072 * 2 / 2 / 1.2e9  # modulations of 4 steps, once
    assert tensor.seconds == pytest.approx(4 * (share + 2151677952 / 1.2e9) + gather + 0.5)
    assert option(choice, "data").seconds == pytest.approx(4 * 2.8 + 0.5)


def test_every_hop_of_a_collective_waits_for_the_link() -> None:
    hosts = [mac(rank) for rank in range(4)]
    slow, fast = (
        replace(view, links=tuple(replace(link, latency=wait) for link in view.links))
        for view, wait in ((full(*hosts), 1e-3), (full(*hosts), 0.0))
    )
    for name, least, most in (("tensor", 76 * 2 * 3, 76 * 2 * 3), ("sequence", 57 * 3 / 2, 57 * 3)):
        late, soon = (option(plan(ask(), view, FLUX), name, 4).phases[0] for view in (slow, fast))
        longer = late.step_seconds - soon.step_seconds
        assert least * 1e-3 <= longer * (1 + 1e-9) and longer <= most * 1e-3 * (1 + 1e-9)


def test_where_times_are_nearly_the_same_the_more_exact_way_is_taken() -> None:
    choice = plan(ask(), ring(mac(0), mac(1), rate=1e9), FLUX)
    assert choice.options[0].name == "sequence"
    assert won(choice).name == "data"
    assert choice.reason.endswith("nearly the same, and the first is the more exact.")


@pytest.mark.parametrize("hosts", [5, 7])
def test_tensor_uses_fewer_hosts_where_heads_do_not_divide(hosts: int) -> None:
    view = full(*(mac(rank) for rank in range(hosts)), rate=2e10)
    choice = plan(ask(), view, FLUX, placement="tensor")
    assert len(won(choice).ranks) == hosts - 1
    assert f"24 heads do not divide by {hosts}" in choice.reason
    assert choice.reason.startswith("You asked for tensor.")


def test_sequence_takes_any_number_of_hosts() -> None:
    choice = plan(
        ask(), full(*(mac(rank) for rank in range(5)), rate=2e10), FLUX, placement="sequence"
    )
    assert won(choice).phases[0].tokens == (922, 922, 922, 922, 920)


def test_a_ring_exists_only_where_cables_do() -> None:
    view = without(ring(*(mac(rank) for rank in range(4))), 2)
    choice = plan(ask(), view, FLUX)
    assert option(choice, "sequence", 3).problem == "no link from host 1 to host 3"
    assert option(choice, "sequence", 2).ranks in ((0, 1), (0, 3))
    assert len(won(choice).ranks) == 2


def test_of_unequal_hosts_in_a_ring_the_fastest_neighbours_work_together() -> None:
    rates = (26e12, 13e12, 26e12, 20e12)
    view = ring(*(mac(rank, flops_per_second=rate) for rank, rate in enumerate(rates)))
    assert option(plan(ask(), view, FLUX), "sequence", 2).ranks == (2, 3)


def test_unequal_hosts_get_unequal_work_and_a_useless_one_none() -> None:
    fast, slow = mac(0), mac(1, flops_per_second=13e12)
    owners = won(plan(ask(n_images=6), ring(fast, slow, rate=1e8), FLUX)).phases[0].owners
    assert Counter(owners) == {0: 4, 1: 2}
    useless = mac(1, flops_per_second=1e12)
    alone = won(plan(ask(n_images=3), ring(fast, useless), FLUX))
    assert (alone.name, alone.ranks) == ("data", (0,))


# Memory, layouts, loading


def test_a_model_too_large_for_any_host_is_sharded() -> None:
    small_macs = [mac(r, memory_bytes=16 * GB, free_bytes=12 * GB, holds=None) for r in range(4)]
    choice = plan(ask(), full(*small_macs), FLUX)
    assert won(choice).name == "tensor" and won(choice).phases[0].layout == "sharded"
    assert len(won(choice).ranks) == 4
    assert option(choice, "data").problem == "host 0 needs 26.1 GB and may use 12.0 GB"
    assert "host 0 needs" in option(choice, "sequence", 4).problem
    need = won(choice).memory[0]
    assert need.load_bytes == pytest.approx(23.7e9 / 4 + 0.24e9, rel=0.01)
    assert won(choice).load_seconds == pytest.approx(need.load_bytes / 3e9)


def test_slower_hosts_that_hold_the_model_are_found_among_faster_ones_that_cannot() -> None:
    def host(rank: int) -> HostInfo:
        if rank % 2:
            return mac(rank, flops_per_second=13e12)
        return mac(rank, memory_bytes=8 * GB)

    choice = plan(ask(), full(*(host(rank) for rank in range(4))), FLUX)
    assert option(choice, "sequence", 2).ranks == (1, 3)


def test_what_an_idle_agent_holds_is_not_free() -> None:
    agents = [mac(rank, device="gpu", free_bytes=4 * GB) for rank in range(2)]
    winner = won(plan(ask(), full(*agents, rate=1e8), FLUX))
    assert (len(winner.ranks), winner.text_stays) == (1, False)
    assert winner.memory[0].available == 28 * GB


def test_nothing_fits_and_the_reason_says_how_much_is_missing() -> None:
    choice = plan(ask(), full(*(mac(r, memory_bytes=4 * GB, holds=None) for r in range(2))), FLUX)
    assert choice.winner is None
    assert choice.reason.startswith(
        "No placement can be done: host 0 needs 26.1 GB and may use 4.0"
    )
    assert all(math.isinf(option.seconds) for option in choice.options)


def test_going_back_to_replicated_is_a_reload_that_is_priced() -> None:
    hosts = [mac(rank, holds=held(4, rank)) for rank in range(4)]
    single, many = plan(ask(), full(*hosts), FLUX), plan(ask(n_images=40), full(*hosts), FLUX)
    assert (won(single).name, won(single).phases[0].layout) == ("tensor", "sharded")
    assert won(single).load_seconds == 0
    assert option(single, "data").load_seconds == pytest.approx(7.98, abs=0.01)  # 24 GB at 3 GB/s
    assert won(many).name == "data"
    assert won(many).load_seconds > 0


def test_shards_of_another_split_are_read_again() -> None:
    hosts = [mac(rank, memory_bytes=16 * GB, holds=held(4, rank)) for rank in range(4)]
    three = without(full(*hosts), 3)
    choice = plan(ask(), three, FLUX)
    assert won(choice).phases[0].layout == "sharded"
    assert all(need.load_bytes > 0 for need in won(choice).memory)


def test_a_host_with_anothers_shard_reads_its_own() -> None:
    hosts = [mac(r, memory_bytes=16 * GB, holds=held(4, s)) for r, s in enumerate((0, 2, 1, 3))]
    tensor = option(plan(ask(), full(*hosts), FLUX), "tensor", 4)
    assert [need.load_bytes > 0 for need in tensor.memory] == [False, True, True, False]


@pytest.mark.parametrize("keys", [{"bits": 4}, {"dtype": "float32"}, {"model": "other"}])
def test_other_weights_are_loaded_first(keys: dict[str, Any]) -> None:
    assert won(plan(ask(**keys), ring(mac(0)), FLUX)).load_seconds > 0
    assert won(plan(ask(**keys), ring(mac(0, holds=held(**keys))), FLUX)).load_seconds == 0


def test_agents_on_one_machine_share_its_memory_and_its_gpu() -> None:
    agents = [mac(r, device="gpu", free_bytes=66 * GB, holds=None) for r in range(4)]
    choice = plan(ask(n_images=4), full(*agents, rate=8e9), FLUX)
    assert won(choice).name == "data"
    assert len(won(choice).ranks) == 2  # 26 GB each
    roomy = [replace(agent, free_bytes=200 * GB) for agent in agents]
    choice = plan(ask(n_images=5), full(*roomy, rate=8e9), FLUX)
    assert sorted(Counter(won(choice).phases[0].owners).values()) == [1, 1, 1, 2]
    steps = 5 * (4 * 74.362e12 + 10.472e12 / 0.4) / 26e12
    assert won(choice).seconds == pytest.approx(steps + won(choice).load_seconds, rel=1e-3)


def test_text_encoders_run_where_there_is_room() -> None:
    tight, roomy = mac(0, memory_bytes=30 * GB), mac(1)
    view = ring(tight, roomy)
    assert (won(plan(ask(), view, FLUX)).text_rank, won(plan(ask(), view, FLUX)).text_stays) == (
        1,
        True,
    )
    choice = plan(ask(), ring(tight), FLUX)
    assert (won(choice).text_rank, won(choice).text_stays) == (0, False)
    preload = plan(ask(preload=True), ring(tight), FLUX)
    assert preload.winner is None
    assert "no host has 9.8 GB for the text encoders beside the rest" in preload.reason


# What the user asks for


def test_force_shard_leaves_out_data_and_still_lists_it() -> None:
    choice = plan(ask(n_images=4), ring(mac(0), mac(1)), FLUX, force_shard=True)
    assert won(choice).name == "sequence"
    assert choice.reason.startswith("You asked for a sharded placement.")
    assert option(choice, "data").seconds < won(choice).seconds


def test_what_is_asked_for_and_cannot_be_done_is_told() -> None:
    mesh = ring(mac(0))
    assert plan(ask(), mesh, FLUX, placement="tensor").reason == (
        "You asked for tensor, which needs two hosts; the mesh has 1."
    )
    both = plan(ask(), mesh, FLUX, placement="data", force_shard=True)
    assert both.winner is None and "exclude each other" in both.reason
    five = full(*(mac(rank) for rank in range(2)))
    odd = plan(ask(), five, small(heads=3), placement="tensor")
    assert odd.winner is None
    assert odd.reason == ("You asked for tensor, which can't be done: 3 heads do not divide by 2.")
    assert plan(ask(), MeshView(()), FLUX).reason == "The mesh has no host."


def test_a_jaccl_mesh_ends_at_eight_hosts() -> None:
    choice = plan(ask(), full(*(mac(rank) for rank in range(9)), backend="jaccl"), FLUX)
    problems = [option.problem for option in choice.options if option.problem]
    assert "a jaccl mesh has at most 8 hosts" in problems


def test_reports_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="flops_per_second as 0"):
        mac(0, flops_per_second=0)
    with pytest.raises(UsageError, match="rate as nan"):
        LinkInfo(source=0, target=1, rate=math.nan)
    with pytest.raises(UsageError, match="step_seconds as -1"):
        StepTiming(model="m", height=64, width=64, dtype="bfloat16", bits=None, step_seconds=-1)
    with pytest.raises(UsageError, match="Shard 2 of 2"):
        held(2, 2)
    with pytest.raises(UsageError, match="ranks of a mesh must rise"):
        MeshView((mac(1), mac(0)))


# What holds for every mesh

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
            assert tensor_problem(work, len(phase.ranks)) == ""
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


@given(st.integers(1, 6), st.integers(1, 40))
def test_equal_hosts_get_images_within_one_of_even(hosts: int, images: int) -> None:
    view = ring(*(mac(rank) for rank in range(hosts)), rate=1e6)
    owners = won(plan(ask(n_images=images), view, FLUX, placement="data")).phases[0].owners
    counts = [owners.count(rank) for rank in range(hosts)]
    assert max(counts) - min(counts) <= 1


def test_the_same_question_has_the_same_answer() -> None:
    view = full(*(mac(rank) for rank in range(4)))
    assert plan(ask(n_images=5), view, FLUX) == plan(ask(n_images=5), view, FLUX)


def test_what_one_agent_measured_holds_for_all_on_its_device() -> None:
    timed = StepTiming(
        model="m", height=1024, width=1024, dtype="bfloat16", bits=None, step_seconds=2.0
    )
    hosts = [
        mac(0, device="one", measured=(timed,)),
        mac(1, device="one"),
        mac(2, device="two"),
    ]
    choice = plan(ask(height=1024, width=1024, n_images=3), full(*hosts), FLUX)
    whole = next(option for option in choice.options if option.name == "data")
    assert not whole.measured
    pair = plan(ask(height=1024, width=1024, n_images=2), full(*hosts[:2]), FLUX)
    both = next(option for option in pair.options if option.name == "sequence")
    assert both.ranks == (0, 1) and both.measured


def test_a_ring_that_was_timed_takes_what_it_took() -> None:
    """Hosts that hold shards never time a step alone: what they took together is what counts."""

    def timed(seconds: float, **keys: Any) -> tuple[StepTiming, ...]:
        how = {"placement": "tensor", "hosts": 2, **keys}
        return (
            StepTiming(
                model="m",
                height=512,
                width=512,
                dtype="bfloat16",
                bits=None,
                step_seconds=seconds,
                decode_seconds=0.5,
                **how,
            ),
        )

    def tensor(*seconds: float, size: int = 512, **keys: Any) -> Option:
        hosts = [mac(rank, measured=timed(each, **keys)) for rank, each in enumerate(seconds)]
        choice = plan(ask(height=size, width=size), ring(*hosts, rate=1.2e9), FLUX)
        return option(choice, "tensor", 2)

    both = tensor(3.0, 3.5)
    assert both.measured and both.phases[0].step_seconds == 3.5
    # At another size it is off by the same factor.
    view = ring(mac(0), mac(1), rate=1.2e9)
    small, large = (
        option(plan(ask(height=size, width=size), view, FLUX), "tensor", 2).phases[0].step_seconds
        for size in (512, 1024)
    )
    larger = tensor(3.0, 3.5, size=1024)
    assert not larger.measured
    assert larger.phases[0].step_seconds == pytest.approx(3.5 * large / small)
    # Of another ring, or told by one host alone, it tells nothing; nor of a host by itself.
    for other in ({"hosts": 3}, {"placement": "sequence"}):
        assert tensor(3.0, 3.5, **other).phases[0].step_seconds == pytest.approx(small)
    hosts = [mac(0, measured=timed(3.0)), mac(1)]
    choice = plan(ask(height=512, width=512), ring(*hosts, rate=1.2e9), FLUX)
    assert option(choice, "tensor", 2).phases[0].step_seconds == pytest.approx(small)
    assert not option(choice, "data").measured
