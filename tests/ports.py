"""Ports for processes that are started later, each given out once.

A port that the system has just called free may be somebody else's by the time an agent listens
there: tests run beside each other, and whoever binds port 0 is given one of the same range. These
lie below that range, and the tests of all processes count through them together.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

PORTS = range(20_000, 32_000)  # systems give out others, from 32768 on or above


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """So many ports of `address` that nobody uses, and that no other test is given soon."""
    last = Path(tempfile.gettempdir()) / f"fluxmesh-last-port-{os.getuid()}"
    with open(last, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        place = int(file.read() or random.randrange(len(PORTS)))
        found: list[int] = []
        for _ in PORTS:
            if len(found) == count:
                break
            place = (place + 1) % len(PORTS)
            if _is_free(PORTS[place], address):
                found.append(PORTS[place])
        file.truncate(0)
        file.write(str(place))
    assert len(found) == count, f"{address} has no {count} free ports"
    return found


def _is_free(port: int, address: str) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind((address, port))
        except OSError:
            return False
    return True
