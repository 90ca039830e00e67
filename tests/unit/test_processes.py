"""A process keeps its name: in every language and zone, after the clock was set, and on a Mac."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.storage.homes import write_private
from fluxmesh.storage.processes import (
    end_process,
    kill_process,
    kill_recorded,
    read_record,
    started_at,
)

# How versions before this one named a process: ps on macOS, in two languages and two zones, of
# one process at one moment; and Linux's clock ticks without which start of the machine.
OLD = (
    "Mon Oct  6 10:11:12 2025",
    "Mon Oct  6 17:11:12 2025",
    "Mo  6 Okt 10:11:12 2025",
    "Mo  6 Okt 17:11:12 2025",
    "4711",
)
ZONES = (
    {"LC_ALL": "C", "LANG": "C", "TZ": "UTC0"},
    {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo"},
)


class Darwin:
    """libSystem's `proc_pidinfo`, answered from what is known of each process."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, int, int]] = {}  # status, seconds, microseconds

    def proc_pidinfo(self, pid: int, flavor: int, arg: Any, buffer: Any, size: int) -> int:
        assert (flavor, size) == (3, 136), "PROC_PIDTBSDINFO, PROC_PIDTBSDINFO_SIZE"
        if pid not in self.known:
            return 0
        status, seconds, microseconds = self.known[pid]
        # Laid out by hand, as <sys/proc_info.h> says: what is asked must read it so.
        raw = bytearray(size)
        raw[4:8] = status.to_bytes(4, "little")
        raw[12:16] = pid.to_bytes(4, "little")
        raw[48:54] = b"Python"
        raw[120:128] = seconds.to_bytes(8, "little")
        raw[128:136] = microseconds.to_bytes(8, "little")
        ctypes.memmove(buffer, bytes(raw), size)
        return size


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> Darwin:
    fake = Darwin()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return fake


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_process_is_the_same_in_every_language_and_zone(
    sleeper: subprocess.Popen[bytes],
) -> None:
    code = (
        "import sys; from fluxmesh.storage.processes import started_at; "
        "print(started_at(int(sys.argv[1])))"
    )
    starts = [
        subprocess.run(
            [sys.executable, "-c", code, str(sleeper.pid)],
            env={**os.environ, **zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for zone in ZONES
    ]
    assert starts == [started_at(sleeper.pid)] * 2


def test_a_process_is_the_same_after_the_clock_was_set(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = started_at(sleeper.pid)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert started_at(sleeper.pid) == before is not None


def test_two_processes_have_two_names(sleeper: subprocess.Popen[bytes]) -> None:
    time.sleep(0.02)  # the kernel counts in hundredths of a second
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as later:
        assert started_at(later.pid) != started_at(sleeper.pid)
        later.kill()


def test_a_corpse_is_no_process(sleeper: subprocess.Popen[bytes]) -> None:
    start = started_at(sleeper.pid)
    assert start is not None and kill_process(sleeper.pid, start)
    assert started_at(sleeper.pid) is None  # nobody has waited for it yet
    assert not kill_process(sleeper.pid, start)


def test_on_a_mac_the_kernel_says_when_to_the_microsecond(darwin: Darwin) -> None:
    darwin.known = {7: (2, 1759745472, 12), 8: (2, 1759745472, 13), 9: (5, 1759745472, 14)}
    assert started_at(7) == "1759745472.000012 s"
    assert started_at(8) == "1759745472.000013 s"
    assert started_at(9) is None, "a zombie"
    assert started_at(10) is None, "nothing"


@pytest.mark.parametrize("old", OLD)
def test_what_another_version_wrote_ends_nobody(
    sleeper: subprocess.Popen[bytes], old: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    write_private(path, json.dumps({"pid": sleeper.pid, "start": old}))
    assert kill_recorded(path) is None
    assert end_process(sleeper.pid, old, signal.SIGTERM)
    time.sleep(0.05)
    assert sleeper.poll() is None


@pytest.mark.parametrize("old", OLD)
def test_on_a_mac_too_what_another_version_wrote_ends_nobody(
    darwin: Darwin, old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_pid: int, _number: int) -> None:
        raise AssertionError("a stranger was struck")

    monkeypatch.setattr(os, "kill", kill)
    darwin.known = {4711: (2, 1759745472, 12)}
    path = tmp_path / "engine.json"
    write_private(path, json.dumps({"pid": 4711, "start": old}))
    assert kill_recorded(path) is None and end_process(4711, old)


def test_the_one_that_is_recorded_is_ended(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    write_private(path, json.dumps({"pid": sleeper.pid, "start": started_at(sleeper.pid)}))
    assert kill_recorded(path) == sleeper.pid
    assert sleeper.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"pid": 7}', '{"pid": "7", "start": "1"}', '{"pid": 7, "start": null}'],
)
def test_a_record_that_names_no_process_is_none(text: str, tmp_path: Path) -> None:
    write_private(tmp_path / "engine.json", text)
    assert read_record(tmp_path / "engine.json") is None
    assert kill_recorded(tmp_path / "engine.json") is None
    assert read_record(tmp_path / "absent.json") is None
