"""Processes of this machine by what names them for ever: their id and when they started.

Agents use it for their engines, and whoever starts agents for those. The start is taken from the
kernel as the number that it wrote down when the process began, and never from what a tool prints:
`ps` spells it in the language and time zone of whoever asks. psutil would not do either: on both
systems it corrects the start by how the clock was set since psutil was loaded, so that two
processes that ask about a third may be told two times.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.storage.homes import read_private


def started_at(pid: int) -> str | None:
    """When a process started, as the kernel counts; None where there is none, or only its corpse.

    With its pid, this names a process for ever: a pid alone is given away again. The same in
    every language, time zone and process, and after the clock was set. A text that another
    version wrote is equal to none: what has it is nobody's to end.
    """
    return _of_darwin(pid) if platform.system() == "Darwin" else _of_linux(pid)


def _of_linux(pid: int) -> str | None:
    """Clock ticks after the start of the machine, and which start of it that was."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"boot {boot} tick {fields[18]}"  # field 22: starttime


class _Task(ctypes.Structure):
    """`struct proc_bsdinfo` of macOS's <sys/proc_info.h>."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("flags", "status", "xstatus", "pid", "ppid")),
        *((name, ctypes.c_uint32) for name in ("uid", "gid", "ruid", "rgid", "svuid", "svgid")),
        ("reserved", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
        ("name", ctypes.c_char * 32),
        *((name, ctypes.c_uint32) for name in ("nfiles", "pgid", "pjobc", "tdev", "tpgid")),
        ("nice", ctypes.c_int32),
        ("start_seconds", ctypes.c_uint64),  # since 1970, by the clock as it was then
        ("start_microseconds", ctypes.c_uint64),
    )


_TASK_FLAVOR = 3  # PROC_PIDTBSDINFO
_ZOMBIE = 5  # SZOMB


def _of_darwin(pid: int) -> str | None:
    """Microseconds since 1970, as `p_starttime` holds them: written once, and never moved."""
    task = _Task()
    size = ctypes.sizeof(task)
    # It is part of libSystem, which every process has.
    nbytes = ctypes.CDLL(None).proc_pidinfo(
        pid, _TASK_FLAVOR, ctypes.c_uint64(0), ctypes.byref(task), size
    )
    if nbytes != size or task.status == _ZOMBIE:
        return None
    return f"{task.start_seconds}.{task.start_microseconds:06d} s"


def end_process(
    pid: int, start: str, number: int = signal.SIGKILL, seconds: float = DEADLINES.process_ends
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
    known = read_record(path)
    if known is None or not kill_process(known["pid"], known["start"]):
        return None
    pid: int = known["pid"]
    return pid


def read_record(path: Path) -> dict[str, Any] | None:
    """What a private file says of a process: "pid", "start" and more; None where it names none.

    The process need not run any more. Raises `HomeError` where others could have written it.
    """
    try:
        known = json.loads(read_private(path))
        is_one = type(known["pid"]) is int and type(known["start"]) is str
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return known if is_one else None
