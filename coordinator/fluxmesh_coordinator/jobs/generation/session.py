"""One job's life on a mesh: plan, rings, text, steps, pictures, and what to do when a host dies.

PURE: events go in (`jobs.Input`), instructions come out (`jobs.Instruction`), time is an argument.
`mesh.py` stands above it and does what it says; `course.py` holds where the job stands,
`dispatch.py` gives out work, `recovery.py` takes losses.

All placements are one mechanism. Every unit of work can be sent again to anyone, because all that
it needs is here: text features, noise (drawn from the seed), and each image's latents after its
last acknowledged step, which therefore never runs twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fluxmesh import events
from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.images import composite
from fluxmesh.planning.plan import Plan
from fluxmesh.wire import messages
from fluxmesh_coordinator import failures
from fluxmesh_coordinator.jobs.generation.dispatch import Dispatch
from fluxmesh_coordinator.jobs.generation.state import Course
from fluxmesh_coordinator.jobs.host import SILENCE, Worker
from fluxmesh_coordinator.jobs.recovery import Recovery
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Back,
    Finished,
    Gone,
    Input,
    Instruction,
    Job,
    LeasedHost,
    Links,
    Reported,
    Send,
    Stop,
    Stuck,
    Tell,
    Tick,
)


class Session:
    """One job: `begin` it with leased hosts, then `handle` what happens until `Finished`."""

    def __init__(self, job: Job) -> None:
        self.course = Course.of(job)
        self._dispatch = Dispatch(self.course, self._send)
        self._recovery = Recovery(self.course, self._send, self._tell, self._end)
        self._now = 0.0
        self._out: list[Instruction] = []
        self._peaks: dict[str, int] = {}
        self._is_ending = False
        self._error: FluxmeshError | None = None  # how it ends
        self._cancel_by = 0.0  # then engines that do not let go are killed
        self._is_over = False

    # In and out

    @property
    def id(self) -> str:
        """The job's."""
        return self.course.job.id

    @property
    def grows(self) -> bool:
        """No: the plan says which hosts are wanted."""
        return False

    def begin(self, hosts: Sequence[LeasedHost], links: Links, now: float) -> list[Instruction]:
        """Starts, or goes on after `Stuck`, with these hosts and no others."""
        self._now = now
        self.course.links = links
        self.course.workers = {
            leased.rank: Worker(leased, now)
            for leased in hosts
            if self._recovery.takes(leased.rank)
        }
        self.course.needs_plan = True
        return self._go_on()

    def handle(self, event: Input, now: float) -> list[Instruction]:
        """What is to be done about `event`; nothing more comes after `Finished`."""
        if self._is_over:
            return []
        self._now = now
        match event:
            case Answered():
                self._answered(event)
            case Reported():
                self._reported(event)
            case Gone():
                self._gone(event.rank, event.reason, event.counts)
            case Back():
                self._back(event.host)
            case Stop():
                self._end(CancelledError("Cancelled."))
            case Tick():
                self._tick()
        return self._go_on()

    def find(self, hosts: Sequence[HostInfo], links: Links) -> Plan:
        """How what is left would be done by these hosts; those that failed too often are left
        out."""
        self.course.links = links
        return self.course.find([host for host in hosts if self._recovery.takes(host.rank)])

    def has_given_up(self, ranks: Iterable[int]) -> bool:
        """Whether all of these hosts failed too often to be used again."""
        return not any(self._recovery.takes(rank) for rank in ranks)

    def _go_on(self) -> list[Instruction]:
        course = self.course
        if not self._is_ending and course.needs_plan and not course.is_killing:
            self._plan()
        if self._is_ending:
            self._wind_down()
        elif course.album.is_complete:
            self._finish()
        elif course.option is not None and not course.needs_plan:
            self._dispatch.go_on()
        out, self._out = self._out, []
        return out

    def _send(self, worker: Worker, message: messages.Changing) -> None:
        if isinstance(message, messages.Work | messages.Join):
            worker.put(message, self._now)
        self._out.append(Send(worker.rank, message))

    def _tell(self, event: events.Event) -> None:
        self._out.append(Tell(event))

    def _plan(self) -> None:
        found = self.course.plan()
        option = found.winner
        if option is None:
            self._out.append(Stuck(found.reason))
        elif not self.course.album.is_complete:
            self._tell(events.Planned(option.name, option.ranks, option.seconds, found.reason))

    # What agents say

    def _answered(self, event: Answered) -> None:
        worker, request, answer = self.course.workers.get(event.rank), event.request, event.answer
        if worker is None or getattr(request, "fence", None) != worker.fence:
            return
        if isinstance(request, messages.Kill):
            if request.epoch != worker.epoch:
                return
            worker.killed = None
            if isinstance(answer, messages.Refused):
                self._gone(event.rank, answer.text)
        elif isinstance(answer, messages.Refused):
            if getattr(request, "epoch", worker.epoch) == worker.epoch:
                self._refused(worker, answer)
        elif isinstance(request, messages.AskPorts) and isinstance(answer, messages.Ports):
            ring = self.course.ring
            if ring is not None and not ring.is_told and worker.rank in ring.ranks:
                again = ring.answered(worker.rank, request.ip, answer.ports, self.course.workers)
                for rank, message in again:
                    self._send(self.course.workers[rank], message)

    def _refused(self, worker: Worker, answer: messages.Refused) -> None:
        if answer.code == "fence":
            self._gone(worker.rank, answer.text)
        else:
            self._failed(worker, failures.REFUSALS.get(answer.code, ""), answer.text, fatal=False)

    def _reported(self, event: Reported) -> None:
        worker, report = self.course.workers.get(event.rank), event.report
        if worker is None:
            return
        if isinstance(report, messages.Lost):
            self._gone(event.rank, report.reason)
            return
        if getattr(report, "epoch", worker.epoch) != worker.epoch:
            return  # left over from an engine that is gone
        if getattr(report, "job", "") not in ("", self.course.job.id):
            return
        now = self._now
        worker.heard(report, now)
        match report:
            case messages.Joined():
                worker.done(messages.Join, now)
                if self.course.ring is not None:
                    self.course.ring.joined.add(worker.rank)
            case messages.Progress():
                part, done, total = report.component, report.done_bytes, report.total_bytes
                self._tell(events.Loading(part, done, total, worker.rank))
            case messages.Loaded():
                worker.done(messages.Load, now)
                worker.is_loaded = not worker.has(messages.Load)
                self.course.holds(worker, report.holding)
                self._holds(worker, report.holding.content)
            case messages.Encoded():
                self._encoded(worker, report)
            case messages.SourceEncoded():
                worker.done(messages.EncodeSource, now)
                self.course.source = report.latents
            case messages.Stepped():
                self._stepped(worker, report)
            case messages.Pictured():
                self._pictured(worker, report)
            case messages.Cancelled():
                worker.line.clear()
            case messages.Failed():
                self._failed(worker, report.kind, report.text, fatal=report.fatal)

    def _holds(self, worker: Worker, content: str) -> None:
        """Before a ring computes anything, all its hosts have told what they hold."""
        error = self.course.contents.hear(worker.rank, worker.info.name, content)
        if error is not None:
            self._end(error)

    def _encoded(self, worker: Worker, report: messages.Encoded) -> None:
        worker.done(messages.Encode, self._now)
        self._holds(worker, report.content)
        if self.course.features is None:
            self.course.features = report
            prompt = self.course.job.request.prompt
            self._tell(events.Encoded(prompt, report.seconds, report.cached))
            self._tell(events.Peak("text", report.peak_bytes))

    def _stepped(self, worker: Worker, report: messages.Stepped) -> None:
        paint = worker.find(messages.Paint, report.image)
        if paint is None:
            return
        worker.stepped(paint, report.seconds, self._now, reused=report.reused)
        self._recovery.worked(worker.rank)
        self._peak("denoise", report.peak_bytes)
        album, request = self.course.album, self.course.job.request
        if report.latents is not None and album.acknowledge(
            report.image,
            report.step,
            report.latents,
            report.seconds,
            paint.placement,
            reused=report.reused,
        ):
            self._recovery.moved()
            shown = report.preview
            if shown is not None and request.source is not None:
                shown = composite(shown, request.source)
            told = (report.image, report.step, album.steps, report.seconds, shown, worker.rank)
            self._tell(events.Step(*told, reused=report.reused))
        if report.step < album.steps:
            return
        worker.done(messages.Paint, self._now, report.image)
        if paint.placement == "data" and not self._is_ending:
            for group in album.ready():
                if report.image in group.images:
                    self._dispatch.decode(worker, group)
                    break

    def _pictured(self, worker: Worker, report: messages.Pictured) -> None:
        self._peak("decode", report.peak_bytes)
        decode = worker.find(messages.Decode, report.image)
        if decode is not None and report.image == decode.images[-1]:
            worker.done(messages.Decode, self._now, report.image)
        album, request = self.course.album, self.course.job.request
        if not album.pictured(report.image):
            return
        image, pixels = album.images[report.image], report.pixels
        if request.source is not None:
            pixels = composite(pixels, request.source)
        seed, seconds = request.seed_of(image.index), image.seconds + report.seconds
        told = (image.index, seed, pixels, seconds, worker.rank, image.placement)
        self._tell(events.Picture(*told, album.steps, image.reused))

    def _peak(self, phase: str, nbytes: int) -> None:
        self._peaks[phase] = max(nbytes, self._peaks.get(phase, 0))

    # What goes wrong

    def _failed(self, worker: Worker, kind: str, text: str, *, fatal: bool) -> None:
        if not self._is_ending:
            self._recovery.failed(worker, kind, text, fatal, self._now)
            return
        worker.line.clear()

    def _gone(self, rank: int, reason: str, counts: bool = True) -> None:
        if not self._is_ending:
            self._recovery.gone(rank, reason, self._now, counts=counts)
            return
        self.course.workers.pop(rank, None)

    def _back(self, leased: LeasedHost) -> None:
        """A host returns: it helps with whole images, or makes a new plan possible."""
        course, rank = self.course, leased.rank
        if self._is_ending or rank in course.workers or not self._recovery.takes(rank):
            return
        course.workers[rank] = Worker(leased, self._now)
        if course.option is None:
            course.needs_plan = True
        elif not course.needs_plan and course.phases and not course.in_ring:
            course.join_phase(rank)

    def _tick(self) -> None:
        """Finds who is overdue."""
        for rank, worker in list(self.course.workers.items()):
            reason = worker.overdue(self._now) if rank in self.course.workers else ""
            if not reason:
                continue
            if worker.killed is not None:
                self._gone(rank, reason)
            elif not self._is_ending:
                self._recovery.overdue(worker, reason, self._now)

    # The end

    def _finish(self) -> None:
        for phase in ("denoise", "decode"):
            self._tell(events.Peak(phase, self._peaks.get(phase, 0)))
        self._is_over = True
        self._out.append(Finished())

    def _end(self, error: FluxmeshError) -> None:
        """Cancels what runs; `Finished` with `error` when all hosts have let go."""
        if self._is_ending:
            return
        self._is_ending, self._error = True, error
        self._cancel_by = self._now + SILENCE
        for worker in self.course.workers.values():
            if worker.killed is not None or not worker.line:
                continue
            if worker.has(messages.Join):  # a ring that forms hears of no cancel
                self._recovery.kill(worker, worker.epoch + 1, self._now)
                continue
            for unit in worker.line:
                if isinstance(unit.message, messages.Paint):
                    limit = self._now + worker.step_deadline(unit.message)
                    self._cancel_by = max(self._cancel_by, limit)
            self._send(worker, messages.Cancel(worker.fence, self.course.job.id))

    def _wind_down(self) -> None:
        workers = list(self.course.workers.values())
        for worker in workers:
            if worker.line and worker.killed is None and self._now >= self._cancel_by:
                self._recovery.kill(worker, worker.epoch + 1, self._now)
        if all(worker.is_free for worker in workers):
            self._is_over = True
            self._out.append(Finished(self._error))
