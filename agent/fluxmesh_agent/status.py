"""What an agent says of itself when it is asked: the host at one moment."""

from __future__ import annotations

import os
import platform
import time

from fluxmesh.cluster.snapshot import StepTiming
from fluxmesh.machine import identity
from fluxmesh.machine import memory as ram
from fluxmesh.machine.tools import is_mac
from fluxmesh.wire.messages import LeaseHolder, Status, WaitingJob
from fluxmesh_agent.lifecycle import Lifecycle

LOAD_RATE = 1e9  # bytes/s, until a load was timed
FLOPS = 1e9  # a second, until the engine has told


def status_of(
    life: Lifecycle,
    *,
    engine_pid: int | None,
    measured: tuple[StepTiming, ...],
    memory: int | None,
    holder: str,
    job: str,
    waiting: int,
    busy_seconds: float = 0.0,
    lease: LeaseHolder | None = None,
    line: tuple[WaitingJob, ...] = (),
) -> Status:
    """The answer to `AskStatus`; `memory` is the most that the host's owner allows, in bytes."""
    device = life.device
    total = device.memory_bytes if device else ram.total_bytes()
    held = life.holds.nbytes if life.holds else life.text.nbytes if life.text else 0
    held += sum(each.holds.nbytes for each in life.kept)
    # What the agent has read by itself so far goes where somebody asks for other weights: free.
    gone = life.loading.done_bytes if life.own and life.loading and not life.holds else 0
    # A graphics card beside the processor has memory of its own; on a Mac it is the machine's.
    is_apart = device is not None and device.name.startswith("Device(gpu") and not is_mac()
    free = max(0, total - held) if is_apart else ram.free_bytes() + gone
    ring = life.ring
    return Status(
        state=life.state,
        ring_generation=life.ring_generation,
        pid=os.getpid(),
        engine_pid=engine_pid,
        name=identity.machine_name(),
        kind=device.kind if device else "unknown",
        device=f"{identity.machine_id()}/{device.name if device else 'unknown'}",
        mlx_version=device.mlx_version if device else "unknown",
        python_version=platform.python_version(),
        memory_bytes=total if memory is None else min(total, memory),
        free_bytes=free,
        load_rate=life.load_rate or LOAD_RATE,
        flops_per_second=device.flops_per_second if device else FLOPS,
        clock=time.time(),
        holds=life.holds,
        text=life.text,
        measured=measured,
        counters=life.counters,
        holder=holder,
        job=job,
        waiting=waiting,
        reason=life.reason,
        ring=ring.name,
        ring_rank=ring.rank,
        ring_size=ring.size,
        ring_backend=ring.backend,
        platform=device.platform if device else "metal" if is_mac() else "cpu",
        machine_bytes=ram.total_bytes(),
        pressure=ram.pressure(),
        loading=life.loading,
        components=life.components,
        compiled=life.compiled,
        busy_seconds=busy_seconds,
        lease=lease,
        line=line,
        kept=life.kept,
    )
