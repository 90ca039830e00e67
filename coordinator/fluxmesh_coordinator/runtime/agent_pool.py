"""The agents of a mesh in one event loop: connected, told apart, and connected again when lost.

Between `client.py` (one agent) and `runtime/job_runner.py` (one job on them). A member that is lost
is tried again for as long as the pool is open; one on this machine whose process has ended is
started again first, if the pool knows how.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import HostInfo, Timings
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.planning.learning import dated, learned
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import end, together
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord, RecordInUseError
from fluxmesh_coordinator.agents.status import host_info
from fluxmesh_coordinator.jobs.types import Links
from fluxmesh_coordinator.runtime.clock import OwnClock

log = logging.getLogger(__name__)

RESTARTS = 3  # of one agent, in the life of a pool

Restart = Callable[[int], Member]  # starts the agent of a rank again; blocks; may raise
News = Timings | BackendFault  # what a job found out about the mesh
Keep = Callable[[Sequence[News]], None]  # in the order in which it came; blocks; FluxmeshError


class AgentPool:
    """A mesh, as one coordinator holds it. An async context manager."""

    def __init__(
        self,
        record: MeshRecord,
        dialer: Dialer,
        restart: Restart | None = None,
        keep: Keep | None = None,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """`keep` writes down what jobs find out, for other coordinators of the mesh."""
        self.record, self.deadlines = record, deadlines
        self.hosts: dict[int, Host] = {host.rank: host for host in record.hosts}
        self.links = Links(
            record.links,
            record.hostfile.backend,
            record.timings,
            record.fallback,
            len(record.members),
        )
        self._keep = keep
        self._unwritten: list[News] = []  # that is to be kept
        self._writing: asyncio.Task[None] | None = None
        self._is_closing = asyncio.Event()
        self.clients: dict[int, AgentClient] = {}  # those that answer
        self.reasons: dict[int, str] = {}  # why the others do not
        self._members = {member.rank: member for member in record.members}
        # Leases are a coordinator's, not a job's: to an agent all jobs of this pool are one. So a
        # job has the whole pool, or hosts lent to it (`lent_hosts.py`), and each one's turn.
        self.one_job = asyncio.Lock()
        self.turns = {rank: asyncio.Lock() for rank in self.hosts}
        self._client = secrets.token_hex(16)
        self._dialer, self._restart = dialer, restart
        self._restarts: dict[int, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._clock = OwnClock(deadlines)
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connects to all that answer; raises nothing where none does."""
        self._ticking = asyncio.create_task(self._tick())
        for rank in self._members:
            self._tasks[rank] = asyncio.create_task(self._reach(rank))
        while len(self.clients) + len(self.reasons) < len(self._members):
            if not await self.change(self.deadlines.others if self.clients else None):
                break
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._is_closing.set()
        if self._writing is not None:
            await self._writing
        tasks = [*self._tasks.values(), *([self._ticking] if self._ticking else [])]
        await end(*tasks)
        await together(client.close() for client in self.clients.values())
        await self._dialer.close()

    async def change(self, seconds: float | None = None) -> bool:
        """Waits, `seconds` at most, until a host answers that did not, or the other way round.

        Whether one did. Who does something else between two waits looks for himself, and often.
        """
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def can_restart(self, rank: int) -> bool:
        """Whether a host that is lost is started again from here."""
        tried = self._restarts.get(rank, 0)
        return self._restart is not None and self.hosts[rank].is_local and tried < RESTARTS

    def learn(self, news: Timings) -> None:
        """Plans of later jobs know what this one measured."""
        news = dated(news, time.time())
        self.links = replace(self.links, timings=learned(self.links.timings, news))
        self._write_down(news)

    def remember(self, fault: BackendFault) -> None:
        """Rings form over another backend from now on, in later jobs too."""
        fault = replace(fault, when=time.time())
        self.links = replace(self.links, fallback=self.links.fallback.noted(fault))
        self._write_down(fault)

    def adopt(self, faults: tuple[BackendFault, ...]) -> None:
        """What others have found out since, or `fluxmesh up` has cleared, is so here too."""
        fallback = replace(self.links.fallback, faults=faults)
        for news in self._unwritten:  # who read the record was too early
            fallback = fallback.noted(news) if isinstance(news, BackendFault) else fallback
        self.links = replace(self.links, fallback=fallback)

    def forgive(self) -> None:
        """A first death that lies far back counts no more, as a host's does not."""
        since = time.time() - self.deadlines.forgiven
        self.links = replace(self.links, fallback=self.links.fallback.forgiving(since))

    def _write_down(self, news: News) -> None:
        """Nobody waits for a disk but who closes the pool."""
        if self._keep is None:
            return
        self._unwritten.append(news)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(self._keep))

    async def _write(self, keep: Keep) -> None:
        """Until all is written: now, and what comes soon after it together, a while later."""
        while self._unwritten:
            news = tuple(self._unwritten)
            is_written = True
            try:
                await asyncio.to_thread(keep, news)
            except RecordInUseError as error:  # it is written with what comes next
                log.warning("what was found out is not kept yet: %s", error)
                is_written = self._is_closing.is_set()
            except FluxmeshError as error:  # the pictures are worth more than what is known of them
                log.warning("what was found out is not kept: %s", error)
            if is_written:
                del self._unwritten[: len(news)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.deadlines.rewrite):
                    await self._is_closing.wait()

    def lost(self, rank: int, client: AgentClient, reason: str) -> None:
        """A client's conversation is over: another one is begun. Twice is harmless."""
        if self.clients.get(rank) is not client:
            return
        del self.clients[rank]
        self.reasons[rank] = reason
        self._tasks[rank] = asyncio.create_task(self._reach(rank, client))
        self._changed.set()

    async def statuses(self) -> dict[int, messages.Status]:
        """What the hosts that answer say of themselves now."""

        async def ask(rank: int) -> messages.Status | None:
            client = self.clients.get(rank)
            if client is None:
                return None
            try:
                return await client.ask(messages.AskStatus(), messages.Status)
            except FluxmeshError as error:
                self.lost(rank, client, str(error))
                return None

        answers = await together(map(ask, self._members))
        return {rank: status for rank, status in zip(self._members, answers, strict=True) if status}

    async def infos(self) -> dict[int, HostInfo]:
        """The hosts that answer, as the planner sees them."""
        return {rank: host_info(rank, status) for rank, status in (await self.statuses()).items()}

    async def tell(self, notes: Mapping[int, messages.Message]) -> None:
        """Says something to the hosts that answer; who does not hear it has lost nothing."""

        async def send(rank: int, note: messages.Message) -> None:
            client = self.clients.get(rank)
            if client is not None:
                with contextlib.suppress(FluxmeshError):
                    await client.ask(note, messages.Done, self.deadlines.note)

        await together(send(rank, note) for rank, note in notes.items())

    def unreachable(self) -> HostUnreachableError:
        """Why no host answers, in a sentence."""
        why = next(iter(self.reasons.values()), "it has no host.")
        return HostUnreachableError(f"No host of {self.record.name} answers: {why}")

    async def _tick(self) -> None:
        """Several times a second, so that a standstill is noticed also between two jobs."""
        while True:
            await asyncio.sleep(self.deadlines.tick)
            self._clock.tick()

    async def _reach(self, rank: int, old: AgentClient | None = None) -> None:
        """Until the member answers: connects, or has it started again."""
        if old is not None:
            await old.close()
        (pause, limit), again = self.deadlines.reconnect, self.deadlines.answer_again
        while True:
            member = self._members[rank]
            client = AgentClient(
                self._dialer, member, self.hosts[rank].name, self._client, self.deadlines
            )
            hangs = False
            try:
                async with asyncio.timeout(again if old is not None else None):
                    await client.__aenter__()
                    if old is not None:
                        # To the agent we are the same: a lease that nobody here knows of any
                        # more would be ours for as long as we live.
                        await client.ask(messages.LeaveQueue(), messages.Done)
            except TimeoutError:
                hangs = True
                self.reasons[rank] = f"{client.title}: its agent does not answer."
                await client.close()
            except FluxmeshError as error:
                self.reasons[rank] = str(error)
                await client.close()
            else:
                self.clients[rank] = client
                self.reasons.pop(rank, None)
                self._changed.set()
                return
            # An agent that has just woken with us, from swap maybe, is not ended with its weights.
            if self.can_restart(rank) and not (hangs and self._clock.has_just_woken):
                await self._start_again(rank)
            self._changed.set()
            await asyncio.sleep(pause)
            pause = min(limit, 2 * pause)

    async def _start_again(self, rank: int) -> None:
        assert self._restart is not None
        self._restarts[rank] = self._restarts.get(rank, 0) + 1
        try:
            self._members[rank] = await asyncio.to_thread(self._restart, rank)
        except (FluxmeshError, OSError) as error:  # it is tried again all the same
            log.warning("host %d could not be started again: %s", rank, error)
            self.reasons[rank] = str(error)
