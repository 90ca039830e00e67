"""At which of its addresses an agent listens, where the hostfile names its host and no address.

A Mac's name leads to many: Wi-Fi, Ethernet, the bridge of the thunderbolt ports, in an order that
changes. The one by which ssh came is known to work, so that one is taken; an agent that runs
already keeps its own. Pure, but for the environment that ssh sets.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fluxmesh.errors import FluxmeshError


def reached_at(environment: Mapping[str, str]) -> str:
    """The address of this machine by which ssh came; "" where no ssh did.

    sshd sets SSH_CONNECTION to "CLIENT PORT SERVER PORT".
    """
    words = environment.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else ""


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_link_local(address: str) -> bool:
    """Whether it means something on one cable alone: 169.254.x.x, fe80::."""
    return ipaddress.ip_address(address).is_link_local


def choose(reached: str, known: Iterable[str], is_own: Callable[[str], bool]) -> str:
    """The address to listen at; "" where none can be told.

    `reached` is that of `reached_at`, `known` what the coordinator's machine takes the host's name
    for, `is_own` whether this machine has an address. Those that hold on one cable alone come last.
    """
    own = [address for address in (reached, *known) if is_address(address) and is_own(address)]
    return next((address for address in own if not is_link_local(address)), own[0] if own else "")


def settled(
    spec: Mapping[str, Any], running: Mapping[str, Any] | None, is_own: Callable[[str], bool]
) -> dict[str, Any]:
    """What an agent is started with, once it is known at which address it listens.

    `running` is what is known of one that runs: it keeps its address, where that is still its
    host's. Raises `FluxmeshError` where nothing tells an address.
    """
    spec = dict(spec)
    known = spec.pop("addresses", [])
    if spec["address"]:
        return spec
    now = running["endpoint"].rpartition(":")[0].strip("[]") if running else ""
    if not (now and is_own(now)):
        now = choose(reached_at(os.environ), known, is_own)
    if not now:
        raise FluxmeshError('Nothing tells its address; give it as "control" in the hostfile.')
    return {**spec, "address": now}
