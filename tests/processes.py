"""Processes of this machine as psutil sees them, which asks each kernel in its own way."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import psutil


def commands_of(home: Path) -> dict[int, list[str]]:
    """The command lines of what runs with `home` as its user's home, by process."""
    commands = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home):
                commands[process.pid] = process.cmdline()
        except psutil.Error:  # another user's, or gone by now
            continue
    return commands


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not asked for yet has, too."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: Iterable[int], seconds: float = 30.0) -> None:
    """Raises `AssertionError` where some are still there after so long."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)
