"""What fluxmesh knows of its machine: on Linux as it is, on a Mac from what its tools print."""

from __future__ import annotations

import logging
import os
import platform
import resource
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxmesh.machine import awake, identity, memory, open_files, tools
from fluxmesh.machine.awake import Wakefulness, kept_awake
from fluxmesh_agent.lifecycle import Lifecycle
from fluxmesh_agent.status import status_of
from fluxmesh_coordinator.agents.mesh_file import THIS_MACHINE, THIS_NAME, Member, MeshRecord
from fluxmesh_coordinator.console import tables
from fluxmesh_coordinator.deploy import diagnosis
from tests.mac import VM_STAT, Mac, mac, until


@pytest.fixture
def a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    yield mac(tmp_path / "mac", monkeypatch)
    identity.machine_id.cache_clear()


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    identity.machine_id.cache_clear()
    yield
    identity.machine_id.cache_clear()


# Memory


def test_a_mac_counts_as_free_what_it_gives_away_at_once(a_mac: Mac) -> None:
    pages = 41208 + 4105 + 187344 + 11630  # free, speculative, of files, purgeable
    assert memory.free_bytes() == pages * 16384


def test_what_other_programs_hold_is_not_free_on_a_mac(a_mac: Mac) -> None:
    before = memory.free_bytes()
    a_mac.tool("vm_stat", VM_STAT.replace("305227", "905227"))  # inactive: anonymous, most of it
    assert memory.free_bytes() == before


def test_the_size_of_a_page_is_what_the_mac_says(a_mac: Mac) -> None:
    of_16k = memory.free_bytes()
    a_mac.tool("vm_stat", VM_STAT.replace("16384", "4096"))
    assert memory.free_bytes() == of_16k // 4


@pytest.mark.parametrize(
    "language", [{"LC_ALL": "C"}, {"LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Tokyo"}]
)
def test_a_macs_tools_are_asked_in_one_language(
    a_mac: Mac, monkeypatch: pytest.MonkeyPatch, language: dict[str, str]
) -> None:
    for name, value in language.items():
        monkeypatch.setenv(name, value)
    assert memory.free_bytes() == (41208 + 4105 + 187344 + 11630) * 16384
    assert identity.machine_id() == "5b0f3a1e-7c2d-5e4f-9a6b-0c1d2e3f4a5b"


def test_a_tool_that_fails_or_hangs_says_nothing(a_mac: Mac) -> None:
    a_mac.script("sysctl", "exit 1")
    assert memory.pressure() == ""
    a_mac.script("vm_stat", "exit 1")
    assert memory.free_bytes() == memory.total_bytes()
    a_mac.script("vm_stat", "exec sleep 5")
    assert tools.output_of("/usr/bin/vm_stat", seconds=0.1) == ""


@pytest.mark.parametrize(
    ("level", "pressure"), [("1", ""), ("2", "warning"), ("4", "critical"), ("?", "")]
)
def test_an_agent_says_that_its_mac_is_short_of_memory(
    a_mac: Mac, level: str, pressure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_mac.tool("sysctl", f"{level}\n")
    status = status_of(
        Lifecycle(), engine_pid=None, measured=(), memory=None, holder="", job="", waiting=0
    )
    assert status.pressure == pressure
    assert tables.state(status) == ("idle, short of memory" if pressure else "idle")
    survey = SimpleNamespace(errors={}, statuses={0: status}, clock_skews={0: 0.0})
    monkeypatch.setattr(diagnosis, "survey", lambda _mesh: survey)
    mesh = MeshRecord(THIS_NAME, THIS_MACHINE, (Member(0, "127.0.0.1:1", "", "", "", ""),))
    findings = [
        (finding.level, finding.text)
        for finding in diagnosis.of_agents(mesh)
        if finding.check == "memory"
    ]
    assert findings == (
        [("warn", f"{pressure}: macOS is short of it; quit other programs there.")]
        if pressure
        else []
    )


def test_linux_says_itself_what_is_available(
    linux: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.free_bytes() == 8_000_000 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert memory.free_bytes() == memory.total_bytes()  # nothing is known
    assert memory.pressure() == ""


# Identity


def test_a_mac_is_known_by_its_board_and_not_by_its_network(
    a_mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotating() -> int:
        raise AssertionError("a private Wi-Fi address changes")

    monkeypatch.setattr(uuid, "getnode", rotating)
    assert identity.machine_id() == "5b0f3a1e-7c2d-5e4f-9a6b-0c1d2e3f4a5b"


def test_a_machine_without_an_id_of_its_own_is_known_by_its_start(
    linux: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("7d9f\n")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setattr(identity, "FILES", (tmp_path / "absent", tmp_path / "empty", boot))
    assert identity.machine_id() == "7d9f"


def test_two_processes_of_a_machine_agree_on_which_it_is() -> None:
    code = "from fluxmesh.machine.identity import machine_id; print(machine_id())"
    identities = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(identities) == 1 and identities != {b"\n"}


# Open files


def test_a_mac_that_allows_256_files_is_asked_for_more() -> None:
    code = (
        "import resource, sys\n"
        "kind = resource.RLIMIT_NOFILE\n"
        "resource.setrlimit(kind, (256, int(sys.argv[1])))\n"
        "from fluxmesh.machine.open_files import allow_many_files\n"
        "allow_many_files(); allow_many_files()\n"
        "print(*resource.getrlimit(kind))"
    )
    for hard in (300, 20_000):
        if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limits = subprocess.run(
            [sys.executable, "-c", code, str(hard)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert limits == [str(min(hard, open_files.WANTED)), str(hard)]


def test_a_limit_that_can_not_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(_kind: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        raise ValueError("not allowed to raise maximum limit")

    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (256, unlimited))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    open_files.allow_many_files()
    assert asked == [(10_240, unlimited)]  # macOS refuses more than OPEN_MAX


# Awake


def test_a_mac_is_kept_awake_while_it_works_and_not_after(a_mac: Mac) -> None:
    a_mac.caffeinate()
    held = Wakefulness()
    held.hold()
    held.hold()
    until(a_mac.is_awake)
    assert a_mac.caffeinated() == [f"-i -w {os.getpid()}"]
    held.let_go()
    held.let_go()
    assert not a_mac.is_awake()
    held.hold()
    until(a_mac.is_awake)
    assert len(a_mac.caffeinated()) == 2
    held.let_go()
    assert not a_mac.is_awake()


def test_a_mac_may_sleep_after_work_that_failed(a_mac: Mac) -> None:
    a_mac.caffeinate()
    with pytest.raises(RuntimeError), kept_awake():
        until(a_mac.is_awake)
        raise RuntimeError
    assert not a_mac.is_awake()


def test_what_keeps_a_mac_awake_ends_with_the_process_that_is_killed(a_mac: Mac) -> None:
    a_mac.caffeinate()
    code = (
        "import platform, sys, time\n"
        "platform.system = lambda: 'Darwin'\n"
        "from fluxmesh.machine import awake\n"
        "awake.CAFFEINATE = sys.argv[1]\n"
        "awake.Wakefulness().hold()\n"
        "time.sleep(60)"
    )
    path = str(a_mac.folder / "caffeinate")
    with subprocess.Popen([sys.executable, "-c", code, path]) as worker:
        until(a_mac.is_awake)
        worker.send_signal(signal.SIGKILL)
    until(lambda: not a_mac.is_awake())


def test_a_mac_without_caffeinate_works_and_says_so_once(
    a_mac: Mac, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), kept_awake(), kept_awake():
        pass
    (record,) = caplog.records
    assert "may fall asleep" in record.getMessage()


def test_other_machines_start_nothing(linux: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("there is no caffeinate")

    monkeypatch.setattr(awake.subprocess, "Popen", start)
    with kept_awake():
        pass
