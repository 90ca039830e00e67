"""How fast the links of a mesh are: each host sends to others while they listen.

The agents do it, no engine, so that it needs no lease.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import LinkInfo
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, HostUnreachableError, LocalNetworkError
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh_coordinator.agents.client import AgentClient

FAR = 8  # hosts; in a larger mesh only neighbours are measured
PROBE = 16 << 20  # bytes that a link is measured with


def pairs(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rounds of (source, target) in which each host sends to one other, as in a ring."""
    size = len(ranks)
    steps = range(1, size) if size <= FAR else (1, size - 1)
    return [[(ranks[i], ranks[(i + step) % size]) for i in range(size)] for step in steps]


async def measure_links(
    clients: Mapping[int, AgentClient], hosts: Sequence[Host], note: Callable[[str], None]
) -> tuple[LinkInfo, ...]:
    """The links there are between the agents `clients`, by rank; `hosts` are the hostfile's.

    `note` hears of hosts that macOS lets reach nobody. Raises `HostUnreachableError` where an agent
    is gone.
    """
    kept_out: dict[int, str] = {}  # by macOS, and in whose words

    async def link(source: int, target: int) -> LinkInfo | None:
        try:
            return await _link(clients, hosts[target], source, target)
        except HostUnreachableError:
            raise
        except LocalNetworkError as error:
            kept_out[source] = str(error)
        except FluxmeshError:
            pass  # no cable between these two
        return None

    measured: list[LinkInfo] = []
    for each in pairs(list(clients)):
        links = await together(link(*pair) for pair in each)
        measured += [info for info in links if info is not None]
    for source in {*kept_out} - {info.source for info in measured}:
        note(kept_out[source])
    return tuple(sorted(measured, key=lambda info: (info.source, info.target)))


async def _link(
    clients: Mapping[int, AgentClient], host: Host, source: int, target: int
) -> LinkInfo | None:
    """From `source` to `target`, which is `host`; None where the hostfile has no address of it.

    Raises `FluxmeshError` where an address that a ring would use can't be reached.
    """
    rates: list[messages.LinkRate] = []
    for ip in host.ips:  # a ring sends over all of them at once
        token = secrets.token_bytes(32)
        listen = messages.ListenForLink(ip, token)
        ports = await clients[target].ask(listen, messages.Ports, DEADLINES.link)
        probe = messages.ProbeLink(ip=ip, port=ports.ports[0], token=token, nbytes=PROBE)
        rates.append(await clients[source].ask(probe, messages.LinkRate, DEADLINES.link))
    if not rates:
        return None
    rate = sum(each.rate for each in rates)
    return LinkInfo(
        source=source, target=target, rate=rate, latency=max(each.latency for each in rates)
    )
