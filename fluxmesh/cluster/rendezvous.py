"""What each of MLX's backends reads before a group forms: addresses, ports, devices. Pure.

Stands on `hostfile.py`. The files and variables are those that `mlx.launch` hands out; fluxmesh
writes them itself because every ring generation needs fresh ports, and because a ring may be formed
by some of the hosts alone. `hosts` is always the members of the group in the order of their ranks
*in the group*, which may be fewer than the hostfile names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fluxmesh.cluster.hostfile import Host
from fluxmesh.errors import UsageError


@dataclass(frozen=True)
class Joining:
    """What the engines need to find one another; the same for all, but for their rank."""

    envs: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()  # (variable that names the file, the file's text)


def ring_file(hosts: Sequence[Host], ports: Sequence[Sequence[int]]) -> str:
    """The text of MLX_HOSTFILE: for each rank the addresses at which it listens.

    `ports[i]` holds a port for each of the `ips` of `hosts[i]`. Raises `UsageError` where they
    don't match, or where two ranks would listen at one address and port.
    """
    if len(ports) != len(hosts):
        raise UsageError(f"{len(hosts)} hosts have ports for {len(ports)}; give each its own.")
    addresses: list[list[str]] = []
    for host, own in zip(hosts, ports, strict=True):
        if len(own) != len(host.ips):
            raise UsageError(
                f"host {host.rank}, ips: {len(host.ips)} addresses have {len(own)} ports; "
                "the ring needs one each."
            )
        addresses.append([f"{ip}:{port}" for ip, port in zip(host.ips, own, strict=True)])
    everywhere = [address for own in addresses for address in own]
    if len(set(everywhere)) < len(everywhere):
        twice = next(address for address in everywhere if everywhere.count(address) > 1)
        raise UsageError(f"Two ranks would listen at {twice}; give each a port of its own.")
    return json.dumps(addresses)


def for_sockets(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts with the addresses that a ring of sockets can use: IPv4, as many on each."""
    usable = [[ip for ip in host.ips if ":" not in ip] for host in hosts]
    count = min(map(len, usable), default=0)
    return tuple(
        replace(host, ips=tuple(ips[:count])) for host, ips in zip(hosts, usable, strict=True)
    )


def joining(
    backend: str, hosts: Sequence[Host], ports: Sequence[Sequence[int]], devices: Sequence[int] = ()
) -> tuple[Joining, ...]:
    """For each member of the group, what its engine is started with.

    `ports[i]` is free on `hosts[i]`: one an address for ring, one on `hosts[0]` for jaccl and
    nccl. `devices[i]` is the GPU of rank i for nccl; by default 0, 1, ... on each machine. A
    group of one needs nothing. Raises `UsageError` for ports that don't match.
    """
    if len(hosts) < 2:
        return tuple(Joining() for _ in hosts)
    if backend == "ring":
        files = (("MLX_HOSTFILE", ring_file(hosts, ports)),)
        return tuple(Joining((("MLX_RANK", str(i)),), files) for i in range(len(hosts)))
    if backend == "mpi":
        return tuple(Joining() for _ in hosts)  # mpirun tells each process its rank
    if not hosts[0].ips or not ports or not ports[0]:
        raise UsageError(f"host {hosts[0].rank}, ips: {backend} needs an address and a port there.")
    ip, port = hosts[0].ips[0], ports[0][0]
    meeting = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    if backend == "nccl":
        chosen = tuple(devices) or tuple(_index_on_machine(hosts, i) for i in range(len(hosts)))
        return tuple(
            Joining(
                (
                    ("MLX_RANK", str(i)),
                    ("MLX_WORLD_SIZE", str(len(hosts))),
                    ("NCCL_HOST_IP", ip),
                    ("NCCL_PORT", str(port)),
                    ("CUDA_VISIBLE_DEVICES", str(chosen[i])),
                )
            )
            for i in range(len(hosts))
        )
    envs = [("MLX_JACCL_COORDINATOR", meeting)]
    if backend == "jaccl-ring":
        envs.append(("MLX_JACCL_RING", "1"))
    files = (("MLX_IBV_DEVICES", rdma_file(hosts)),)
    return tuple(Joining((("MLX_RANK", str(i)), *envs), files) for i in range(len(hosts)))


def engine_envs(backend: str, hosts: int) -> tuple[tuple[str, str], ...]:
    """What each engine of a mesh is started with, if the user doesn't say otherwise.

    Where more than two GPUs share a step by nccl, each kernel is launched by itself: MLX builds a
    CUDA graph with a collective in it anew each time, and takes the host 24 ms a step so, not 11
    (docs/performance.md). MLX then counts what waits for the device in operations alone, and no
    longer in bytes: so these are few.
    """
    if backend != "nccl" or hosts <= 2:
        return ()
    return (("MLX_USE_CUDA_GRAPHS", "0"), ("MLX_MAX_OPS_PER_BUFFER", "30"))


def rdma_file(hosts: Sequence[Host]) -> str:
    """The text of MLX_IBV_DEVICES: the devices from each member to each member of the group."""
    members = [host.rank for host in hosts]
    rows: list[list[str | list[str] | None]] = []
    for host in hosts:
        row: list[str | list[str] | None] = []
        for other in members:
            devices = host.rdma[other] or ()
            row.append(devices[0] if len(devices) == 1 else list(devices) or None)
        rows.append(row)
    return json.dumps(rows)


def _index_on_machine(hosts: Sequence[Host], i: int) -> int:
    return sum(host.machine == hosts[i].machine for host in hosts[:i])
