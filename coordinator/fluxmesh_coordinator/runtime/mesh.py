"""`Mesh`: the hosts of a hostfile, or this machine alone, as a program holds them.

    with fluxmesh.Mesh.connect() as mesh:
        for event in mesh.generate(GenerateRequest("a red apple", seed=7)):
            ...

The command line stands on this, and so can any program (`fluxmesh.Mesh`). An event loop in a
thread of its own drives the agents (`agent_pool.py`, `job_runner.py`); everything here blocks.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar, cast

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.events import Event, Planned
from fluxmesh.planning.capacity import Memory
from fluxmesh.planning.plan import Plan, check_asked
from fluxmesh.planning.plan import plan as find_plan
from fluxmesh.planning.workload import Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.takes import check_published
from fluxmesh.storage import interrupts
from fluxmesh.storage.keys import Keys
from fluxmesh.training.events import TrainEvent
from fluxmesh.training.request import TrainRequest
from fluxmesh.wire import messages
from fluxmesh.wire.loop_thread import LoopThread
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents import launch
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import (
    Member,
    MeshRecord,
    learn,
    load,
    remember_members,
)
from fluxmesh_coordinator.agents.status import user_keys
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.types import Heard, Told
from fluxmesh_coordinator.runtime.adapter_upload import Files
from fluxmesh_coordinator.runtime.agent_pool import AgentPool, Keep, Restart
from fluxmesh_coordinator.runtime.failed_jobs import FailedJobs
from fluxmesh_coordinator.runtime.job_runner import NO_PATHS, JobRunner
from fluxmesh_coordinator.runtime.lent_hosts import LentHosts
from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel
from fluxmesh_coordinator.runtime.running import Running

T = TypeVar("T")
log = logging.getLogger(__name__)


class Mesh:
    """Agents that are up, and the jobs of this program on them. A context manager."""

    def __init__(
        self,
        record: MeshRecord,
        dialer: Callable[[], Dialer],
        *,
        restart: Restart | None = None,
        keep: Keep | None = None,
        close: Callable[[], None] = lambda: None,
        keeps_warm: bool = True,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """`connect` is the usual way in. `dialer` is called in the loop's thread; `restart`
        starts the agent of a rank again, `keep` writes down what jobs measure, `close` ends what
        was started for this mesh alone.
        """
        self.record, self.deadlines = record, deadlines
        self.keeps_warm = keeps_warm  # whether weights serve others after this program
        self._close = close
        self._jobs: set[Running] = set()  # that run now
        self._noted: dict[int, tuple[AgentClient, messages.NoteSize]] = {}  # told to ranks last
        self._is_open = False
        self._forget = interrupts.at_end(self.close)  # wherever Ctrl-C comes, it is closed
        self._thread = LoopThread("mesh")
        self._loop = self._thread.loop

        async def begin() -> AgentPool:
            pool = AgentPool(record, dialer(), restart, keep, deadlines)
            try:
                return await pool.__aenter__()
            except BaseException:
                await pool.__aexit__()
                raise

        try:
            self._pool: AgentPool = self._run(begin())
            self._is_open = True
        except BaseException:
            self._end()
            raise

    @classmethod
    def connect(cls, record: MeshRecord | None = None, keys: Keys | None = None) -> Self:
        """The mesh of `record`, or the one that is up; where none is, one of this machine alone.

        The last ends with this program. Raises `FluxmeshError` where it can't be started; a mesh
        none of whose hosts answers is told by what is asked of it.
        """
        if record is not None:
            return cls._of(record, keys or user_keys(), lambda _: None)
        return cls.of_user(load())

    @classmethod
    def of_user(cls, record: MeshRecord | None) -> Self:
        """The mesh that `fluxmesh up` left, as the user's `mesh.json` has it; None: there is none.

        What is measured, and agents that are started again, are written down there. Raises as
        `connect`.
        """
        if record is not None:
            return cls._of(record, user_keys(), remember_members, partial(learn, record.text))
        started = launch.start_ephemeral()
        ephemeral = [started]
        lock, is_over = threading.Lock(), threading.Event()

        def restart(rank: int) -> Member:
            with lock:  # a start that is under way when the mesh closes leaves nothing behind
                if is_over.is_set():
                    raise HostUnreachableError("The mesh was closed.")
                ephemeral[0].kill()
                ephemeral[0] = launch.start_ephemeral(keys=started.keys)
                return ephemeral[0].record.members[rank]

        def close() -> None:
            is_over.set()
            with lock:
                ephemeral[0].close()

        try:
            return cls(
                started.record,
                _curve(started.keys),
                restart=restart,
                close=close,
                keeps_warm=False,
            )
        except BaseException:
            close()
            raise

    @classmethod
    def _of(
        cls,
        record: MeshRecord,
        keys: Keys,
        remember: Callable[[MeshRecord], None],
        keep: Keep | None = None,
    ) -> Self:
        latest, lock = [record], threading.Lock()

        def restart(rank: int) -> Member:
            again = launch.start_again(latest[0], rank, keys)
            with lock:  # others may have been started meanwhile, and are written down too
                latest[0] = latest[0].with_member(again)
                try:
                    remember(latest[0])
                except FluxmeshError as error:  # it runs, and is of use here
                    log.warning("an agent that was started again is not on record: %s", error)
            return again

        return cls(record, _curve(keys), restart=restart, keep=keep)

    # What it can do

    def generate(
        self,
        request: GenerateRequest,
        placement: Placement | None = None,
        force_shard: bool = False,
        wait: float | None = None,
        *,
        keep_warm: bool = True,
    ) -> Generator[Event, None, None]:
        """Runs a request; yields its events as they happen. Pictures come as they are ready.

        `placement` and `force_shard` narrow the plan; `wait` is how many seconds hosts that are
        lost, or do not answer, may take to return. Closing the iterator cancels the job within a
        step. Raises `UsageError`, `ModelNotFoundError`, `WeightsError`, `AdapterError`,
        `HostUnreachableError` or `DoesNotFitError`.
        """
        resolved = self.resolve(request)
        yield from self.paint(resolved, placement, force_shard, wait, keep_warm=keep_warm)

    def resolve(self, request: GenerateRequest) -> Resolved:
        """The request as this mesh can do it: its model found, its adapters hashed, all filled in.

        A model that a mesh of this machine lacks is fetched. Raises as `generate`.
        """
        check_published(request)
        return Resolved.of(request, ResolvedModel.for_mesh(request.model, self.record)).complete()

    def paint(
        self,
        resolved: Resolved,
        placement: Placement | None = None,
        force_shard: bool = False,
        wait: float | None = None,
        *,
        keep_warm: bool = True,
        lent: LentHosts | None = None,
    ) -> Generator[Event, None, None]:
        """`generate`, for a request that is resolved.

        Jobs run one after another, unless hosts were `lent` to them: then beside others.
        """
        job = self._job(resolved, placement, force_shard, keep_warm)
        session = GenerationSession(job, self.deadlines)
        running = self.start(session, resolved.files, wait, paths=resolved.paths, lent=lent)
        plans: list[Planned] = []
        try:
            for event in running.events():
                if isinstance(event, Planned):
                    plans.append(event)
                yield cast(Event, event)  # a job that paints tells nothing else
        finally:
            running.stop()
        if self.keeps_warm:
            self._note_size(job)
            self._leave_makeshift(plans)

    def train(
        self, request: TrainRequest, tell: Callable[[Heard], None] = lambda _: None
    ) -> Generator[TrainEvent, None, None]:
        """Runs a training, or goes on with one, to the adapter in `output_dir`.

        `tell` hears of bytes that hosts load, and of hosts that are lost. Closing the iterator
        leaves a checkpoint. Raises what `local_executor.train` does, and what `generate` does of
        hosts.
        """
        from fluxmesh_coordinator.runtime.mesh_executor import train_on

        yield from train_on(self, request, tell)

    def start(
        self,
        session: JobSession[Any],
        files: Files,
        wait: float | None = None,
        *,
        paths: Mapping[str, str] = NO_PATHS,
        lent: LentHosts | None = None,
    ) -> Running:
        """Begins a job in the background; `paths` and `lent` as in `JobRunner`."""
        box: queue.SimpleQueue[Told | None] = queue.SimpleQueue()

        async def begin() -> JobRunner:
            return JobRunner(self._pool, session, files, box.put, FailedJobs(), paths, lent)

        runner = self._run(begin())
        done = asyncio.run_coroutine_threadsafe(runner.run(wait), self._loop)
        running = Running(self._loop, runner, done, box)
        self._jobs.add(running)

        def ended(_: object) -> None:
            self._jobs.discard(running)
            box.put(None)

        done.add_done_callback(ended)
        if lent is not None and lent.is_cancelled:  # before `cancel` could find it
            running.cancel()
        return running

    def cancel(self, lent: LentHosts | None = None) -> None:
        """Has the jobs that run now end at their next step; may be called from any thread.

        With `lent`, the job that has those hosts alone, also where it is about to begin. Whoever
        iterates over their events gets `CancelledError`.
        """
        if lent is not None:
            lent.is_cancelled = True
        for running in list(self._jobs):
            if lent is None or running.lent is lent:
                running.cancel()

    def plan(
        self,
        request: GenerateRequest,
        placement: Placement | None = None,
        force_shard: bool = False,
    ) -> Plan:
        """What `generate` would do now, and every other way."""
        job = self._job(self.resolve(request), placement, force_shard, True)
        return plan_of(job, self.view)

    def adopt(self, faults: tuple[BackendFault, ...]) -> None:
        """Later jobs know of these backends that failed, and of no others."""
        self._loop.call_soon_threadsafe(self._pool.adopt, faults)

    @property
    def latest(self) -> MeshRecord:
        """The mesh's record, with the backends that have failed by now."""
        return replace(self.record, faults=self._pool.links.fallback.faults)

    def status(self) -> dict[int, messages.Status | str]:
        """Of each host by rank: what it says of itself, or why it does not answer."""

        async def ask() -> dict[int, messages.Status | str]:
            pool = self._pool
            statuses: dict[int, messages.Status | str] = dict(await pool.statuses())
            for member in self.record.members:
                reason = pool.reasons.get(member.rank, "It does not answer.")
                statuses.setdefault(member.rank, reason)
            return dict(sorted(statuses.items()))

        return self._run(ask())

    @property
    def view(self) -> MeshView:
        """The hosts that answer now, as the planner sees them."""
        return self._pool.links.view(self._run(self._pool.infos()).values())

    def close(self) -> None:
        """Cancels what runs and lets go of the agents; a mesh that was started by `connect` ends.

        Twice is harmless.
        """
        try:
            for running in list(self._jobs):
                running.stop()
            if self._is_open:
                self._run(self._pool.__aexit__())
                self._is_open = False
        finally:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # Within

    def _note_size(self, job: GenerationJob) -> None:
        """Hosts that can make such a picture alone get ready for the next one, once they are idle.

        By `data`: a ring that is up has made it already, or the plan has no use for one. Who was
        told of this size last is not asked again: a warm request pays for each message.
        """
        work = Workload.of(job.request, job.sizes)
        note = messages.NoteSize(work.weights, work.height, work.width)
        clients = dict(self._pool.clients)
        unaware = {k for k, client in clients.items() if self._noted.get(k) != (client, note)}
        if len(clients) < 2 or not unaware or work.low_memory:
            return
        view = self.view
        memory = Memory(work, view)
        needed = {k: memory.needed(k, "data", 1, 1) for k in view.ranks if k in unaware}
        fitting = [k for k, nbytes in needed.items() if memory.needs((k,), [nbytes])[0].fits]
        sized = {k: replace(note, memory_bytes=needed[k]) for k in fitting}
        self._run(self._pool.tell(sized))
        # Those for which it does not fit, too: they need no second look at this size.
        self._noted |= {rank: (clients[rank], note) for rank in unaware & set(view.ranks)}

    def _leave_makeshift(self, plans: Sequence[Planned]) -> None:
        """A ring that was made of what a loss had left is of no use to the job that comes next."""
        if plans and plans[0].hosts != plans[-1].hosts:
            self._run(self._pool.tell(dict.fromkeys(plans[-1].hosts, messages.LeaveRing())))

    def _job(
        self, resolved: Resolved, asked: Placement | None, force_shard: bool, keep_warm: bool
    ) -> GenerationJob:
        check_asked(asked, force_shard=force_shard)
        return GenerationJob(
            id=secrets.token_hex(8),
            secret=secrets.token_bytes(32),
            request=resolved.request,
            sizes=resolved.model.sizes,
            placement=asked,
            force_shard=force_shard,
            warm=self.keeps_warm or keep_warm,
            reader=resolved.reader_content,
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done in the loop's thread."""
        return self._thread.run(work)

    def _end(self) -> None:
        self._thread.close()
        self._close()
        self._forget()


def plan_of(job: GenerationJob, view: MeshView) -> Plan:
    """How a job would be done on these hosts."""
    return find_plan(
        job.request, view, job.sizes, placement=job.placement, force_shard=job.force_shard
    )


def _curve(keys: Keys) -> Callable[[], Dialer]:
    def dialer() -> Dialer:
        from fluxmesh.wire.transport.dialer import CurveDialer  # loads zmq

        return CurveDialer(keys)

    return dialer
