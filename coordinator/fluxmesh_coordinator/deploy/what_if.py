"""A mesh that is not there, for `fluxmesh plan --assume`: what its hosts and links would measure.

An assumption is a JSON object about every host of a hostfile; `hostfiles/README.md` has its keys.
From it and the hostfile comes the same `MeshView` that real agents give, so that nothing of the
planner is special. `published` knows FLUX.1's own sizes: planning needs no files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fluxmesh.cluster import hostfile_fields
from fluxmesh.cluster.hostfile import Hostfile
from fluxmesh.cluster.snapshot import (
    Holding,
    HostInfo,
    LinkInfo,
    MeshView,
    ModelVariant,
    RingPlace,
    StepTiming,
)
from fluxmesh.errors import UsageError
from fluxmesh.models import registry
from fluxmesh.planning.cold import RESTARTING
from fluxmesh.planning.workload import ModelSizes, Workload

REQUIRED = ("memory", "link_rate")
NUMBERS = {"flops_per_second": 26e12, "load_rate": 3e9, "link_latency": 1e-4}  # left out
PLATFORMS = ("metal", "cuda", "cpu")
KEYS = (
    *(*REQUIRED, *NUMBERS, "kind", "links", "step_seconds", "warm"),
    *("platform", "machine_memory"),
)


def published(alias: str) -> ModelSizes:
    """A known model's own sizes, as its repository on the Hub declares them."""
    return ModelSizes(registry.published(alias))


def load_assumption(path: Path) -> dict[str, Any]:
    """The JSON object in a file, every value of it checked. Raises `UsageError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"`assume` {path}: {error.strerror or error}.", setting="assume") from None
    except ValueError as error:
        raise UsageError(f"`assume` {path}: it is not JSON ({error}).", setting="assume") from None
    if not isinstance(data, dict):
        raise UsageError(
            f"`assume` {path}: expected an object with {', '.join(REQUIRED)}.", setting="assume"
        )
    for key in (*data, *REQUIRED):
        if key not in KEYS or key not in data:
            what = "is missing" if key in KEYS else f"is no key; expected {', '.join(KEYS)}"
            raise UsageError(f"`assume` {path}: {key} {what}.", setting="assume")
    read = {
        "memory": hostfile_fields.memory,
        "kind": lambda value: value if isinstance(value, str) else None,
        "links": lambda value: value if value in ("ring", "all") else None,
        "warm": lambda value: value if isinstance(value, bool) else None,
        "platform": lambda value: value if value in PLATFORMS else None,
        "machine_memory": hostfile_fields.memory,
        "step_seconds": _times,
    }
    checked = {key: read.get(key, _positive)(value) for key, value in data.items()}
    for key, value in checked.items():
        if value is None:
            raise UsageError(
                f"`assume` {path}: {key} can't be {json.dumps(data[key])[:60]}.", setting="assume"
            )
    return {"kind": "assumed", "platform": "metal", "warm": True, **NUMBERS, **checked}


def assumed_view(
    hostfile: Hostfile, assumption: dict[str, Any], work: Workload, weights: ModelVariant
) -> MeshView:
    """What the hosts of `hostfile` would tell, were they as `assumption` says."""
    steps: dict[tuple[int, int], float] = assumption.get("step_seconds", {})
    measured = tuple(
        StepTiming(
            model=weights.model,
            height=height,
            width=width,
            dtype=weights.dtype,
            bits=weights.bits,
            step_seconds=seconds,
        )
        for (height, width), seconds in steps.items()
    )
    memory, platform = assumption["memory"], assumption["platform"]
    machine = assumption.get("machine_memory", memory)
    nbytes = sum(work.transformer) + work.autoencoder_bytes + work.text_bytes
    hosts: list[HostInfo] = []
    for host in hostfile.hosts:
        crowd = sum(other.machine == host.machine for other in hostfile.hosts)
        warm = assumption["warm"] and nbytes * crowd <= memory
        # Engines that end to form a ring would lose what is assumed to be loaded.
        is_joined = warm and hostfile.backend in RESTARTING
        place = RingPlace("assumed", host.rank, len(hostfile.hosts), hostfile.backend)
        ring = place if is_joined else RingPlace()
        hosts.append(
            HostInfo(
                rank=host.rank,
                name=host.name,
                kind=assumption["kind"],
                memory_bytes=min(memory, host.memory or memory),
                free_bytes=machine - nbytes * crowd * warm,
                flops_per_second=assumption["flops_per_second"],
                load_rate=assumption["load_rate"],
                measured=measured,
                holds=Holding(weights=weights, nbytes=nbytes) if warm else None,
                device=host.machine,
                platform=platform,
                machine_bytes=machine,
                ring=ring,
            )
        )
    return MeshView(tuple(hosts), _links(hostfile, assumption), hostfile.backend)


def _links(hostfile: Hostfile, assumption: dict[str, Any]) -> tuple[LinkInfo, ...]:
    """Cables of a ring reach neighbours alone; anything else reaches everyone."""
    count = len(hostfile.hosts)
    machines = {host.machine for host in hostfile.hosts}
    ring = hostfile.backend in ("ring", "jaccl-ring") and len(machines) == count
    near = assumption.get("links", "ring" if ring else "all") == "ring"
    rate, latency = assumption["link_rate"], assumption["link_latency"]
    return tuple(
        LinkInfo(source=a, target=b, rate=rate, latency=latency)
        for a in range(count)
        for b in range(count)
        if a != b and (not near or (a - b) % count in (1, count - 1))
    )


def _positive(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) and value > 0 else None


def _times(value: Any) -> dict[tuple[int, int], float] | None:
    """{"1024x1024": seconds, ...}"""
    if not isinstance(value, dict):
        return None
    times: dict[tuple[int, int], float] = {}
    for size, given in value.items():
        height, _, width = size.partition("x")
        seconds = _positive(given)
        if seconds is None or not (height.isdecimal() and width.isdecimal()):
            return None
        times[int(height), int(width)] = seconds
    return times
