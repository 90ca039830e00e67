"""What a mesh says of itself now: each agent's `Status`, and the view that the planner reads.

Stands on `client.py`; `status`, `plan`, `doctor` and `bringup.py` stand on this.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fluxmesh.cluster.snapshot import HostInfo, MeshView, RingPlace
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys, load_keys
from fluxmesh.wire import messages
from fluxmesh.wire.loop_thread import LoopThread
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """One moment of a mesh. Every rank of the record is in `statuses` or in `errors`."""

    record: MeshRecord
    statuses: dict[int, messages.Status]
    errors: dict[int, FluxmeshError]
    clock_skews: dict[int, float]  # seconds by which a host's clock is ahead of ours

    @property
    def view(self) -> MeshView:
        """The hosts that answer, and their links."""
        hosts = tuple(host_info(rank, self.statuses[rank]) for rank in sorted(self.statuses))
        links = tuple(
            link
            for link in self.record.links
            if link.source in self.statuses and link.target in self.statuses
        )
        return MeshView(
            hosts,
            links,
            self.record.hostfile.backend,
            self.record.timings,
            self.record.fallback,
            len(self.record.members),
        )


def host_info(rank: int, status: messages.Status) -> HostInfo:
    """A host as the planner sees it. Raises `UsageError` for numbers that make no sense."""
    return HostInfo(
        rank=rank,
        name=status.name,
        kind=status.kind,
        memory_bytes=status.memory_bytes,
        free_bytes=status.free_bytes,
        flops_per_second=status.flops_per_second,
        load_rate=status.load_rate,
        measured=status.measured,
        holds=status.holds,
        text=status.text,
        kept=status.kept,
        device=status.device,
        platform=status.platform,
        machine_bytes=status.machine_bytes,
        compiled=status.compiled,
        busy_seconds=status.busy_seconds,
        ring=RingPlace(status.ring, status.ring_rank, status.ring_size, status.ring_backend),
    )


def user_keys(home: Home | None = None) -> Keys:
    """This user's keys, made on first use."""
    return load_keys((home or Home.default()).folder, "client")


def survey(record: MeshRecord, keys: Keys | None = None) -> Survey:
    """Asks every agent of a mesh for its status. Raises nothing for hosts that don't answer."""

    async def ask(client: AgentClient) -> tuple[messages.Status, float]:
        begin = time.time()
        status = await client.ask(messages.AskStatus(), messages.Status)
        return status, status.clock - (begin + time.time()) / 2

    answers, errors = with_agents(record, ask, keys)
    return Survey(
        record,
        {rank: status for rank, (status, _) in answers.items()},
        errors,
        {rank: skew for rank, (_, skew) in answers.items()},
    )


def in_use(survey: Survey) -> str:
    """Why its agents should not be ended now, in a sentence; "" where nobody holds one."""
    for rank, status in survey.statuses.items():
        if status.job:
            return f"Host {rank} works on {_work(status)}; wait until it is done, or use `force`."
    return ""


def _work(status: messages.Status) -> str:
    """What is done and for whom: `4 images, 128x128 (anna@studio)`; a job's name is an id."""
    lease = status.lease
    if lease is None:
        return status.job
    return f"{lease.title} ({lease.user})" if lease.title else f"a job of {lease.user}"


def answering(survey: Survey) -> Survey:
    """`survey`, if a host answers. Raises `HostUnreachableError` with the first reason if none."""
    if not survey.statuses:
        reason = next(iter(survey.errors.values()), "the mesh has no host.")
        raise HostUnreachableError(f"No host of {survey.record.name} answers: {reason}")
    return survey


def with_agents(
    record: MeshRecord, do: Callable[[AgentClient], Awaitable[T]], keys: Keys | None = None
) -> tuple[dict[int, T], dict[int, FluxmeshError]]:
    """`do` with each agent of a mesh, side by side: (results, errors), each by rank."""
    keys = keys or user_keys()

    async def everyone(dialer: Dialer) -> tuple[dict[int, T], dict[int, FluxmeshError]]:
        async def visit(member: Member) -> T:
            async with AgentClient(dialer, member, names[member.rank]) as client:
                return await do(client)

        ended = await asyncio.gather(*map(visit, record.members), return_exceptions=True)
        results: dict[int, T] = {}
        errors: dict[int, FluxmeshError] = {}
        for member, end in zip(record.members, ended, strict=True):
            if isinstance(end, FluxmeshError):
                errors[member.rank] = end
            elif isinstance(end, BaseException):
                raise end
            else:
                results[member.rank] = end
        return results, errors

    names = {host.rank: host.name for host in record.hosts}
    return run(keys, everyone)


def run(keys: Keys, do: Callable[[Dialer], Coroutine[Any, Any, T]]) -> T:
    """Runs `do` with a dialer that proves `keys`, in an event loop of its own.

    Ctrl-C cancels it, and waits until what it has told the agents has left.
    """
    from fluxmesh.wire.transport.dialer import CurveDialer  # loads zmq

    async def body() -> T:
        dialer = CurveDialer(keys)
        try:
            return await do(dialer)
        finally:
            await dialer.close()

    with LoopThread("agents") as loop:
        return loop.run(body())
