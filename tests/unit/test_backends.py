"""What engines are started with is what mlx.launch would have given them."""

from __future__ import annotations

import json

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.rendezvous import joining, rdma_file, ring_file
from fluxmesh.errors import UsageError

TWO = (Host(0, "127.0.0.1", ("127.0.0.1",)), Host(1, "127.0.0.1", ("127.0.0.1",)))
CABLES = (
    Host(0, "a", ("10.0.0.1",), (None, ("d1",), ("d2", "d3"))),
    Host(1, "b", ("10.0.0.2",), (("e0",), None, ("e2",))),
    Host(2, "c", ("10.0.0.3",), (("f0", "f1"), ("f2",), None)),
)


def test_a_ring_file_has_an_address_for_each_port() -> None:
    hosts = (Host(0, "a", ("10.0.0.1", "10.0.1.1")), Host(1, "b", ("10.0.0.2", "10.0.1.2")))
    assert json.loads(ring_file(hosts, [(5000, 5001), (5002, 5003)])) == [
        ["10.0.0.1:5000", "10.0.1.1:5001"],
        ["10.0.0.2:5002", "10.0.1.2:5003"],
    ]


def test_ports_of_a_ring_must_match_and_differ() -> None:
    with pytest.raises(UsageError, match="listen at 127.0.0.1:5000"):
        ring_file(TWO, [(5000,), (5000,)])
    with pytest.raises(UsageError, match="host 1, ips: 1 addresses have 2 ports"):
        ring_file(TWO, [(5000,), (5001, 5002)])
    with pytest.raises(UsageError, match="2 hosts have ports for 1"):
        ring_file(TWO, [(5000,)])


def test_each_rank_of_a_ring_gets_the_file_and_its_number() -> None:
    first, second = joining("ring", TWO, [(5000,), (5001,)])
    assert first.files == second.files
    assert first.files[0][0] == "MLX_HOSTFILE"
    assert (first.envs, second.envs) == ((("MLX_RANK", "0"),), (("MLX_RANK", "1"),))


def test_ranks_are_those_of_the_group_not_of_the_hostfile() -> None:
    group = (CABLES[0], CABLES[2])
    assert json.loads(rdma_file(group)) == [[None, ["d2", "d3"]], [["f0", "f1"], None]]
    first, second = joining("jaccl", group, [(5000,), ()])
    assert dict(second.envs) == {"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:5000"}
    assert "MLX_IBV_DEVICES" in dict(first.files)
    assert dict(joining("jaccl-ring", CABLES, [(5000,)])[0].envs)["MLX_JACCL_RING"] == "1"


def test_one_cable_is_written_as_one_name() -> None:
    assert json.loads(rdma_file(CABLES))[0] == [None, "d1", ["d2", "d3"]]


def test_gpus_are_counted_on_each_machine() -> None:
    hosts = (*TWO, Host(2, "far", ("10.0.0.1",)))
    envs = [dict(rank.envs) for rank in joining("nccl", hosts, [(5000,)])]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == ["0", "1", "0"]
    assert [env["MLX_RANK"] for env in envs] == ["0", "1", "2"]
    assert {env["MLX_WORLD_SIZE"] for env in envs} == {"3"}
    assert {env["NCCL_HOST_IP"] + ":" + env["NCCL_PORT"] for env in envs} == {"127.0.0.1:5000"}
    chosen = joining("nccl", hosts, [(5000,)], devices=(3, 2, 1))
    assert [dict(rank.envs)["CUDA_VISIBLE_DEVICES"] for rank in chosen] == ["3", "2", "1"]


@pytest.mark.parametrize("backend", ["ring", "jaccl", "jaccl-ring", "nccl", "mpi"])
def test_a_group_of_one_needs_nothing(backend: str) -> None:
    (only,) = joining(backend, TWO[:1], [])
    assert (only.envs, only.files) == ((), ())


def test_a_meeting_point_needs_an_address_and_a_port() -> None:
    with pytest.raises(UsageError, match="host 0, ips: nccl needs an address and a port"):
        joining("nccl", TWO, [(), ()])
