"""Ports of this host: for rings, and for whatever else other hosts send to its addresses."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket

# Below the range from which systems give ports to outgoing connections: such a connection could
# take a ring's port between the moment that it is found free and that in which the ring listens.
PORTS = range(12_000, 20_000)
TRIES = 50  # ports that are tried, for others may have some


def bound(ip: str) -> socket.socket:
    """A socket at one of `PORTS`, or at any where many are taken, which does not listen yet.

    Raises `OSError` where `ip` is not an address of this host, `ValueError` where it is no address.
    """
    if ipaddress.ip_address(ip).is_unspecified:
        raise OSError(errno.EADDRNOTAVAIL, "it means all addresses")
    for port in random.sample(PORTS, TRIES):
        try:
            return _bound(ip, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _bound(ip, 0)


def _bound(ip: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        server.bind((ip, port))
    except OSError:
        server.close()
        raise
    return server
