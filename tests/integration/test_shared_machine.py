"""Two users, or two meshes, on one machine whose hostfiles name no port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.hostfile import CONTROL_PORT
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.processes import end_process, started_at
from fluxmesh.version import __version__
from fluxmesh_coordinator.agents import agent_here, bootstrap, remote
from fluxmesh_coordinator.agents.agent_here import Agent
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


Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Asks the starter of this machine for the agent at a port of its own."""
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path))
    (port,) = free_ports(1)
    spec = {"address": "127.0.0.1", "port": port}
    request = {"spec": spec, "authorized": {"ann": "k" * 40}, "rotate": False}
    yield lambda **more: bootstrap.start({**request, **more}, print)
    bootstrap.stop({"port": port}, print)


def at(answer: dict[str, Any]) -> int:
    return int(answer["endpoint"].rpartition(":")[2])


def test_an_agent_that_two_have_asked_for_is_ended_by_neither_alone(start: Start) -> None:
    """One of them has started it, the other has found it; then one is cancelled."""
    first = start(asker="first")
    port = at(first)
    assert start(asker="second") == {**first, "fresh": False}
    for asker in ("first", "second"):
        assert not bootstrap.stop({"port": port, "asker": asker}, print)["stopped"]
    anew = start(asker="second", rotate=True)
    assert anew["fresh"] and anew["boot"] != first["boot"]
    assert not bootstrap.stop({"port": port, "asker": "first"}, print)["stopped"]
    assert bootstrap.stop({"port": port, "asker": "second"}, print)["stopped"]
    assert Agent(port).running() is None and Agent(port).was_stopped


def test_an_agent_that_would_lose_its_connection_is_ended_with_it(start: Start) -> None:
    """Though another has found it: on a Mac it would be kept out of the local network."""
    port = at(start(asker="first", kept=True))
    assert not start(asker="second", kept=True)["fresh"]
    assert bootstrap.stop({"port": port, "asker": "first"}, print)["stopped"]


def test_what_another_has_found_stays_on_record_though_it_has_died(start: Start) -> None:
    first = start(asker="first")
    start(asker="second")
    assert end_process(first["pid"], started_at(first["pid"]) or "")
    bootstrap.stop({"port": at(first), "asker": "first"}, print)
    assert start(again=first["boot"])["fresh"]


def test_a_mesh_s_agent_that_did_not_start_again_may_be_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(asker="first")
    assert end_process(first["pid"], started_at(first["pid"]) or "")
    with monkeypatch.context() as patch:
        patch.setattr(agent_here, "hand_over", lambda *_: None)
        with pytest.raises(FluxmeshError, match="did not start"):
            start(again=first["boot"])
    assert start(again=first["boot"])["fresh"]
    bootstrap.stop({"port": at(first)}, print)
    with pytest.raises(FluxmeshError, match="ended by `fluxmesh down`"):
        start(again=first["boot"])


@pytest.mark.parametrize("again", [False, True])
def test_a_starter_whose_asker_is_gone_ends_what_no_mesh_has_on_record(
    start: Start, again: bool
) -> None:
    first = start(asker="first")
    port = at(first)
    if again:
        assert end_process(first["pid"], started_at(first["pid"]) or "")
    else:
        bootstrap.stop({"port": port}, print)
    request = {
        "action": "start", "version": __version__, "keep_ssh": False, "rotate": False,
        "spec": {"address": "127.0.0.1", "port": port}, "authorized": {"ann": "k" * 40},
        "again": first["boot"] if again else "", "asker": "" if again else "first",
    }  # fmt: skip
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", remote.MODULE],
        input=json.dumps(request) + "\n", stdout=writing, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0
    assert (Agent(port).running() is not None) == again
