"""A mesh through a real sshd, as another user with a home of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import FinishedProcess, environment
from tests.ports import free_ports
from tests.processes import wait_until_gone
from tests.slowness import slowdown
from tests.ssh.server import ADDRESS, ALIAS, Server


class User:
    """Somebody at this machine, with keys and a mesh of their own."""

    def __init__(self, folder: Path, server: Server, name: str) -> None:
        self.folder, self.server = folder / name, server
        self.folder.mkdir()
        self.key = "user"

    def __call__(self, *arguments: object) -> FinishedProcess:
        folders = {"FLUXMESH_HOME": self.folder / "home", "FLUXMESH_STATE": self.folder / "state"}
        env = {**environment(self.folder), **{key: str(path) for key, path in folders.items()}}
        done = subprocess.run(
            [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)],
            env={**env, "FLUXMESH_SSH": self.server.ssh(self.key)},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            text=True,
            timeout=200,
            check=False,
        )
        return FinishedProcess(done.returncode, done.stdout, done.stderr)

    def status(self) -> list[dict[str, Any]]:
        done = self("status", "--json")
        hosts: list[dict[str, Any]] = done.of("status")[0]["hosts"]
        return hosts


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[Server]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a user and an sshd of the tests' own need Linux and root")
    # Not below pytest's own folder: each pytest that starts closes that to other users.
    with tempfile.TemporaryDirectory(prefix="fluxmesh-sshd-") as folder:
        server = Server(Path(folder))
        yield server
        server.close()


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine, and `ALIAS`, whose address ssh alone knows."""
    hosts = [
        {"ssh": name, "ips": [address], "control": f"{address}:{port}"}
        for name, address in (("127.0.0.1", "127.0.0.1"), (ALIAS, ADDRESS))
        for port in free_ports(1, address)
    ]
    path = tmp_path_factory.mktemp("hosts") / "mesh.json"
    path.write_text(json.dumps(hosts))
    return path


@pytest.fixture(scope="module")
def user(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    user = User(tmp_path_factory.mktemp("users"), server, "first")
    yield user
    user("down", "--force")


def listens(hostfile: Path) -> list[bool]:
    """Whether something listens where the agents should, by rank."""
    open_ports = []
    for host in json.loads(hostfile.read_text()):
        address, _, port = host["control"].rpartition(":")
        with socket.socket() as sock:
            sock.settimeout(30)
            open_ports.append(sock.connect_ex((address, int(port))) == 0)
    return open_ports


def test_up_starts_an_agent_as_the_other_user_that_outlives_the_ssh_session(
    server: Server, user: User, hostfile: Path
) -> None:
    done = user("up", hostfile, "--model", "tiny", "--json")

    assert done.code == 0, done.err
    here, there = done.of("up")[0]["hosts"]
    assert here["answers"] and there["answers"]
    assert here["holds"]["weights"]["model"] == there["holds"]["weights"]["model"] == "tiny"
    assert len(here["measured"] + there["measured"]) == 1  # one device, timed once
    links = done.of("up")[0]["links"]
    assert {(link["source"], link["target"]) for link in links} == {(0, 1), (1, 0)}
    assert psutil.Process(there["pid"]).uids().real == server.uid
    wait_for(lambda: not [words for words in server.processes() if "starter" in " ".join(words)])
    commands = server.processes()
    assert len([words for words in commands if "fluxmesh_agent" in words]) == 1
    state = server.home / ".local" / "state" / "fluxmesh"
    (folder,) = state.glob("agent-*")
    assert folder.stat().st_uid == server.uid
    assert oct((folder / "agent.key").stat().st_mode & 0o777) == "0o600"
    assert [host["pid"] for host in user.status()] == [here["pid"], there["pid"]]


def test_up_again_finds_all_done_and_starts_nothing(user: User, hostfile: Path) -> None:
    before = user.status()

    begin, slow = time.monotonic(), slowdown()
    done = user("up", hostfile, "--model", "tiny", "--json")

    assert done.code == 0, done.err
    assert time.monotonic() - begin < 20 * max(slow, slowdown())
    stages = [line["text"] for line in done.of("stage")]
    assert not [text for text in stages if "Loading" in text or "Timing" in text]
    after = done.of("up")[0]["hosts"]
    for key in ("pid", "engine_pid", "counters"):
        assert [host[key] for host in after] == [host[key] for host in before]


def test_a_third_mac_joins_a_mesh_that_is_up_and_the_first_stays_in(
    server: Server, user: User, hostfile: Path, tmp_path: Path
) -> None:
    before = user.status()
    third = User(tmp_path, server, "third")
    only = tmp_path / "remote.json"
    only.write_text(json.dumps([json.loads(hostfile.read_text())[1]]))

    done = third("up", only, "--model", "tiny", "--json")

    assert done.code == 0, done.err
    assert third.status()[0]["pid"] == before[1]["pid"]
    assert [host["answers"] for host in user.status()] == [True, True]


def test_rotated_keys_shut_out_who_has_the_old_ones(
    user: User, hostfile: Path, tmp_path: Path
) -> None:
    home = user.folder / "home"
    old = {path.name: path.read_bytes() for path in home.iterdir()}

    done = user("up", hostfile, "--model", "tiny", "--rotate-keys", "--json")

    assert done.code == 0, done.err
    assert (home / "client.key").read_bytes() != old["client.key"]
    assert [host["answers"] for host in user.status()] == [True, True]
    new = {path.name: path.read_bytes() for path in home.iterdir()}
    agents = json.loads(new["mesh.json"])["members"]
    assert not {each["key"] for each in agents} & {
        each["key"] for each in json.loads(old["mesh.json"])["members"]
    }
    try:  # the old secret, even with the agents' new public keys
        for name in ("client.key", "client.pub"):
            (home / name).write_bytes(old[name])
        shut_out = user("status", "--json")
    finally:
        for name in ("client.key", "client.pub"):
            (home / name).write_bytes(new[name])
    assert shut_out.code == 3
    assert [host["answers"] for host in shut_out.of("status")[0]["hosts"]] == [False, False]
    assert [host["answers"] for host in user.status()] == [True, True]


def test_the_log_of_an_agent_that_is_gone_comes_over_ssh(user: User, hostfile: Path) -> None:
    pid = user.status()[1]["pid"]
    os.kill(pid, 9)
    wait_until_gone([pid])

    done = user("logs", "1", "-n", "400")

    assert done.code == 0, done.err
    assert f"listens at {ADDRESS}" in done.out
    again = user("up", hostfile, "--model", "tiny", "--json")
    assert again.code == 0, again.err
    assert again.of("up")[0]["hosts"][1]["answers"]


def test_down_leaves_no_process_and_no_port(server: Server, user: User, hostfile: Path) -> None:
    assert listens(hostfile) == [True, True]
    pids = [host[key] for host in user.status() for key in ("pid", "engine_pid")]

    done = user("down")

    assert done.code == 0, done.err
    assert listens(hostfile) == [False, False]
    wait_until_gone(pids)
    wait_for(lambda: server.processes() == [])
    assert not (user.folder / "home" / "mesh.json").exists()


def test_a_host_that_refuses_our_key_is_named_and_the_rest_can_go_on(
    server: Server, hostfile: Path, tmp_path: Path
) -> None:
    stranger = User(tmp_path, server, "stranger")
    stranger.key = "stranger"

    whole = stranger("up", hostfile, "--model", "tiny", "--json")
    partial = stranger("up", hostfile, "--model", "tiny", "--allow-partial", "--json")
    seen = stranger.status()
    stranger("down")

    assert whole.code == 1
    assert "host 1 (mac1): ssh says" in whole.err and "Permission denied" in whole.err
    assert "--allow-partial" in whole.err
    assert partial.code == 0, partial.err
    assert [line["host"] for line in partial.of("left_out")] == [1]
    assert [(host["rank"], host["answers"]) for host in seen] == [(0, True)]


def held(server: Server) -> int:
    """How many starters stay for a connection that is kept."""
    return sum("fluxmesh_coordinator.agents.bootstrap" in words for words in server.processes())


def test_a_connection_is_kept_while_its_agent_lives_and_may_break(
    server: Server, hostfile: Path, tmp_path: Path
) -> None:
    user = User(tmp_path, server, "keeper")
    command = ("up", hostfile, "--model", "tiny", "--keep-ssh", "--json")
    try:
        assert user(*command).code == 0
        here, there = user.status()
        assert held(server) == 1

        server.cut()
        wait_for(lambda: held(server) == 0)
        assert [host["pid"] for host in user.status()] == [here["pid"], there["pid"]]

        assert user(*command).code == 0
        again = user.status()
        assert again[0]["pid"] == here["pid"] and again[1]["pid"] != there["pid"]
        assert held(server) == 1
    finally:
        assert user("down", "--force").code == 0
    wait_for(lambda: server.processes() == [])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_agent_without_an_address_listens_where_ssh_came(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps([{"ssh": ALIAS, "ips": [ADDRESS]}]))
    user = User(tmp_path, server, "nameless")
    try:
        done = user("up", path, "--model", "tiny", "--json")
        assert done.code == 0, done.err
        assert user.status()[0]["address"] == f"{ADDRESS}:47100"
    finally:
        user("down", "--force")


def test_a_python_without_fluxmesh_is_told_with_the_remedy(server: Server, tmp_path: Path) -> None:
    hosts = [{"ssh": ALIAS, "ips": [ADDRESS], "python": "/usr/bin/no-such-python"}]
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps(hosts))

    done = User(tmp_path, server, "someone")("up", path, "--model", "tiny")

    assert done.code == 1
    assert "host 0 (mac1), python: there is no /usr/bin/no-such-python" in done.err
    assert "Traceback" not in done.err
