"""Hosts that are not equally fast: shares in the plan, what it says, and jobs that go by it."""

from __future__ import annotations

import cProfile
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh import events
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import HostInfo, JobTiming, MeshView, Platform, StepTiming, Timings
from fluxmesh.planning.capacity import Memory
from fluxmesh.planning.plan import Option, plan
from fluxmesh.planning.workload import Workload
from fluxmesh.wire import messages
from fluxmesh_coordinator.console.plan_table import as_json, row
from fluxmesh_coordinator.deploy.shard_layout import layout
from tests.unit.meshes import FLUX, GB, ask, full, held, mac, small
from tests.unit.simulated_jobs import GenerationSimulation


def timed(seconds: float, **keys: Any) -> StepTiming:
    how = {"height": 1024, "width": 1024, "dtype": "bfloat16", "bits": None, **keys}
    return StepTiming(model="m", step_seconds=seconds, decode_seconds=1.0, **how)


def mesh(*seconds: float, rate: float = 5e9, **keys: Any) -> MeshView:
    """Hosts that make a step of 1024x1024 alone in so many seconds."""
    hosts = [mac(rank, measured=(timed(each),), **keys) for rank, each in enumerate(seconds)]
    return full(*hosts, rate=rate)


def option(view: MeshView, placement: str, ranks: tuple[int, ...] = (), **keys: Any) -> Option:
    """The way by this placement on all hosts, or on these."""
    found = plan(ask(**{"n_images": 1, "steps": 20, **keys}), view, FLUX).options
    (only,) = [o for o in found if (o.name, o.ranks) == (placement, ranks or view.ranks)]
    return only


def shares(view: MeshView, placement: str, **keys: Any) -> Shares:
    return option(view, placement, **keys).phases[0].shares


def shown(view: MeshView, placement: str, hosts: int) -> str:
    """Why there is no way by this placement on so many hosts."""
    problems = [
        each.problem
        for each in plan(ask(n_images=1), view, FLUX).options
        if each.name == placement and len(each.ranks) in (0, hosts)
    ]
    return " ".join(problems)


def test_many_hosts_that_differ_are_planned_for_in_little_time() -> None:
    """Counted in calls, which a machine with other work to do makes as many of."""
    view, request = mesh(*(2.0 + 0.2 * k for k in range(8))), ask(n_images=1)
    plan(request, view, FLUX)  # counts tensors and convolutions, once a process
    profile = cProfile.Profile()
    profile.runcall(plan, request, view, FLUX)
    assert sum(entry.callcount for entry in profile.getstats()) < 250_000  # 40 ms; 140,000 are made


# Which shares


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("seconds", [(2.86, 2.86), (2.86, 2.95), (2.86, 2.86, 2.86), (3, 3, 2.9)])
def test_hosts_that_are_equal_but_for_noise_keep_equal_shares(
    placement: str, seconds: tuple[float, ...]
) -> None:
    view = mesh(*seconds)
    only = option(view, placement)
    assert only.phases[0].shares == EVEN and only.phases[0].even_seconds is None
    assert "equal shares" not in plan(ask(), view, FLUX).reason


def test_a_fast_host_has_more_of_the_tokens_and_both_finish_together() -> None:
    view = mesh(2.86, 5.72, rate=1e12)
    phase = option(view, "sequence").phases[0]
    assert sum(phase.tokens) == 4608 and phase.tokens[0] > phase.tokens[1]
    # A tenth of a step is not split: each rank takes 0.1 + 0.9 * share of its own.
    took = [
        alone * (0.1 + 0.9 * tokens / 4608)
        for alone, tokens in zip((2.86, 5.72), phase.tokens, strict=True)
    ]
    assert took[0] == pytest.approx(took[1], rel=0.03)
    assert phase.even_seconds == pytest.approx(5.72 * (0.1 + 0.9 / 2), rel=0.03)
    assert phase.step_seconds < 0.75 * phase.even_seconds


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_slow_processor_has_a_larger_share_than_as_slow_a_gpu(placement: str) -> None:
    """It loses less of its time to what is not split."""

    def slow_part(platform: str) -> float:
        dealt = shares(mesh(2.86, 5.72, rate=1e12, platform=platform), placement)
        units = dealt.tokens or dealt.columns
        return units[1] / sum(units)

    assert 0.28 < slow_part("cpu") < 1 / 3 and slow_part("cpu") > slow_part("metal") + 0.01


@pytest.mark.parametrize("bits", [None, 4])
def test_heads_are_whole_and_columns_make_up_for_them(bits: int | None) -> None:
    holds = held(bits=bits)
    hosts = [mac(0, measured=(timed(2.0, bits=bits),), holds=holds),
             mac(1, measured=(timed(3.1, bits=bits),), holds=holds)]  # fmt: skip
    view = full(*hosts, rate=1e12)
    dealt = shares(view, "tensor", bits=bits)
    assert sum(dealt.heads) == 24 and sum(dealt.columns) == 12288
    assert all(columns % 64 == 0 for columns in dealt.columns)
    work = Workload.of(ask(bits=bits, n_images=1), FLUX)
    by_heads = work.shape.heads_part(work.tokens)
    took = []
    for alone, heads, columns in zip((2.0, 3.1), dealt.heads, dealt.columns, strict=True):
        part = by_heads * heads / 24 + (1 - by_heads) * columns / 12288
        took.append(alone * (0.19 + 0.81 * part))
    assert took[0] == pytest.approx(took[1], rel=0.01)  # a head alone is 4%
    assert FLUX.architecture.partition.obstacle(2, bits is not None, dealt) is None


SPEEDS = st.lists(st.floats(0.5, 8.0), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(SPEEDS, st.sampled_from([1e8, 1e9, 5e9, 1e12]))
def test_shares_add_up_and_are_never_slower_than_equal_ones(
    seconds: list[float], rate: float
) -> None:
    view = mesh(*seconds, rate=rate)
    for only in plan(ask(n_images=1, steps=20), view, FLUX).options:
        if only.problem or only.name not in ("sequence", "tensor"):
            continue
        phase = only.phases[0]
        dealt = phase.shares
        if dealt.are_even:
            continue
        dealt.check(len(phase.ranks))
        units = dealt.tokens or dealt.heads
        assert min(units) >= 1
        if dealt.tokens:
            assert sum(phase.tokens) == 4608 and min(phase.tokens) >= 1
        else:
            assert (sum(dealt.heads), sum(dealt.columns)) == (24, 12288)
            assert min(dealt.columns) >= 1
        if only.name == "tensor" and len(phase.ranks) == 5:
            assert phase.even_seconds is None  # 24 heads don't divide by 5
        else:
            assert phase.even_seconds is not None
            assert phase.even_seconds >= 1.05 * phase.step_seconds


def test_slow_links_are_given_less_to_carry() -> None:
    """Everyone's keys and values are filled up to the longest run: it costs a slow link dearly."""
    fast, slow = (shares(mesh(2.0, 4.0, 4.0, rate=rate), "sequence") for rate in (1e12, 6e8))
    assert max(fast.tokens) > max(slow.tokens or (48,))


# A first guess, memory, what is in use


def test_a_first_guess_at_a_device_tells_kinds_apart_and_not_hosts() -> None:
    """Guesses take 10 ms and are rough: two Macs of one kind never get unequal shares of them."""
    guesses = [mac(0, flops_per_second=20e12), mac(1, flops_per_second=33e12)]
    assert shares(full(*guesses), "sequence") == EVEN
    kinds = [guesses[0], replace(guesses[1], kind="Apple M5 Max", flops_per_second=60e12)]
    dealt = shares(full(*kinds), "sequence")
    assert dealt.tokens[1] > 2 * dealt.tokens[0]
    near = [guesses[0], replace(guesses[1], kind="Apple M3 Max", flops_per_second=24e12)]
    assert shares(full(*near), "sequence") == EVEN


def test_a_step_that_one_host_timed_is_not_held_against_a_guess() -> None:
    view = full(mac(0, measured=(timed(1.0),)), mac(1, kind="Apple M1", flops_per_second=26e12))
    assert shares(view, "sequence") == EVEN


def test_what_equal_shares_could_not_do_is_said() -> None:
    view = pair(small_and_large(11 * GB, 20 * GB, 2.0, 2.0))
    reason = plan(ask(n_images=1), view, FLUX, placement="tensor").reason
    assert reason.endswith(" of the heads and MLP columns, mac1 67% and 61%: with equal shares it "
                           "can't be done.")  # fmt: skip


def test_heads_that_do_not_divide_can_be_dealt_to_hosts_that_differ() -> None:
    equal = plan(ask(n_images=1), mesh(2.0, 2.0, 2.0, 2.0, 2.0), FLUX).options
    (refused,) = [o for o in equal if o.problem]
    assert (refused.ranks, refused.problem) == ((), "24 heads don't divide by 5")
    dealt = shares(mesh(2.0, 2.0, 3.0, 3.0, 3.0), "tensor")
    assert sum(dealt.heads) == 24 and dealt.heads[0] > dealt.heads[4]


def small_and_large(first: int, second: int, *seconds: float) -> MeshView:
    """Two hosts with so many bytes, that hold nothing."""
    each = seconds or (2.86, 2.86)
    hosts: list[HostInfo] = []
    for rank, nbytes in enumerate((first, second)):
        room = {"memory_bytes": nbytes, "free_bytes": nbytes, "holds": None, "text": None}
        hosts.append(mac(rank, measured=(timed(each[rank]),), **room))
    return full(*hosts, mac(2, text=None, holds=None, memory_bytes=GB, free_bytes=20 * GB))


def pair(view: MeshView) -> MeshView:
    return replace(view, hosts=view.hosts[:2])


def test_a_host_with_little_memory_has_a_smaller_shard_even_if_it_is_fast() -> None:
    view = pair(small_and_large(11 * GB, 20 * GB, 2.0, 2.0))
    work = Workload.of(ask(n_images=1, steps=20), FLUX)
    only = Memory(work, view)
    even = only.together("tensor", (0, 1), 2)
    assert [need.fits for need in even] == [False, True]
    fitting = option(view, "tensor")
    assert fitting.memory and all(need.fits for need in fitting.memory), fitting.problem
    phase_shares = fitting.phases[0].shares if fitting.phases else EVEN
    assert phase_shares.heads[0] < phase_shares.heads[1]
    parts = [need.weights_part for need in fitting.memory]
    assert None not in parts and sum(filter(None, parts)) == pytest.approx(1)
    assert [need.load_bytes for need in fitting.memory] == sorted(
        need.load_bytes for need in fitting.memory
    )


def test_a_host_needs_what_its_own_kind_takes_whoever_is_beside_it() -> None:
    """A processor's steps and pictures take gigabytes more than a GPU's."""
    request = ask(n_images=1, steps=20)
    work = Workload.of(request, FLUX)
    gpu, cpu = (max(work.memory("data", 1, 1, kind)) for kind in ("metal", "cpu"))
    assert cpu > gpu + 2 * GB

    def view(*kinds: Platform) -> MeshView:
        """The first with just the memory of a GPU that paints alone."""
        hosts: list[HostInfo] = []
        for rank, kind in enumerate(kinds):
            nbytes = 90 * GB if rank else gpu + GB
            room = {"memory_bytes": nbytes, "free_bytes": nbytes, "holds": None, "text": None}
            seconds = {"metal": 2.0, "cpu": 60.0}[kind]
            hosts.append(mac(rank, measured=(timed(seconds),), platform=kind, **room))
        return full(*hosts)

    by_gpu, by_cpu = layout(work, view("metal", "cpu")), layout(work, view("cpu", "metal"))
    assert (by_gpu.ranks, by_gpu.shards, by_cpu.shards) == ((0, 1), 1, 2)
    beside = view("metal", "cpu")
    chosen = plan(request, beside, FLUX).winner
    assert chosen is not None and (chosen.name, chosen.ranks) == ("data", (0,))
    assert [need.needed for need in chosen.memory] == [gpu]
    assert max(chosen.usage[0].denoise, chosen.usage[0].decode) == gpu
    memory = Memory(work, beside)
    assert [memory.needed(rank, "data", 1, 1) for rank in beside.ranks] == [gpu, cpu]
    ring = [need.needed for need in memory.together("sequence", (0, 1), 1)]
    assert ring == [max(work.memory("sequence", 2, 1, kind)) for kind in ("metal", "cpu")]


def test_shards_that_are_held_stay_until_others_are_clearly_better() -> None:
    best = shares(sharded(EVEN, 2.0, 4.0, bare=True), "tensor")
    assert not best.are_even
    near = Shares(heads=(15, 9), columns=(8192, 4096))
    assert shares(sharded(best, 2.0, 4.0), "tensor") == best
    assert shares(sharded(best, 2.0, 3.7), "tensor") == best  # measured anew, a little faster
    assert shares(sharded(near, 2.0, 3.0), "tensor") == near
    few = {"steps": 1}
    assert shares(sharded(EVEN, 2.0, 4.0), "tensor", **few) == EVEN  # not worth a reload
    many = {"steps": 50, "n_images": 8}
    anew = option(sharded(EVEN, 2.0, 4.0), "tensor", **many)
    assert not anew.phases[0].shares.are_even
    assert all(need.load_bytes for need in anew.memory)
    kept = option(sharded(best, 2.0, 4.0), "tensor", **many)
    assert not any(need.load_bytes for need in kept.memory)


def sharded(dealt: Shares, *seconds: float, bare: bool = False) -> MeshView:
    """Two hosts of 16 GB, each of which holds its shard."""
    hosts: list[HostInfo] = []
    for rank, each in enumerate(seconds):
        holds = None if bare else replace(held(2, rank), shares=dealt, nbytes=10 * GB)
        room = 22 * GB if bare else 12 * GB
        memory = {"memory_bytes": 22 * GB, "free_bytes": room, "holds": holds, "text": None}
        hosts.append(mac(rank, measured=(timed(each),), **memory))
    return full(*hosts)


def test_shards_that_equal_hosts_could_not_have_stay_where_they_are_loaded() -> None:
    """Five hosts can't share 24 heads equally: when they are found to be equal after all, what
    they hold still serves."""
    dealt = Shares(heads=(5, 5, 5, 5, 4), columns=(2496, 2496, 2432, 2432, 2432))
    hosts = [
        mac(
            rank,
            measured=(timed(2.86),),
            holds=replace(held(5, rank), shares=dealt, nbytes=8 * GB),
            memory_bytes=16 * GB,
            free_bytes=8 * GB,
        )
        for rank in range(5)
    ]
    only = option(full(*hosts), "tensor")
    assert not only.problem and only.phases[0].shares == dealt and not only.load_seconds
    bare = [replace(host, holds=None, free_bytes=16 * GB) for host in hosts]
    assert "24 heads don't divide by 5" in shown(full(*bare), "tensor", 5)


def test_the_shares_of_the_last_job_stay_while_they_are_as_good() -> None:
    view = mesh(2.86, 5.72)
    best = shares(view, "sequence")
    other = Shares(tokens=(best.tokens[0] - 1, best.tokens[1] + 1))
    far = Shares(tokens=(best.tokens[0] - 12, best.tokens[1] + 12))
    assert shares(with_job(view, other, 2.5), "sequence") == other
    assert shares(with_job(view, far, 2.5), "sequence") == best


def with_job(view: MeshView, dealt: Shares, seconds: float) -> MeshView:
    """A job by `sequence` that its hosts shared so."""
    measured = timed(seconds, placement="sequence", hosts=2, when=1.0, shares=dealt)
    job = JobTiming(backend="ring", ranks=view.ranks, measured=measured, last_seconds=seconds)
    return replace(view, timings=Timings(jobs=(job,)))


def test_a_step_that_was_timed_in_other_shares_tells_by_what_factor_it_is_off() -> None:
    view = mesh(2.86, 5.72)
    plain = option(view, "sequence").phases[0]
    assert plain.even_seconds is not None
    twice = with_job(view, EVEN, 2 * plain.even_seconds)  # all take twice as long as reckoned
    phase = option(twice, "sequence").phases[0]
    assert phase.shares == plain.shares and phase.figure == "step in other shares"
    assert phase.step_seconds == pytest.approx(2 * plain.step_seconds)
    assert phase.even_seconds == pytest.approx(2 * plain.even_seconds)
    own = option(with_job(view, plain.shares, 2.0), "sequence").phases[0]
    assert (own.step_seconds, own.figure) == (2.0, "step")


# What the plan says


def test_a_plan_says_each_hosts_share_and_what_is_saved() -> None:
    view, asked = mesh(2.86, 5.72), ask(n_images=1, steps=40)
    settled = plan(asked, view, FLUX)
    assert settled.winner is not None and settled.winner.name == "sequence"
    assert "mac0 71% of the tokens, mac1 29%: 96.5 s instead of 2 min 14 s" in settled.reason
    told = as_json(settled, view, 0.0)
    phase = told["options"][told["winner"]]["phases"][0]
    assert phase["shares"]["tokens"] == settled.winner.phases[0].shares.tokens
    assert phase["even_seconds"] > phase["step_seconds"]
    assert "71:29%" in row(settled.winner, True, 0.0)[-1]
    forced = plan(asked, view, FLUX, placement="tensor")
    assert "mac0 75% and 74% of the heads and MLP columns, mac1 25% and 26%: " in forced.reason


def test_hosts_of_one_name_are_told_by_their_rank() -> None:
    view = mesh(2.86, 5.72, name="127.0.0.1")
    assert "host 0 71% of the tokens, host 1 29%: " in plan(ask(steps=20), view, FLUX).reason


# Jobs


def differ(mesh: GenerationSimulation) -> None:
    """Each host is slower than the one before it."""
    for rank, machine in mesh.machines.items():
        seconds = timed(1.0 + 0.5 * rank, height=32, width=32)
        info = replace(machine.leased.info, measured=(seconds,))
        machine.leased = replace(machine.leased, info=info)


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_after_a_death_shares_are_dealt_anew_and_the_picture_is_the_same(placement: Any) -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if len(mesh.of(events.Step)) == 2 and not mesh.of(events.HostLost):
            mesh.lose(1)

    keys = {"placement": placement, "steps": 6, "n_images": 2, "sizes": small(heads=12)}
    mesh = GenerationSimulation(3, **keys, faults=break_one)
    differ(mesh)
    mesh.run().check()
    paints = mesh.messages(messages.Paint)
    rings = {paint.ring_generation for paint in paints}
    by_ring = {ring: {p.shares for p in paints if p.ring_generation == ring} for ring in rings}
    assert [len(each) for each in by_ring.values()] == [1] * len(rings)  # fixed until the death
    sizes = []
    for _, (dealt,) in sorted(by_ring.items()):
        units = dealt.tokens or dealt.heads
        assert sorted(units, reverse=True) == list(units) and units[0] > units[-1]
        sizes.append(len(units))
    assert sizes == [3, 2]
    for load in mesh.messages(messages.Load):
        assert load.shares.are_even == (load.shards == 1)


def test_shards_are_loaded_in_the_shares_that_the_steps_go_by() -> None:
    mesh = GenerationSimulation(2, placement="tensor", steps=3, sizes=small(heads=12))
    differ(mesh)
    size = 100_000
    mesh.give(size)
    while (way := mesh.plan().winner) is None or way.phases[0].shares.are_even:
        size += size // 10  # to the least with which unequal shards fit
        mesh.give(size)
    mesh.run().check()
    loads, paints = mesh.messages(messages.Load), mesh.messages(messages.Paint)
    assert {load.shards for load in loads} == {2}
    assert {load.shares for load in loads} == {paint.shares for paint in paints}
    assert not paints[0].shares.are_even and len(paints) == 2
    assert [load.shard for load in loads] == [0, 1]
