"""The values that a host of a hostfile may have: each from JSON to what it means, or to None.

Below `hostfile.py`, which says where a value stood and what was expected instead. A hostfile is a
file from somewhere: whatever ends up in a command line, a path or a socket is checked here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple

_SSH = re.compile(r"(ssh://)?([\w.][\w.+-]*@)?[A-Za-z0-9_.\[:][\w.:%\[\]-]*", re.ASCII)
_PLACE = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", re.ASCII)
_IP = re.compile(r"[0-9A-Fa-f.:]{2,45}(%[\w.-]{1,32})?", re.ASCII)
_MEMORY = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?(GB|GiB|MB|MiB)", re.ASCII)
_DEVICE = re.compile(r"[\w.-]{1,64}", re.ASCII)
_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


class Endpoint(NamedTuple):
    """Where an agent listens."""

    address: str  # an IP address, or a name that ssh or DNS knows
    port: int


def ssh(value: Any) -> str | None:
    """What ssh takes; "user@name:port", which it takes for a name, becomes "ssh://user@name:port".

    No option of ssh's passes for a name: those begin with a dash.
    """
    if not isinstance(value, str) or len(value) > 255 or not _SSH.fullmatch(value):
        return None
    user, at, place = value.removeprefix("ssh://").rpartition("@")
    parts = _PLACE.fullmatch(place)
    if parts is None:  # an IPv6 address as it is, or none at all
        is_ipv6 = ip(place) is not None and not value.startswith("ssh://")
        return value if is_ipv6 else None
    name, port = parts[1], parts[2]
    if port is None:
        is_plain = not name.startswith("[") or value.startswith("ssh://") or not at
        return value if is_plain else f"{user}@{name[1:-1]}"
    return f"ssh://{user}{at}{name}:{port}" if 0 < int(port) < 65536 else None


def ip(value: Any) -> str | None:
    """An address that names one interface: not 0.0.0.0, which would listen on all of them."""
    if not isinstance(value, str) or not _IP.fullmatch(value):
        return None
    try:
        return None if ipaddress.ip_address(value).is_unspecified else value
    except ValueError:
        return None


def ips(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list):
        return None
    addresses = tuple(address for item in value if (address := ip(item)) is not None)
    return addresses if len(addresses) == len(value) else None


def rdma(value: Any) -> tuple[tuple[str, ...] | None, ...] | None:
    if not isinstance(value, list):
        return None
    links: list[tuple[str, ...] | None] = []
    for item in value:
        devices = [item] if isinstance(item, str) else item
        if devices is None:
            links.append(None)
        elif (
            isinstance(devices, list)
            and devices
            and all(isinstance(device, str) and _DEVICE.fullmatch(device) for device in devices)
        ):
            links.append(tuple(devices))
        else:
            return None
    return tuple(links)


def endpoint(value: Any) -> Endpoint | None:
    address, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif ":" in address:
        return None  # IPv6 without its brackets: where the port begins is anyone's guess
    fits = re.fullmatch(r"[1-9]\d{0,4}", port, re.ASCII) and int(port) < 65536 and ip(address)
    return Endpoint(address, int(port)) if fits else None


def absolute(value: Any) -> str | None:
    fits = isinstance(value, str) and value.startswith("/") and value.isprintable()
    return value if fits and len(value) <= 1024 else None


def folder(value: Any) -> str | None:
    if isinstance(value, str) and value.startswith("~/"):
        return value if absolute(value[1:]) else None
    return absolute(value)


def memory(value: Any) -> int | None:
    if isinstance(value, str) and (match := _MEMORY.fullmatch(value)):
        value = int(float(match[1]) * _UNITS[match[2]])
    # A bare 32 means gigabytes to whoever writes it, and would hold nothing.
    fits = type(value) is int and 1_000_000 <= value < 2**63
    return value if fits else None
