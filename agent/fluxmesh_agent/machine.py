"""What an agent knows of its machine, without mlx."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import uuid
from pathlib import Path


def is_mac() -> bool:
    return platform.system() == "Darwin"


def machine_name() -> str:
    """What people call the machine."""
    return platform.node().partition(".")[0] or "this machine"


def machine_id() -> str:
    """The same for all agents of one machine, and for no other machine."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            text = Path(path).read_text().strip()
            if text:
                return text
    return f"{uuid.getnode():012x}"


def memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes() -> int:
    """Memory that could be had now: what nothing needs to keep."""
    if is_mac():
        told = _output("vm_stat")
        page = int(_first(r"page size of (\d+)", told, "4096"))
        kinds = ("free", "inactive", "speculative", "purgeable")
        return page * sum(int(_first(rf"Pages {kind}:\s+(\d+)", told, "0")) for kind in kinds)
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return 1024 * int(_first(r"MemAvailable:\s+(\d+)", told, "0"))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout


def _first(pattern: str, text: str, otherwise: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else otherwise
