"""What the planner makes of memory, of layouts, and of weights that are there or must be read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.planning.plan import plan
from tests.unit.meshes import (
    FLUX,
    GB,
    ask,
    full,
    held,
    mac,
    option,
    reading,
    ring,
    warm_text,
    without,
    won,
)


def test_a_model_too_large_for_any_host_is_sharded() -> None:
    bare = {"holds": None, "text": warm_text(nbytes=0)}
    small_macs = [mac(r, memory_bytes=16 * GB, free_bytes=12 * GB, **bare) for r in range(4)]
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
    assert len(winner.ranks) == 1
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
    assert won(choice).seconds == pytest.approx(
        steps + won(choice).load_seconds + won(choice).text_seconds, rel=1e-3
    )


def test_text_encoders_run_where_there_is_room() -> None:
    tight, roomy = mac(0, memory_bytes=30 * GB, text=None), mac(1, text=None)
    view = ring(tight, roomy)
    assert reading(plan(ask(), view, FLUX)) == (1, "stays")
    choice = plan(ask(), ring(tight), FLUX)
    assert reading(choice) == (0, "turns")
    preload = plan(ask(preload=True), ring(tight), FLUX)
    assert preload.winner is None
    assert "no host has 9.8 GB for the text encoders beside the rest" in preload.reason
