"""The machine's RAM: how much there is, how much could be had now, and whether it is short.

psutil is not asked: on macOS it calls free what is inactive, other programs' data among it, and
not what is cached of files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fluxmesh.machine.tools import is_mac, output_of

MEMINFO = Path("/proc/meminfo")
# What macOS gives to whoever asks for memory, without writing anything to the disk: what holds
# nothing, what was read ahead of need, what files are cached in, and what programs gave up.
_GIVEN = ("Pages free", "Pages speculative", "File-backed pages", "Pages purgeable")
_PRESSURE = {"2": "warning", "4": "critical"}


def total_bytes() -> int:
    """All of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes() -> int:
    """What could be had now: what nothing needs to keep. All of it where that can't be known."""
    if is_mac():
        report = output_of("/usr/bin/vm_stat")
        if not report:
            return total_bytes()
        page = _number(r"page size of (\d+)", report)
        return page * sum(_number(rf"{kind}:\s+(\d+)", report) for kind in _GIVEN)
    try:
        report = MEMINFO.read_text(encoding="ascii")
    except OSError:
        return total_bytes()
    return 1024 * _number(r"MemAvailable:\s+(\d+)", report)


def pressure() -> str:
    """ "warning" or "critical" where macOS asks programs to give memory back; else ""."""
    if not is_mac():
        return ""
    level = output_of("/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level")
    return _PRESSURE.get(level.strip(), "")


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
