"""Takes requests in, keeps them in a fair line, and has them painted: what every face stands on.

Everything here lives in the server's event loop; looking up models and files happens in threads,
painting in a `Lane`. Jobs run side by side where hosts are free for them (`host_choice.py`), each
in a lane of its own. Each job tells its `EventLog`, and the faces follow that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh_coordinator.commands.generate import ReadyPrompt, Spread
from fluxmesh_coordinator.runtime.lent_hosts import HostBook, LentHosts
from fluxmesh_coordinator.server.catalogue import Catalogue
from fluxmesh_coordinator.server.metrics import Metrics
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.problems import ProblemError, problem_of
from fluxmesh_coordinator.server.queue.durations import Durations
from fluxmesh_coordinator.server.queue.earlier_jobs import EarlierJobs, kept_pictures
from fluxmesh_coordinator.server.queue.fair_queue import (
    FairQueue,
    Place,
    QueueBounds,
    WaitingRequest,
)
from fluxmesh_coordinator.server.queue.host_choice import UNKNOWN, Start, choose
from fluxmesh_coordinator.server.queue.journal import KEPT, Journal
from fluxmesh_coordinator.server.queue.lane import Lane, reason_of
from fluxmesh_coordinator.server.queue.resolver import RequestResolver
from fluxmesh_coordinator.server.queue.served_job import JobStage, ServedJob
from fluxmesh_coordinator.server.threads import of_size

log = logging.getLogger(__name__)
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{7,63}")
ENDING = "This server is ending; send the request again later."
SELDOM = 20.0  # times what a look takes, between two at hosts that are free while somebody waits


@dataclass(frozen=True)
class JobRow:
    """A job as everybody sees it."""

    job: ServedJob
    place: int  # 0: it is being painted
    seconds_left: float  # 0: nobody knows


class PaintingService:
    """The line and the lanes."""

    def __init__(
        self,
        catalogue: Catalogue,
        pictures: PictureFolder,
        journal: Journal,
        *,
        bounds: QueueBounds | None = None,
        lanes: Sequence[Lane] = (),
    ) -> None:
        """Without `lanes` they are on the mesh that is up, as many as jobs run side by side."""
        self.catalogue, self.pictures, self.journal = catalogue, pictures, journal
        self.metrics = Metrics()
        self.resolver = RequestResolver(catalogue)
        self.is_draining = False
        self._queue = FairQueue(bounds)
        self._durations = Durations()
        self._jobs: OrderedDict[str, ServedJob] = OrderedDict()
        self._lanes = list(lanes) or [Lane(pictures)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._running: dict[Lane, ServedJob | None] = dict.fromkeys(self._lanes)
        self._book: HostBook | None = None  # of the mesh on which a job began last
        self._is_held_up = False  # whether those in line wait for hosts although some are free
        earlier = EarlierJobs(journal, pictures)
        self.lost = earlier.lost  # by id: what the server before did not finish
        self._jobs.update(earlier.done)

    # Its life

    async def open(self) -> None:
        """Connects to the mesh, or begins one. Raises as `Mesh`."""
        loop = asyncio.get_running_loop()
        for lane in self._lanes:
            await loop.run_in_executor(lane.thread, lane.open)
        self.lane.painters.changed = functools.partial(self._wake_from_afar, loop)
        self._begin(self._dispatch())

    async def drain(self) -> None:
        """Takes nothing more in, tells those who wait, and returns when nothing runs."""
        self.is_draining = True
        for entry in self._queue.line():
            self._queue.remove(entry.id)
            job = self._jobs[entry.id]
            self._fail(job, ProblemError(503, ENDING, "ending", retry_after=30))
        for job in filter(None, list(self._running.values())):
            await job.events.over()

    def cancel_all(self) -> None:
        """Has what runs end at its next step."""
        for job in filter(None, list(self._running.values())):
            self.cancel(job)

    async def close(self) -> None:
        """Ends the lanes, and the mesh if it began one."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            await asyncio.to_thread(lane.close)
        await asyncio.to_thread(self.resolver.close)
        self.journal.close()

    # What the faces ask

    async def submit(self, asked: PaintRequest, client: str, id: str = "") -> ServedJob:
        """Accepts a request; one with the id of a job that there is already is that job.

        A job that has failed goes on, or that the server before did not finish, and so does one
        that is done and whose pictures somebody has removed since: what is there of it is not
        painted again.

        Raises `FluxmeshError` for a request that is wrong, and where the line is full.
        """
        fingerprint = await of_size(asked.nbytes, lambda: asked.fingerprint)
        known = self._repeated(id, fingerprint)
        if known is not None and await asyncio.to_thread(self._has_all, known):
            return known
        self._check_open()
        before = known or self._unfinished(id)
        earlier = before if before and before.fingerprint == fingerprint else None
        if earlier is not None:
            asked = replace(asked, seed=earlier.seed)  # it may have been drawn
        model, ready = await self.resolve(asked, client)
        kept: dict[int, str] = {}
        if earlier is not None:
            kept = await asyncio.to_thread(kept_pictures, self.pictures, earlier, ready)
        self._check_open()  # nobody would paint it now
        again = self._repeated(id, fingerprint)  # it may have come twice meanwhile
        if again is not None and again is not known:
            return again
        job = ServedJob.of(
            ready,
            id=id or secrets.token_hex(12),
            client=client,
            fingerprint=fingerprint,
            model=model,
            spread=Spread(placement=asked.placement),
            previews=asked.previews,
        )
        if earlier is not None and kept:
            job.accepted = earlier.accepted  # its pictures are named by it
            job.keep(kept)
        seconds = self._durations.guess(job.model, job.work)
        self._queue.add(
            WaitingRequest(id=job.id, client=client, seconds=seconds, nbytes=job.nbytes),
            self._retry_after(),
        )
        self._jobs[job.id] = job
        self.lost.pop(job.id, None)
        self.journal.accepted(job.record)
        self._tell_places()
        self._wake.set()
        return job

    async def resolve(self, asked: PaintRequest, client: str) -> tuple[str, ReadyPrompt]:
        """The model's name and the request as a mesh takes it. Raises `FluxmeshError`.

        It counts as one of the client's requests for as long as it takes.
        """
        with self._queue.coming(client, self._retry_after()):
            return await self.resolver.resolve(asked)

    def job(self, id: str) -> ServedJob:
        """Raises `ProblemError` where none of that id is known (any more)."""
        job = self._jobs.get(id) or self.lost.get(id)
        if job is None:
            raise ProblemError(404, "There is no job of that id.", "no_such_job")
        return job

    def cancel(self, job: ServedJob) -> None:
        """Has a job end: at once in line, at its next step where it runs. Twice is harmless."""
        if job.stage == "queued" and self._queue.remove(job.id):
            self._end(job, "cancelled", {})
            self._tell_places()
        elif job.stage == "running":
            job.is_cancelled = True
            for lane, running in self._running.items():
                if running is job:
                    lane.cancel(job)

    def places(self) -> dict[str, Place]:
        """Where each of those that wait stands."""
        now = time.monotonic()
        seconds = [job.seconds_left(now) or None for job in self.running()]
        has_room = self._book is not None and bool(self._book.free) and not self._is_held_up
        return self._queue.places([*seconds, *([0.0] if has_room else [])])

    def rows(self) -> list[JobRow]:
        """All jobs that are not over: those that run, then those that wait, in their order."""
        now = time.monotonic()
        running = [JobRow(job, 0, job.seconds_left(now)) for job in self._running.values() if job]
        waiting = [
            JobRow(self._jobs[id], place.number, place.seconds_left)
            for id, place in self.places().items()
        ]
        return running + waiting

    def running(self, client: str = "") -> list[ServedJob]:
        """Those that are being painted, of one client or of all."""
        jobs = [job for job in self._running.values() if job]
        return [job for job in jobs if not client or job.client == client]

    @property
    def lane(self) -> Lane:
        """The first one, for who asks about the mesh."""
        return self._lanes[0]

    # Within

    def _check_open(self) -> None:
        if self.is_draining:
            raise ProblemError(503, ENDING, "ending", retry_after=30)

    def _repeated(self, id: str, fingerprint: str) -> ServedJob | None:
        if not id:
            return None
        if JOB_ID.fullmatch(id) is None:
            raise ProblemError(
                400, "`id` of a job is 8 to 64 letters, digits, dots, hyphens or underscores.",
                "invalid_value", setting="id",
            )  # fmt: skip
        job = self._jobs.get(id)
        if job is not None and (job.is_cancelled or job.stage in ("cancelled", "failed")):
            return None  # its connection broke, it may be: who asks again wants it after all
        if job is not None and job.fingerprint != fingerprint:
            raise ProblemError(
                409, "There is a job of that `id` that asked for something else.", "conflict",
                setting="id",
            )  # fmt: skip
        return job

    def _unfinished(self, id: str) -> ServedJob | None:
        """The job of that id that has failed here, or with the server before."""
        job = self._jobs.get(id)
        return job if job is not None and job.stage == "failed" else self.lost.get(id)

    def _has_all(self, job: ServedJob) -> bool:
        """Whether a job that is done has its pictures still; any other has them coming. Blocks."""
        return job.stage != "done" or all(map(self.pictures.has, job.names))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wake_from_afar(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hosts have come free, in some other thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(self._wake.set)

    async def _dispatch(self) -> None:
        """Has whoever is next painted, side by side where there are hosts, for ever."""
        while True:
            self._wake.clear()
            looked = time.monotonic()
            try:
                if await self._start_next():
                    continue
            except Exception:  # else nobody would ever be painted for again
                log.exception("nobody could be chosen to be next")
                await asyncio.sleep(DEADLINES.look)
                continue
            # What a job takes is a guess: it is looked at again while somebody waits.
            pause = max(DEADLINES.look, SELDOM * (time.monotonic() - looked))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause if self._is_held_up else None):
                    await self._wake.wait()

    async def _start_next(self) -> bool:
        """Begins one of those in line. False: nobody can begin now."""
        line = [self._jobs[entry.id] for entry in self._queue.line()]
        if self.is_draining or not line:
            self._is_held_up = False
            return False
        now = time.monotonic()
        running = [(job.lent, job.seconds_left(now) or UNKNOWN) for job in self.running()]
        book, start = await asyncio.to_thread(self._look, line, running)
        self._book = book
        self._is_held_up = start is None and bool(book.free)
        if start is None or self.is_draining:
            return False
        lent = book.lend(start.ranks)
        if lent.ranks != start.ranks or not self._take(start.job):
            lent.give_back()  # a job that runs took them meanwhile, or it was cancelled
            return True
        if start.overtakes is not None:
            start.overtakes.overtaken += 1
        job, lane = start.job, self._idle_lane()
        job.stage, job.began, job.lent = "running", time.monotonic(), lent
        job.expected = self._durations.guess(job.model, job.work)
        self._running[lane] = job
        self._begin(self._work(lane, job))  # first: it has hosts, and must come to an end
        self._tell_places()
        return True

    def _take(self, job: ServedJob) -> bool:
        """Out of the line. False: it stands there no more, though its id may, sent once more."""
        return self._jobs.get(job.id) is job and self._queue.take(job.id) is not None

    def _look(
        self, line: list[ServedJob], running: list[tuple[LentHosts | None, float]]
    ) -> tuple[HostBook, Start | None]:
        """Who has the hosts, and who begins next; `running` has their seconds left. Blocks."""
        try:
            book = self.lane.book()
        except FluxmeshError:  # the job itself tells why there is no mesh
            alone = HostBook([0])
            return alone, None if running else Start(line[0], alone.free)
        free = book.free
        if book.is_awaited:
            return book, None
        busy = {
            rank: seconds
            for lent, seconds in running
            if lent is not None and lent.book is book
            for rank in lent.ranks
        }
        ways = functools.cache(lambda: self.lane.ways(busy))
        try:
            return book, choose(line, free, busy, lambda job, ranks: ways()(job, ranks))
        except Exception:
            log.exception("no choice of hosts")
            return book, None if busy else Start(line[0], free)

    def _idle_lane(self) -> Lane:
        lane = next((lane for lane, job in self._running.items() if job is None), None)
        if lane is None:
            lane = self.lane.beside()
            self._lanes.append(lane)
        return lane

    async def _work(self, lane: Lane, job: ServedJob) -> None:
        """Paints a job to its end, whatever that is."""
        try:
            await self._paint(lane, job)
        except Exception:  # nobody who waits for it would be told
            log.exception("job %s did not end as it should", job.id)
            self._give_up(job)
        finally:
            self._running[lane] = None
            if job.lent is not None:
                job.lent.give_back()
            self._wake.set()

    async def _paint(self, lane: Lane, job: ServedJob) -> None:
        loop = asyncio.get_running_loop()

        def tell(kind: str, data: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._hear, job, kind, data)

        try:
            await loop.run_in_executor(lane.thread, lane.paint, job, tell)
            await asyncio.sleep(0)  # what it told last is heard first
        except CancelledError:
            self._end(job, "cancelled", {})
        except Exception as error:
            if job.is_cancelled:
                self._end(job, "cancelled", {})
                return
            if reason_of(error) is not error:
                log.exception("job %s failed", job.id)
            self._fail(job, problem_of(reason_of(error)))
        else:
            if job.is_cancelled:
                self._end(job, "cancelled", {})
            else:
                self._end(job, "done", {"pictures": job.names})

    def _hear(self, job: ServedJob, kind: str, data: dict[str, Any]) -> None:
        """What a lane tells, in the event loop."""
        if kind == "step":
            job.first_step = job.first_step or time.monotonic()
            job.steps_done[data["image"]] = data["step"]
            data["seconds_left"] = round(job.seconds_left(time.monotonic()), 2)
        elif kind == "planned":
            job.expected = time.monotonic() - job.began + data["seconds"]
        elif kind == "picture":
            job.pictures[data["image"]] = data["name"]
            job.steps_done[data["image"]] = job.steps
            self.metrics.add("fluxmesh_pictures_total")
        elif kind == "model":
            job.has_loaded = True
        elif kind == "host":
            self.metrics.add("fluxmesh_lost_hosts_total")
        if "text" in data:
            data["text"] = self.catalogue.without_paths(data["text"])
        job.events.append(kind, data)

    def _fail(self, job: ServedJob, problem: ProblemError) -> None:
        said = self.catalogue.without_paths(str(problem))
        job.failure = problem.saying(said)
        fields = {"message": said, "setting": problem.setting or None}
        self._end(job, "failed", {**fields, "code": problem.code})

    def _give_up(self, job: ServedJob) -> None:
        """Tells who waits for a job that it has failed, whatever else is broken."""
        if not job.events.is_over:
            problem = problem_of(reason_of(RuntimeError()))
            job.stage, job.ready, job.failure = "failed", None, problem
            fields = {"message": str(problem), "setting": None, "code": problem.code}
            job.events.append("error", fields)

    def _end(self, job: ServedJob, stage: JobStage, data: dict[str, Any]) -> None:
        now = time.monotonic()
        if job.stage == "running" and stage == "done":
            if not job.has_loaded:
                self._durations.learn(job.model, job.work, now - job.began)
            first = job.first_step or now
            for phase, seconds in (
                ("queued", job.began - job.arrived),
                ("preparing", first - job.began),
                ("painting", now - first),
            ):
                self.metrics.add("fluxmesh_phase_seconds_total", seconds, phase=phase)
        if stage == "cancelled" and not job.pictures:  # the events forget it now
            seen = job.events.latest("preview")
            job.last_preview = seen.data if seen else None
        job.stage, job.ready = stage, None
        self.metrics.add("fluxmesh_jobs_total", outcome=stage)
        job.events.append({"failed": "error"}.get(stage, stage), data)
        if self._jobs.get(job.id) is job:  # else it was asked for again, and that one is open
            self.journal.ended(job.id, is_done=stage == "done")
        over = [id for id, each in self._jobs.items() if each.events.is_over]
        for id in over[: max(0, len(over) - KEPT)]:
            del self._jobs[id]

    def _tell_places(self) -> None:
        """Those that wait hear that they stand elsewhere now."""
        for id, place in self.places().items():
            events = self._jobs[id].events
            said = events.latest("queued")
            seconds = round(place.seconds_left, 2)
            if said is None or said.data["place"] != place.number:
                events.append("queued", {"place": place.number, "seconds_left": seconds})

    def _retry_after(self) -> float:
        now = time.monotonic()
        return min((job.seconds_left(now) for job in self._running.values() if job), default=1.0)
