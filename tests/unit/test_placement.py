"""Where the planner puts a request on meshes that people have, and how it explains itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh.cluster.backends import BackendFault, Fallback
from fluxmesh.cluster.snapshot import LinkInfo, MeshView, StepTiming
from fluxmesh.errors import UsageError
from fluxmesh.planning.plan import Option, check_asked, plan
from tests.unit.meshes import FLUX, ask, full, held, mac, option, ring, small, without, won


def test_one_host_needs_no_ring() -> None:
    choice = plan(ask(), ring(mac(0)), FLUX)
    assert [option.name for option in choice.options] == ["data"]
    assert won(choice).ranks == (0,)
    assert choice.reason == "The mesh has one host."


def test_one_host_of_several_is_no_mesh_of_one() -> None:
    two, three = (replace(ring(mac(0)), size=size) for size in (2, 3))
    assert plan(ask(), two, FLUX).reason == (
        "One of the mesh's 2 hosts is free for this; the other is busy, gone or left to other jobs."
    )
    asked = plan(ask(), three, FLUX, placement="tensor").reason
    assert asked == (
        "You asked for tensor, which needs two hosts. One of the mesh's 3 hosts is free for this; "
        "the others are busy, gone or left to other jobs."
    )
    none = plan(ask(), replace(two, hosts=()), FLUX).reason
    assert none == "No host of the mesh can be used now."


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
    assert f"24 heads don't divide by {hosts}" in choice.reason
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


# What the user asks for


def test_force_shard_leaves_out_data_and_still_lists_it() -> None:
    choice = plan(ask(n_images=4), ring(mac(0), mac(1)), FLUX, force_shard=True)
    assert won(choice).name == "sequence"
    assert choice.reason.startswith("You asked for a sharded placement.")
    assert option(choice, "data").seconds < won(choice).seconds


def test_what_is_asked_for_and_cannot_be_done_is_told() -> None:
    mesh = ring(mac(0))
    assert plan(ask(), mesh, FLUX, placement="tensor").reason == (
        "You asked for tensor, which needs two hosts. The mesh has one host."
    )
    both = plan(ask(), mesh, FLUX, placement="data", force_shard=True)
    assert both.winner is None and "exclude each other" in both.reason
    five = full(*(mac(rank) for rank in range(2)))
    odd = plan(ask(), five, small(heads=3), placement="tensor")
    assert odd.winner is None
    assert odd.reason == ("You asked for tensor, which can't be done: 3 heads don't divide by 2.")
    assert plan(ask(), MeshView(()), FLUX).reason == "The mesh has no host."


def test_a_jaccl_mesh_ends_at_eight_hosts() -> None:
    choice = plan(ask(), full(*(mac(rank) for rank in range(9)), backend="jaccl"), FLUX)
    assert option(choice, "sequence", 9).problem == "a jaccl mesh has at most 8 hosts"
    assert not option(choice, "sequence", 8).problem


def test_a_ring_that_fell_back_from_jaccl_is_as_wide_as_its_backend_can_be() -> None:
    view = full(*(mac(rank) for rank in range(9)), backend="jaccl")
    fault = BackendFault(backend="jaccl", ranks=(0, 1), reason="mac1: errno 60.")
    fallen = replace(view, fallback=Fallback(("jaccl-ring", "ring"), (fault,)))
    assert not option(plan(ask(), fallen, FLUX), "sequence", 9).problem
    # A first death is no fall-back yet.
    once = replace(fault, is_out=False)
    tried = replace(view, fallback=Fallback(("jaccl-ring", "ring"), (once,)))
    assert "at most 8" in option(plan(ask(), tried, FLUX), "sequence", 9).problem


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


def test_a_host_that_others_have_costs_what_it_is_waited_for() -> None:
    busy = replace(mac(0), busy_seconds=60.0)
    choice = plan(ask(), ring(busy, mac(1)), FLUX)
    assert won(choice).ranks == (1,) and won(choice).name == "data"
    assert "Others have host 0 for about 60 s." in choice.reason
    idle = plan(ask(), ring(mac(0), mac(1)), FLUX)
    for name in ("sequence", "tensor"):
        waits = option(choice, name)
        assert waits.wait_seconds == 60.0
        assert waits.seconds == pytest.approx(option(idle, name).seconds + 60.0)
    # Not for a moment: then both together are the faster way.
    soon = plan(ask(), ring(replace(mac(0), busy_seconds=0.1), mac(1)), FLUX)
    assert won(soon).ranks == won(idle).ranks == (0, 1)


def test_many_images_wait_for_a_host_that_is_free_soon() -> None:
    """All hosts of a job are leased before it begins."""
    busy = replace(mac(0), busy_seconds=5.0)
    few, many = (plan(ask(n_images=n), ring(busy, mac(1)), FLUX) for n in (1, 40))
    assert won(few).ranks == (1,)
    assert won(many).ranks == (0, 1)
    assert won(many).wait_seconds == 5.0


def test_the_text_is_read_where_nobody_waits() -> None:
    busy = replace(mac(0, flops_per_second=1e15), busy_seconds=60.0)
    choice = plan(ask(), ring(busy, mac(1)), FLUX)
    assert (won(choice).ranks, won(choice).text_rank) == ((1,), 1)


def test_a_request_of_minutes_is_told_with_the_size_that_takes_one() -> None:
    view = ring(mac(0))
    huge = plan(ask(height=3024, width=4032, steps=20), view, FLUX)
    assert huge.shorter is not None
    height, width = huge.shorter
    assert height % 16 == width % 16 == 0
    assert width / height == pytest.approx(4032 / 3024, rel=0.05)
    smaller = won(plan(ask(height=height, width=width, steps=20), view, FLUX))
    assert 40.0 < smaller.seconds <= 60.5
    assert f"29 minutes; at {height}x{width} (`image_size`) it would take about one" in huge.notice
    short = plan(ask(), view, FLUX)
    assert short.shorter is None and "takes about" not in short.notice
    # Where even a small one takes longer, no size is named.
    many = plan(ask(n_images=400, steps=50), view, FLUX)
    assert many.shorter is None and many.notice.startswith("This takes about ")
    # Nor one in which nothing could be seen: sides of 48, 32 and 16 would take a minute.
    told = [
        plan(ask(height=192, width=1920, n_images=4, steps=steps), view, FLUX).shorter
        for steps in range(42, 58, 2)
    ]
    assert None in told and {size[0] for size in told if size is not None} == {64}


@pytest.mark.parametrize(
    ("placement", "force_shard", "sentence"),
    [
        ("pipeline", False, "`placement` is 'pipeline'; choose data, sequence or tensor."),
        ("", False, "`placement` is ''"),
        ("data", True, "`placement` data and `force_shard` exclude each other"),
    ],
)
def test_a_way_that_no_hosts_could_take_is_a_mistake_of_whoever_asks(
    placement: str, force_shard: bool, sentence: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        check_asked(placement, force_shard=force_shard)
    assert caught.value.exit_code == 2
    for name in (None, "data", "sequence", "tensor"):
        check_asked(name, force_shard=False)
