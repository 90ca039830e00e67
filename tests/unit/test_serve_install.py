"""`fluxmesh serve --install`: what launchd and systemd are given, and what they are told to do."""

from __future__ import annotations

import os
import plistlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh_coordinator.server import install, service_files
from fluxmesh_coordinator.server.run import ServeOptions, signals_that_count

Fake = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes a tool that notes how it was called, and keeps a list of what is loaded."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    def make(name: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        tool = tools / name
        # As launchctl: what is loaded can't be loaded again (5), what is not can't be let go (3)
        # or looked at (113), and what is let go of stays until it has ended: for two looks here.
        tool.write_text(
            f'#!/bin/sh\necho "$*" >> {shlex.quote(str(calls))}\nloaded={tmp_path}/loaded\n'
            'case "$1" in\n'
            'bootstrap) [ -e $loaded ] && { echo "Bootstrap failed: 5: Input/output error" >&2; '
            "exit 5; }; touch $loaded;;\n"
            "bootout) [ -e $loaded ] || exit 3; echo .. > $loaded;;\n"
            "print) [ -e $loaded ] || exit 113\n"
            "  case $(cat $loaded) in ..) echo . > $loaded;; .) rm $loaded;; esac;;\n"
            "esac\nexit 0\n"
        )
        tool.chmod(0o755)
        return calls

    return make


def test_launchd_is_given_an_agent_and_told_to_load_it_and_again(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("launchctl")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(install, "DEADLINES", replace(DEADLINES, tick=0.0))
    monkeypatch.setenv("HF_HOME", "/Volumes/models")
    options = ServeOptions(port=8421, names=("mesh.example.org",))
    for _ in range(2):
        path = install.install(options.arguments())
    assert path == tmp_path / "anna/Library/LaunchAgents/org.fluxmesh.serve.plist"
    values = plistlib.loads(path.read_bytes())
    assert values["Label"] == "org.fluxmesh.serve" and values["RunAtLoad"] is True
    assert values["ProgramArguments"] == [
        sys.executable, "-m", "fluxmesh_coordinator", "serve", "--host", "127.0.0.1",
        "--port", "8421", "--name", "mesh.example.org",
    ]  # fmt: skip
    assert values["KeepAlive"] == {"SuccessfulExit": False}
    assert values["ExitTimeOut"] >= 60  # what runs may finish
    assert values["EnvironmentVariables"]["HF_HOME"] == "/Volumes/models"
    assert values["StandardErrorPath"].startswith(str(tmp_path / "anna/Library/Logs/"))
    domain = f"gui/{os.getuid()}"
    assert calls.read_text().splitlines() == [
        f"bootstrap {domain} {path}",
        f"bootout {domain}/org.fluxmesh.serve",
        *[f"print {domain}/org.fluxmesh.serve"] * 3,
        f"bootstrap {domain} {path}",
    ]
    assert install.uninstall() == path and not path.exists()
    assert not (tmp_path / "loaded").exists()
    assert install.uninstall() is None


def test_what_has_ended_by_itself_can_be_removed(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("launchctl")
    monkeypatch.setattr(sys, "platform", "darwin")
    path = install.install([])
    (tmp_path / "loaded").unlink()
    assert install.uninstall() == path and not path.exists()


def test_what_launchd_says_is_told(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("launchctl")
    monkeypatch.setattr(sys, "platform", "darwin")
    (tmp_path / "loaded").touch()  # by somebody else
    with pytest.raises(FluxmeshError, match=r"failed \(5\): Bootstrap failed: 5"):
        install.install([])


def test_systemd_is_given_a_user_unit(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("systemctl")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("FLUXMESH_HOME", "/srv/50% of it/$HOME")
    path = install.install(["--model", 'my "own" model'])
    assert path == tmp_path / "anna/.config/systemd/user/fluxmesh-serve.service"
    text = path.read_text()
    assert r'"my \"own\" model"' in text and "Restart=on-failure" in text
    assert 'Environment="FLUXMESH_HOME=/srv/50%% of it/$HOME"' in text
    assert [line.split()[1] for line in calls.read_text().splitlines()] == [
        "daemon-reload", "enable", "restart",
    ]  # fmt: skip
    assert install.uninstall() == path and not path.exists()
    assert "disable --now fluxmesh-serve.service" in calls.read_text()


def test_a_machine_without_either_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with pytest.raises(FluxmeshError, match="is not on this machine"):
        install.install([])


def test_options_become_a_command_line_that_holds_wherever_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    options = ServeOptions(
        host="0.0.0.0", model="my-model", key_file=Path("key"), pictures=Path("gallery"),
        proxies=("127.0.0.1",),
    )  # fmt: skip
    words = options.arguments()
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    assert pairs == {
        "--host": "0.0.0.0", "--port": "8420", "--model": str(tmp_path / "my-model"),
        "--key-file": str(tmp_path / "key"), "--pictures": str(tmp_path / "gallery"),
        "--proxy": "127.0.0.1",
    }  # fmt: skip
    assert ServeOptions(model="schnell").arguments()[-2:] == ["--model", "schnell"]
    assert ServeOptions(host="::1").url == "http://[::1]:8420"


def test_a_unit_is_one_assignment_a_line() -> None:
    text = service_files.unit(
        python="/usr/bin/python3", arguments=["a\nb"], home=Path("/home/anna"), environment={}
    )
    lines = [line for line in text.splitlines() if line and not line.startswith("[")]
    assert all("=" in line for line in lines) and r"a\nb" in text


def test_a_signal_that_is_ignored_at_the_start_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals_that_count()
        assert {signal.SIGINT, signal.SIGTERM} <= set(signals_that_count())
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("call", ["install", "uninstall"])
def test_a_server_that_finishes_what_runs_is_waited_for_by_systemd(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Which answers when it has ended: later than any other tool may."""
    fake("systemctl")
    monkeypatch.setattr(sys, "platform", "linux")
    install.install([])
    limits: dict[str, float] = {}
    run = subprocess.run

    def noted(command: tuple[str, ...], **more: Any) -> Any:
        limits[command[2]] = more["timeout"]
        return run(command, **more)

    monkeypatch.setattr(install.subprocess, "run", noted)
    install.install([]) if call == "install" else install.uninstall()
    assert limits["restart" if call == "install" else "disable"] > DEADLINES.server_ends
    assert limits["daemon-reload"] == DEADLINES.tools
