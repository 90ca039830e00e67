"""An agent that launchd starts: the property list, what it runs, and how `up` finds it there."""

from __future__ import annotations

import os
import plistlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.storage.homes import AgentHome
from fluxmesh.storage.keys import Keys
from fluxmesh_coordinator.agents import launch, remote
from tests.ports import free_ports

# launchd.plist(5): the keys that we use, and what each has to be.
KEYS = {
    "Label": str,
    "ProgramArguments": list,
    "UserName": str,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ProcessType": str,
    "SoftResourceLimits": dict,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}


def printed(home: Path, *options: object, **more: str) -> dict[str, Any]:
    """What `fluxmesh-agent launchd` prints for a user with that home."""
    done = subprocess.run(
        [sys.executable, "-m", "fluxmesh_agent", "launchd", *map(str, options)],
        env={**os.environ, "HOME": str(home), "LOGNAME": "anna", **more},
        capture_output=True,
        check=True,
    )
    properties: dict[str, Any] = plistlib.loads(done.stdout, fmt=plistlib.FMT_XML)
    return properties


def test_it_is_what_launchd_reads_for_a_daemon_of_one_user(tmp_path: Path) -> None:
    options = ("--address", "10.0.0.5", "--port", 47101, "--models", "~/models", "--memory", 10**9)
    properties = printed(tmp_path, *options, FLUXMESH_STATE="/s", HF_HOME="/h", SECRET="x")

    assert {key: type(value) for key, value in properties.items()} == KEYS
    assert (properties["Label"], properties["UserName"]) == ("org.fluxmesh.agent-47101", "anna")
    assert properties["ProcessType"] == "Interactive" and properties["RunAtLoad"] is True
    assert properties["KeepAlive"] == {"SuccessfulExit": False}  # `fluxmesh down` ends it
    assert properties["SoftResourceLimits"]["NumberOfFiles"] >= 10240
    command = properties["ProgramArguments"]
    assert command[:4] == [sys.executable, "-m", "fluxmesh_agent", "run"]
    models = str(tmp_path / "models")
    assert command[4:8] == ["--address", "10.0.0.5", "--port", "47101"]
    assert command[8:] == ["--models", models, "--memory", str(10**9)]
    environment = properties["EnvironmentVariables"]
    assert environment.keys() == {"HOME", "PATH", "FLUXMESH_STATE", "HF_HOME"}
    assert all(type(value) is str for value in environment.values())
    for path in (
        properties["StandardOutPath"],
        properties["StandardErrorPath"],
        environment["HOME"],
    ):
        assert path.startswith(str(tmp_path))


class Daemon:
    """launchd, as far as one property list goes: its command in its environment alone."""

    def __init__(self, home: Path) -> None:
        (self.port,) = free_ports(1)
        self.home = home
        (home / "Library" / "Logs").mkdir(parents=True)
        self.plist = printed(home, "--address", "127.0.0.1", "--port", self.port)
        self.state = AgentHome(home / ".local" / "state" / "fluxmesh" / f"agent-{self.port}")
        self.start()

    def start(self) -> None:
        with open(self.plist["StandardErrorPath"], "ab") as log:
            self.process = subprocess.Popen(
                self.plist["ProgramArguments"],
                env=self.plist["EnvironmentVariables"],
                cwd=self.plist["WorkingDirectory"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while not self.state.agent.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLUXMESH_STATE", raising=False)
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.process.kill()
    daemon.process.wait()


def start(daemon: Daemon, keys: Keys) -> launch.Started:
    spec = {"address": "127.0.0.1", "addresses": [], "port": daemon.port, "memory": 10**9}
    return launch.start(Host(0, "127.0.0.1"), spec, keys)


def test_up_lets_its_user_in_at_an_agent_that_launchd_runs_and_down_ends_it(daemon: Daemon) -> None:
    keys, host = Keys.new(), Host(0, "127.0.0.1")
    place = {"address": "127.0.0.1", "addresses": [], "port": daemon.port}
    assert remote.ask(host, "look", **place)["agent"]["endpoint"].endswith(f":{daemon.port}")

    started = start(daemon, keys)

    assert not started.is_fresh
    assert started.kept == ("whoever started it there",)
    assert launch.user_name(keys.public) in {
        path.stem for path in daemon.state.authorized.glob("*.pub")
    }
    assert daemon.process.poll() is None
    assert remote.ask(host, "stop", port=daemon.port)["stopped"]
    assert daemon.process.wait(60) == 0  # so launchd leaves it


def test_after_a_restart_it_is_found_again_with_the_key_that_it_had(daemon: Daemon) -> None:
    keys = Keys.new()
    before = start(daemon, keys).member
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    daemon.state.agent.unlink()
    daemon.start()

    after = start(daemon, keys)

    assert not after.is_fresh
    assert after.member.key == before.key and after.member.boot != before.boot
