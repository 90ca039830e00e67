"""Which machine this is: agents of one machine share its memory and its device."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import uuid
from pathlib import Path

from fluxmesh.machine.tools import is_mac, output_of

# Written once when the system is installed, the latter where there is no systemd. Containers often
# lack them; the last is new at each start, and the same in all that run on the machine.
FILES = (
    Path("/etc/machine-id"),
    Path("/var/lib/dbus/machine-id"),
    Path("/proc/sys/kernel/random/boot_id"),
)


def machine_name() -> str:
    """What people call the machine."""
    return platform.node().partition(".")[0] or "this machine"


@functools.cache
def machine_id() -> str:
    """The same for all processes of one machine, and for no other machine.

    On a Mac it is the logic board's; its network addresses are not: a private Wi-Fi address
    rotates, and bridges have the same one on every Mac.
    """
    if is_mac():
        registry = output_of("/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice")
        board = re.search(r'"IOPlatformUUID" = "([0-9A-Fa-f-]+)"', registry)
        if board:
            return board[1].lower()
    for path in FILES:
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="ascii").strip()
            if text:
                return text
    return f"{uuid.getnode():012x}"
