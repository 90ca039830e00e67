"""What `up` loads where: replicated if that fits, else sharded, else wherever it fits."""

from __future__ import annotations

import pytest

from fluxmesh.cluster import MeshView
from fluxmesh.errors import DoesNotFitError
from fluxmesh.planning.work import Work
from fluxmesh_coordinator.warming import layout, pairs
from tests.unit.meshes import FLUX, GB, ask, full, mac


def work(**keys: object) -> Work:
    return Work.of(ask(height=512, width=512, **keys), FLUX)


def mesh(*gigabytes: int, **keys: object) -> MeshView:
    hosts = [
        mac(rank, memory_bytes=size * GB, free_bytes=size * GB, holds=None, **keys)
        for rank, size in enumerate(gigabytes)
    ]
    return full(*hosts)


def test_weights_are_replicated_where_they_fit() -> None:
    found = layout(work(), mesh(64, 64, 64))
    assert (found.ranks, found.shards, found.idle) == ((0, 1, 2), 1, ())
    assert found.shard(2) == 0


def test_hosts_that_are_too_small_alone_hold_a_shard_each() -> None:
    found = layout(work(), mesh(16, 16, 64, 64))
    assert (found.ranks, found.shards, found.idle) == ((0, 1, 2, 3), 4, ())
    assert [found.shard(rank) for rank in found.ranks] == [0, 1, 2, 3]


def test_where_heads_do_not_divide_only_hosts_with_room_hold_weights() -> None:
    found = layout(work(), mesh(16, 64, 64, 64, 64))  # 24 heads over 5
    assert (found.ranks, found.shards, found.idle) == ((1, 2, 3, 4), 1, (0,))
    assert "host 0 needs" in found.why


def test_agents_of_one_machine_share_its_memory() -> None:
    found = layout(work(), mesh(64, 64, 64, 64, device="one"))
    assert found.shards == 4


def test_a_model_that_no_host_can_hold_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="try --quantize, or more hosts"):
        layout(work(), mesh(4))
    assert layout(work(bits=4), mesh(10)).shards == 1


def test_links_are_measured_in_rounds_in_which_each_host_sends_to_one_other() -> None:
    rounds = pairs([0, 2, 3])
    assert [pair for each in rounds for pair in each] == [
        (0, 2), (2, 3), (3, 0),
        (0, 3), (2, 0), (3, 2),
    ]  # fmt: skip
    assert pairs([0]) == []
    assert pairs([0, 1]) == [[(0, 1), (1, 0)]]


def test_in_a_large_mesh_only_neighbours_are_measured() -> None:
    rounds = pairs(range(20))
    assert {(b - a) % 20 for each in rounds for a, b in each} == {1, 19}
