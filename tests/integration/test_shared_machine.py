"""Two users, or two meshes, on one machine whose hostfiles name no port."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fluxmesh.cluster.hostfile import CONTROL_PORT
from fluxmesh.storage.processes import started_at
from fluxmesh_coordinator.agents import bootstrap
from tests.integration.test_mesh_commands import MeshMachine
from tests.ports import free_ports

LOCAL = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}


@pytest.fixture
def users(tmp_path: Path, checkpoint: Path) -> Iterator[list[MeshMachine]]:
    """Two, each with folders of its own; their agents share the machine's ports."""
    both = []
    for name in ("ann", "ben"):
        (tmp_path / name).mkdir()
        both.append(MeshMachine(tmp_path / name, checkpoint))
    yield both
    for user in both:
        user("down", "--force")


def unnamed(user: MeshMachine, agents: int) -> Path:
    """A hostfile of agents on this machine that names no port, as `mlx.distributed_config`'s."""
    path = user.folder / "mesh.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([LOCAL] * agents).encode())
    return path


def ports(user: MeshMachine) -> list[int]:
    return [int(host["address"].rpartition(":")[2]) for host in user.hosts()]


def test_two_users_come_up_at_once_and_do_not_touch_each_other(users: list[MeshMachine]) -> None:
    ann, ben = users
    with ThreadPoolExecutor(2) as pool:
        ups = [pool.submit(user.up, unnamed(user, 2), "--no-warm") for user in users]
    assert [up.result().code for up in ups] == [0, 0]
    taken = {user.folder.name: ports(user) for user in users}
    assert len({*taken["ann"], *taken["ben"]}) == 4, taken
    record = json.loads((ann.folder / "fluxmesh_home" / "mesh.json").read_text())
    assert [int(each["address"].rpartition(":")[2]) for each in record["members"]] == taken["ann"]
    pids = {host["pid"]: started_at(host["pid"]) for host in ann.hosts() + ben.hosts()}
    assert len(pids) == 4
    # Again, each finds its own, wherever they are.
    for user in users:
        user.up(unnamed(user, 2), "--no-warm")
    assert taken == {user.folder.name: ports(user) for user in users}
    assert pids == {pid: started_at(pid) for pid in pids}
    # One goes; the other stays, is found again although a lower port is free now, and paints.
    bens = {host["pid"] for host in ben.hosts()}
    assert ann("down").code == 0
    ben.up(unnamed(ben, 2), "--no-warm")
    assert {host["pid"] for host in ben.hosts()} == bens and ports(ben) == taken["ben"]
    painted = ben("generate", "a dog", "--model", ben.model, "--steps", "1", "-o", "dog.png")
    assert painted.code == 0, painted.err
    logs = ben("logs")
    assert logs.code == 0 and "listens at" in logs.out
    assert ben("down").code == 0
    assert not any(started_at(pid) == start for pid, start in pids.items())


def test_this_machine_alone_takes_the_next_port_too(users: list[MeshMachine]) -> None:
    for user in users:
        user.up("--no-warm")
    assert ports(users[0]) != ports(users[1])
    assert ports(users[0])[0] >= CONTROL_PORT


def test_a_port_that_is_taken_between_look_and_start_costs_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's agent listens there by the time that ours wants to."""
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path))
    first, second = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        looked, can_bind = [], bootstrap.can_bind

        def race(address: str, port: int) -> bool:
            looked.append(port)
            if looked == [first]:
                taken.close()
                free = can_bind(address, port)
                rival.bind((address, port))
                rival.listen()
                return free
            return can_bind(address, port)

        monkeypatch.setattr(bootstrap, "can_bind", race)
        with socket.socket() as rival:
            spec = {"address": "127.0.0.1", "port": first, "ports": [first, second]}
            request = {"spec": spec, "authorized": {"ann": "k" * 40}, "rotate": False}
            answer = bootstrap.start(request, print)
            try:
                assert answer["endpoint"] == f"127.0.0.1:{second}"
                assert answer["fresh"] and looked[0] == first
            finally:
                bootstrap.stop({"port": second}, print)
    assert started_at(answer["pid"]) is None or os.getpid() == answer["pid"]
