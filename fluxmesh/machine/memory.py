"""The machine's RAM: how much there is, how much could be had now, and whether it is short.

psutil is not asked: on macOS it calls free what is inactive, other programs' data among it, and
not what is cached of files.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from fluxmesh.machine.tools import is_mac, output_of

MEMINFO = Path("/proc/meminfo")
# What macOS gives to whoever asks for memory, without writing anything to the disk: what holds
# nothing, what was read ahead of need, what files are cached in, and what programs gave up.
_GIVEN = ("Pages free", "Pages speculative", "File-backed pages", "Pages purgeable")
# Of a Mac's RAM, what Metal recommends that its GPU takes: of a small one less.
SMALL_MAC, SMALL_SHARE, SHARE = 36 << 30, 2 / 3, 3 / 4
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


def accelerator_bytes() -> int:
    """What models may take here, as far as that is known without MLX.

    On a Mac, what its GPU may use (`iogpu.wired_limit_mb`, where somebody has set it); elsewhere
    the memory of the first NVIDIA GPU, or all of the machine's.
    """
    total = total_bytes()
    if is_mac():
        limit = _number(r"^(\d+)", output_of("/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"))
        return limit << 20 or int(total * (SMALL_SHARE if total <= SMALL_MAC else SHARE))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return total
    return _number(r"Total\s*:\s*(\d+) MiB", output_of(tool, "-q", "-d", "MEMORY")) << 20 or total


def pressure() -> str:
    """ "warning" or "critical" where macOS asks programs to give memory back; else ""."""
    if not is_mac():
        return ""
    level = output_of("/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level")
    return _PRESSURE.get(level.strip(), "")


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
