"""`up --keep-ssh`: a connection lasts as long as its agent, which outlives a broken one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.storage.keys import Keys
from fluxmesh.storage.processes import started_at
from fluxmesh_coordinator.agents import launch
from fluxmesh_coordinator.agents import remote as asking
from fluxmesh_coordinator.agents.launch import Started
from tests.ports import free_ports

# Carries bytes between who calls it and a command of its own, as ssh and sshd do; tells who it is.
SSH = """\
#!{python}
import os, subprocess, sys, threading
with open({calls!r}, "a") as file:
    print(os.getpid(), *sys.argv[1:-1], file=file)
there = subprocess.Popen(["sh", "-c", sys.argv[-1]], stdin=subprocess.PIPE)
def carry():
    while piece := os.read(0, 4096):
        there.stdin.write(piece)
        there.stdin.flush()
    there.stdin.close()
threading.Thread(target=carry, daemon=True).start()
sys.exit(there.wait())
"""


class Remote:
    """A host behind a fake ssh, and the agent of one port there."""

    def __init__(self, folder: Path) -> None:
        self.calls = folder / "ssh.calls"
        self.keys = Keys.new()
        self.host = Host(1, "me@mac1", python=sys.executable)
        (self.port,) = free_ports(1)
        ssh = folder / "ssh"
        ssh.write_text(SSH.format(python=sys.executable, calls=str(self.calls)))
        ssh.chmod(0o755)
        self.ssh = str(ssh)

    def start(self, *, keep_ssh: bool) -> Started:
        spec: dict[str, Any] = {"address": "127.0.0.1", "addresses": [], "port": self.port}
        spec |= {"models": None, "memory": None, "envs": [], "roots": []}
        return launch.start(self.host, spec, self.keys, keep_ssh=keep_ssh)

    def look(self) -> dict[str, Any]:
        place = {"address": "127.0.0.1", "addresses": [], "port": self.port}
        return asking.ask(self.host, "look", **place)

    def stop(self) -> None:
        asking.ask(self.host, "stop", port=self.port)

    @property
    def connections(self) -> list[int]:
        """Process ids of every ssh so far that still runs."""
        lines = self.calls.read_text().splitlines()
        return [pid for pid in (int(line.split()[0]) for line in lines) if started_at(pid)]

    def options(self, pid: int) -> str:
        lines = self.calls.read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{pid} "))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    remote = Remote(tmp_path)
    monkeypatch.setenv("FLUXMESH_SSH", remote.ssh)
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    yield remote
    remote.stop()


def soon(so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_connection_that_is_kept_lasts_as_long_as_the_agent(remote: Remote) -> None:
    assert remote.start(keep_ssh=True).is_fresh
    time.sleep(2)  # longer than a starter needs to see that it is not held
    assert soon(lambda: len(remote.connections) == 1)
    (ssh,) = remote.connections
    assert "ServerAliveCountMax=20" in remote.options(ssh)
    assert "ControlPath=none" in remote.options(ssh)

    remote.stop()

    assert soon(lambda: remote.connections == [])


def test_without_it_no_connection_outlives_the_command(remote: Remote) -> None:
    assert remote.start(keep_ssh=False).is_fresh
    assert soon(lambda: remote.connections == [])
    assert remote.look()["agent"] is not None


def test_an_agent_outlives_its_connection_and_is_started_again_for_another(remote: Remote) -> None:
    boot = remote.start(keep_ssh=True).member.boot
    assert soon(lambda: len(remote.connections) == 1)  # those that started it have ended
    (ssh,) = remote.connections
    again = remote.start(keep_ssh=True)
    assert not again.is_fresh and again.member.boot == boot
    assert soon(lambda: remote.connections == [ssh])

    os.kill(ssh, signal.SIGKILL)

    assert soon(lambda: remote.connections == [])
    time.sleep(2)
    assert remote.look()["agent"] is not None
    plain = remote.start(keep_ssh=False)
    assert not plain.is_fresh and plain.member.boot == boot
    kept = remote.start(keep_ssh=True)
    assert kept.is_fresh and kept.member.boot != boot
    assert soon(lambda: len(remote.connections) == 1)


def test_an_agent_that_does_not_start_is_told_and_keeps_nothing(remote: Remote) -> None:
    with pytest.raises(Exception, match=r"host 1 \(mac1\): Its agent did not start"):
        launch.start(
            remote.host,
            {"address": "192.0.2.1", "addresses": [], "port": remote.port, "envs": []},
            remote.keys,
            keep_ssh=True,
        )
    assert soon(lambda: remote.connections == [])


def test_ssh_that_fails_is_told_as_ever(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(remote.ssh).write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2; exit 255\n")
    with pytest.raises(Exception, match="ssh says 'Permission denied"):
        remote.start(keep_ssh=True)
    Path(remote.ssh).write_text(SSH.format(python=sys.executable, calls=str(remote.calls)))
