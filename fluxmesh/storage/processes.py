"""Processes of this machine by what names them for ever: their id and when they started.

Agents use it for their engines, and whoever starts agents for those.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

from fluxmesh.storage.homes import read_private

KILL_SECONDS = 5.0


def started_at(pid: int) -> str | None:
    """When a process started, in the system's own words; None where there is none.

    With its pid, this names a process for ever: a pid alone is given away again.
    """
    if platform.system() != "Darwin":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # field 22 of all: starttime
    told = subprocess.run(
        ["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    state, _, start = told.partition(" ")
    return None if state.startswith("Z") else start.strip() or None


def end_process(
    pid: int, start: str, number: int = signal.SIGKILL, seconds: float = KILL_SECONDS
) -> bool:
    """Sends a signal to the process that started then, and waits; whether it is gone."""
    if started_at(pid) != start:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    deadline = time.monotonic() + seconds
    while started_at(pid) == start:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def kill_process(pid: int, start: str) -> bool:
    """SIGKILLs the process that started then; whether there was one. Waits until it is gone."""
    return started_at(pid) == start and end_process(pid, start)


def kill_recorded(path: Path) -> int | None:
    """SIGKILLs the process that a private file names as {"pid", "start"}, and waits.

    Its id; None where there was none.
    """
    try:
        known = json.loads(read_private(path))
        pid, start = int(known["pid"]), str(known["start"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return pid if kill_process(pid, start) else None
