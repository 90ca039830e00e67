"""Groups of engines on this machine, without agents: what each process needs to find the others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.rendezvous import engine_envs, joining
from tests.ports import free_ports


def environments(
    backend: str, engines: int, scratch: Path, addresses: Sequence[str] = ()
) -> list[dict[str, str]]:
    """For each rank its environment, as an agent would tell its engine; files go into `scratch`.

    Each gets a GPU of its own where there are as many. Without `addresses` all are on loopback.
    NVLink's multicast stays off: a program that uses it can take a shared host's GPUs out of
    service.
    """
    addresses = addresses or ["127.0.0.1"] * engines
    hosts = [Host(rank, address, (address,)) for rank, address in enumerate(addresses)]
    ports = [[port] for port in free_ports(engines)]
    there = gpus()
    envs = []
    for rank, own in enumerate(joining(backend, hosts, ports)):
        env = {**dict(engine_envs(backend, engines)), **dict(own.envs), "NCCL_NVLS_ENABLE": "0"}
        for variable, text in own.files:
            path = scratch / f"{variable}-{rank}.json"
            path.write_text(text)
            env[variable] = str(path)
        if there:
            env["CUDA_VISIBLE_DEVICES"] = there[rank % len(there)]
        envs.append(env)
    return envs


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed:
        return allowed.split(",")
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listing.stdout.strip().splitlines()))]
