"""One job on a pool's agents: leases, then its session until its end; again when it is stuck.

The I/O around the pure sessions of `jobs/`: takes the leases of the hosts that the plan needs, in
rank order (so that two coordinators never wait for each other), hands the session what agents say,
does what it says, and brings back hosts that return. Jobs of one pool run one after another, unless
each was lent hosts (`lent_hosts.py`). Below `mesh.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fluxmesh.cluster.snapshot import HostInfo, Timings
from fluxmesh.errors import (
    AdapterError,
    CancelledError,
    DoesNotFitError,
    FluxmeshError,
    HostUnreachableError,
)
from fluxmesh.events import BackendChanged, HostLost, HostUnfit, Loading, Queued
from fluxmesh.machine.awake import kept_awake
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import end, together
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.status import host_info
from fluxmesh_coordinator.jobs import remedies
from fluxmesh_coordinator.jobs.input_log import InputLog
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.types import (
    Back,
    Gone,
    Input,
    Instruction,
    JobFinished,
    JobStuck,
    Learn,
    Leased,
    LeasedHost,
    LetGo,
    Proposal,
    Remember,
    SendToAgent,
    Stop,
    TellUser,
    Tick,
    Told,
)
from fluxmesh_coordinator.runtime import adapter_upload
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.clock import OwnClock
from fluxmesh_coordinator.runtime.failed_jobs import FailedJobs
from fluxmesh_coordinator.runtime.host_link import HostLink
from fluxmesh_coordinator.runtime.lent_hosts import LentHosts

T = TypeVar("T")
log = logging.getLogger(__name__)
NO_PATHS: Mapping[str, str] = {}


class JobRunner:
    """Does one job. `tell` hears its events; `stop` cancels it."""

    def __init__(
        self,
        pool: AgentPool,
        session: JobSession[Any],
        files: adapter_upload.Files,
        tell: Callable[[Told], None],
        failed_jobs: FailedJobs | None = None,
        paths: Mapping[str, str] = NO_PATHS,
        lent: LentHosts | None = None,
    ) -> None:
        """`failed_jobs` keeps what led to a failure, if anybody is to. `paths` says how the user
        calls what agents know by another path. `lent` are the hosts that it may use, beside other
        jobs; None are all of them, with no other job."""
        self.pool, self.session, self.files, self.tell = pool, session, files, tell
        self.lent = lent
        self._paths = paths
        self._failed_jobs = failed_jobs
        self._inputs = InputLog()
        self.stop = asyncio.Event()
        self._inbox: asyncio.Queue[Input] = asyncio.Queue()
        self._links: dict[int, HostLink] = {}  # to those whose lease is ours
        self._leased: dict[int, AgentClient] = {}
        self._asked: dict[int, AgentClient] = {}  # for a lease: granted, or we stand in line
        self._turns: set[int] = set()  # hosts that no other job of this pool asks for meanwhile
        self._returning: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None  # hosts hear how far the job is
        self._was_lost = False
        self._unneeded: set[int] = set()  # hosts that the session has let go of
        self._lessons: list[Timings] = []  # what it measured
        self.deadlines = pool.deadlines
        self._clock = OwnClock(self.deadlines)

    async def run(self, wait: float | None = None) -> None:
        """To the end of the job, after those before it, unless hosts were lent to it.

        `wait` is how many seconds hosts may take to return. Raises how it failed.
        """
        with kept_awake():
            if self.lent is not None:
                await self._run(wait)
                return
            await self._unless_stopped(self.pool.one_job.acquire())
            try:
                await self._run(wait)
            finally:
                self.pool.one_job.release()

    async def _run(self, wait: float | None) -> None:
        stopping = asyncio.create_task(self._watch_stop())
        try:
            while True:
                self.pool.forgive()
                leased = Leased(tuple(await self._lease(wait)), self.pool.links)
                self._unneeded.clear()
                self._returning = asyncio.create_task(self._bring_back())
                end = await self._serve(leased)
                await self._release()
                # Who stops a job often ends the program, which would wait for a disk; the next job
                # measures the same.
                if not (isinstance(end, JobFinished) and isinstance(end.error, CancelledError)):
                    self._learn()
                if isinstance(end, JobFinished):
                    if end.error is not None:
                        raise self._named(end.error)
                    return
                self._was_lost = True
        except Exception as error:
            if self._failed_jobs is not None:
                self._failed_jobs.keep(self.session, self._inputs, error)
            raise
        finally:
            stopping.cancel()
            await self._release()

    def _named(self, error: FluxmeshError) -> FluxmeshError:
        """An error as the user reads it."""
        return error.saying(self._in_names(str(error)))

    def _in_names(self, text: str) -> str:
        """A sentence of an agent, in the user's own names for files."""
        for path, name in self._paths.items():
            text = text.replace(path, name)
        return adapter_upload.with_names(text, self.files)

    def _learn(self) -> None:
        """Keeps what the session measured."""
        news, self._lessons = self._lessons, []
        for each in news:
            self.pool.learn(each)

    def feed(self, event: Input) -> None:
        """Gives the session an input that comes from no agent."""
        self._inbox.put_nowait(event)

    @property
    def _now(self) -> float:
        return self._clock.now

    # Leases

    async def _lease(self, wait: float | None) -> list[LeasedHost]:
        """The hosts of the best plan, leased; waits for hosts that may return."""
        deadline: float | None = None
        is_patient = len(self.pool.clients) < 2
        while True:
            infos = await self.pool.infos()
            plan = self.session.find(self._mine(infos), self.pool.links)
            if plan.winner is not None:
                ranks = {*plan.winner.ranks, plan.winner.text_rank}
                wanted = sorted(rank for rank in ranks if rank is not None)
                hosts = await self._take(wanted, plan.winner.seconds, is_patient)
                if hosts is not None:
                    if self.lent is not None:
                        self.lent.settle(wanted)
                    return hosts
                is_patient = True
                continue
            if self.lent is not None and self.lent.widen():
                continue
            if deadline is None:
                deadline = self._now + (self._patience(infos) if wait is None else wait)
            await self._await_change(deadline, plan, infos)

    def _mine(self, infos: dict[int, HostInfo]) -> list[HostInfo]:
        """Those of the hosts that this job may use."""
        lent = self.lent
        return [info for rank, info in infos.items() if lent is None or rank in lent.ranks]

    def _patience(self, infos: dict[int, HostInfo]) -> float:
        """How long a mesh that can't do the work may take to change, where nobody said."""
        missing, seconds = self.pool.reasons, self.deadlines.comes_back
        if set(self.pool.clients) - set(infos):
            return seconds  # one came back while the others were asked
        if set(self.pool.hosts) - set(self.pool.clients) - set(missing):
            return seconds  # one has neither answered nor failed yet: its machine is busy
        if self._was_lost or any(self.pool.can_restart(rank) for rank in missing):
            return seconds if missing else 0.0
        return 0.0

    async def _await_change(
        self, deadline: float, plan: Proposal, infos: dict[int, HostInfo]
    ) -> None:
        """Until a host comes or goes. Raises where that takes too long."""
        error = self.session.given_up(self.pool.hosts)
        if error is not None:
            raise self._named(error)
        left = deadline - self._now
        if self.lent is not None and self.lent.may_grow:
            plan = self._once_idle(infos)
            if plan.winner is not None:
                left = max(left, self.deadlines.look)  # a host that others have comes free
        if left <= 0:
            if not infos:
                raise self.pool.unreachable()
            gone = sorted(self.pool.reasons)
            also = f" Hosts that do not answer: {', '.join(map(str, gone))}." if gone else ""
            helps = remedies.sentences(plan.remedies)
            raise DoesNotFitError(f"{plan.reason}{helps and f' {helps}'}{also}")
        await self._unless_stopped(self.pool.change(min(left, self.deadlines.look)))

    def _once_idle(self, infos: dict[int, HostInfo]) -> Proposal:
        """How all hosts that answer would do the job, once no other job needs their memory."""
        idle = [
            replace(info, free_bytes=max(info.free_bytes, info.memory_bytes))
            for info in infos.values()
        ]
        return self.session.find(idle, self.pool.links)

    async def _take(
        self, ranks: list[int], seconds: float, is_patient: bool
    ) -> list[LeasedHost] | None:
        """The leases of these hosts, in rank order; None where one of them was lost meanwhile.

        Who is not patient gets None too where one is in use: another plan may be better then.
        """
        granted: dict[int, messages.Granted] = {}
        for rank in ranks:
            client = self.pool.clients.get(rank)
            try:
                if client is None:
                    raise HostUnreachableError(self.pool.reasons.get(rank, "It is gone."))
                in_use = asyncio.Event()
                tell = self._teller(rank) if is_patient else lambda _, seen=in_use: seen.set()
                lease = self._line_up(rank, client, seconds, tell)
                held = await self._unless_stopped(_unless_set(lease, in_use))
                if held is None:
                    await self._release()
                    return None
                granted[rank] = held
                self._leased[rank] = client
                await self._unless_stopped(self._give_files(rank, client, granted[rank].fence))
            except HostUnreachableError as error:
                if client is not None:
                    self.pool.lost(rank, client, str(error))
                await self._release()
                return None
        return [self._open(rank, granted[rank]) for rank in ranks]

    async def _line_up(
        self,
        rank: int,
        client: AgentClient,
        seconds: float,
        tell: Callable[[messages.LeaseQueued], None],
    ) -> messages.Granted:
        """The lease of a host, once no other job of this pool has it."""
        if rank not in self._turns:
            await self.pool.turns[rank].acquire()
            self._turns.add(rank)
        self._asked[rank] = client
        return await client.lease(self.session.id, seconds, tell, self.session.title)

    async def _give_files(self, rank: int, client: AgentClient, fence: int) -> None:
        """Sends a host the adapters that it lacks, before a session waits for its engine."""

        def tell(done: int, total: int) -> None:
            self.tell(Loading("adapter", done, total, rank))

        await adapter_upload.send(client, fence, self.files, tell)

    def _teller(self, rank: int) -> Callable[[messages.LeaseQueued], None]:
        """Tells of each place in a host's line once: the agent repeats it, as a sign of life."""
        told = 0

        def tell(queued: messages.LeaseQueued) -> None:
            nonlocal told
            if queued.place != told:
                told = queued.place
                self.tell(Queued(queued.place, queued.seconds, rank))

        return tell

    def _open(self, rank: int, granted: messages.Granted) -> LeasedHost:
        """A host whose lease is ours: from now on its reports come in, and messages go out."""
        client, status = self._leased[rank], granted.status
        self._links[rank] = HostLink(rank, client, self._inbox, self._gone)
        return LeasedHost(
            info=replace(host_info(rank, status), busy_seconds=0.0),  # by us, and nobody else
            host=self.pool.hosts[rank],
            fence=granted.fence,
            ring_generation=max(granted.ring_generation, status.ring_generation),
            is_up=status.engine_pid is not None,
            ring=status.ring,
            ring_rank=status.ring_rank,
            ring_size=status.ring_size,
            ring_backend=status.ring_backend,
        )

    async def _release(self) -> None:
        """Gives back all leases, and places in line."""
        if self._returning is not None:
            await end(self._returning)
            self._returning = None
        if self._telling is not None:
            await end(self._telling)
            self._telling = None
        asked, self._asked = self._asked, {}
        self._leased = {}
        try:
            for rank in list(self._links):
                await self._links.pop(rank).close()
            await together(self._leave(rank, client) for rank, client in asked.items())
        finally:
            for rank in list(self._turns):
                self._end_turn(rank)

    def _end_turn(self, rank: int) -> None:
        """Another job of this pool may ask for the host."""
        if rank in self._turns:
            self._turns.remove(rank)
            self.pool.turns[rank].release()

    async def _leave(self, rank: int, client: AgentClient) -> None:
        try:
            await client.ask(messages.LeaveQueue(), messages.Done)
        except FluxmeshError as error:
            self.pool.lost(rank, client, str(error))

    async def _bring_back(self) -> None:
        """Leases hosts of the job that were lost, when they answer again and their line is short.

        In the background: whoever holds one is never waited for with other leases in hand.
        """
        wanted = set(self.pool.hosts) if self.session.grows else set(self._leased)
        while True:
            await self._let_go()
            for rank in sorted(wanted - set(self._leased) - self._unneeded):
                client = self.pool.clients.get(rank)
                if client is None or self.session.given_up([rank]) is not None:
                    continue
                try:
                    granted = await self._line_up(rank, client, 0.0, lambda _: None)
                    await self._give_files(rank, client, granted.fence)
                except AdapterError as error:  # of this side: the file is gone, or has changed
                    log.warning("host %d is not used again: %s", rank, error)
                    wanted.discard(rank)
                    await self._leave(rank, client)
                    self._asked.pop(rank, None)
                    self._end_turn(rank)
                    continue
                except FluxmeshError as error:
                    self.pool.lost(rank, client, str(error))
                    continue
                self._leased[rank] = client
                self._inbox.put_nowait(Back(self._open(rank, granted)))
            await self.pool.change(self.deadlines.look)

    async def _let_go(self) -> None:
        """Gives back the leases of hosts that the job uses no more: others may."""
        given_up = {rank for rank in self._leased if self.session.given_up([rank]) is not None}
        for rank in sorted(given_up | (self._unneeded & self._leased.keys())):
            client = self._leased.pop(rank, None)
            if client is None:
                continue  # it was lost while another one was told
            await self._links.pop(rank).close()
            await self._leave(rank, client)
            self._asked.pop(rank, None)  # only now: if this is broken off, `_release` does it
            self._end_turn(rank)
            if self.lent is not None:
                self.lent.settle(self.lent.ranks - {rank})

    # The session

    async def _serve(self, leased: Leased) -> JobFinished | JobStuck:
        """Does what the session says until it ends, or is stuck."""
        ticked = told = self._now
        self._clock.begin()
        end = self._handle(leased)
        while end is None:
            try:
                async with asyncio.timeout(self.deadlines.tick):
                    event: Input = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            self._clock.tick()
            if isinstance(event, Gone):
                event = replace(event, counts=not self._clock.has_just_woken)
                if event.rank in self._links:
                    await self._links.pop(event.rank).close()
            end = self._handle(event)
            if end is None and self._now - ticked >= self.deadlines.tick:
                ticked = self._now
                end = self._handle(Tick())
            if self._now - told >= self.deadlines.heartbeat:
                told = self._now
                self._tell_progress()
        return end

    def _tell_progress(self) -> None:
        """Tells the hosts how far the job is, unless they are being told."""
        if self._telling is not None and not self._telling.done():
            return
        hosts, now = self.session.state.hosts, self._now
        notes = {
            rank: messages.TellProgress(fence=host.fence, progress=self.session.progress(rank, now))
            for rank, host in hosts.items()
            if rank in self._links
        }
        self._telling = asyncio.create_task(self.pool.tell(notes))

    def _handle(self, event: Input) -> JobFinished | JobStuck | None:
        now, out = self._now, []
        try:
            out = self.session.handle(event, now)
        finally:
            self._inputs.note(now, event, out)
        return self._carry_out(out)

    def _carry_out(self, out: list[Instruction]) -> JobFinished | JobStuck | None:
        end: JobFinished | JobStuck | None = None
        for instruction in out:
            match instruction:
                case TellUser(HostLost() | HostUnfit() | BackendChanged() as event):
                    self.tell(replace(event, reason=self._in_names(event.reason)))
                case TellUser():
                    self.tell(instruction.event)
                case SendToAgent():
                    link = self._links.get(instruction.rank)
                    if link is not None:
                        link.send(instruction.message)
                case LetGo():
                    self._unneeded.add(instruction.rank)
                case Learn():
                    self._lessons.append(instruction.news)
                case Remember():
                    self.pool.remember(instruction.fault)
                case JobFinished() | JobStuck():
                    end = instruction
        return end

    def _gone(self, rank: int, client: AgentClient, reason: str) -> None:
        if self._leased.get(rank) is client:
            del self._leased[rank], self._asked[rank]
            self.pool.lost(rank, client, reason)
            self._inbox.put_nowait(Gone(rank, reason))

    # Stopping

    async def _watch_stop(self) -> None:
        await self.stop.wait()
        self._inbox.put_nowait(Stop())

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that waits for others. Raises `CancelledError` on a stop."""
        task = asyncio.create_task(waiting)
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise CancelledError("Cancelled.")
        finally:
            await end(task, stopped)


async def _unless_set(waiting: Coroutine[Any, Any, T], event: asyncio.Event) -> T | None:
    """The result of a coroutine; None where the event came first."""
    task, happened = asyncio.create_task(waiting), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, happened}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await end(task, happened)
