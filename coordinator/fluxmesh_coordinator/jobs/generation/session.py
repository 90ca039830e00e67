"""The life of a job that paints: plan, rings, text, steps, pictures.

PURE; on `jobs/session.py`, which has what all jobs share. `state.py` holds where the job stands,
`dispatch.py` gives out work.

All placements are one mechanism. Every unit of work can be sent again to anyone, because all that
it needs is here: text features, noise (drawn from the seed), and each image's latents after its
last acknowledged step, which therefore never runs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fluxmesh import events
from fluxmesh.cluster.snapshot import HostInfo, Timings
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.images import composite
from fluxmesh.planning.plan import Option, Plan
from fluxmesh.request import FilledRequest
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.dispatch import GenerationDispatch
from fluxmesh_coordinator.jobs.generation.observer import NOTHING, Observer
from fluxmesh_coordinator.jobs.generation.state import GenerationJob, GenerationState
from fluxmesh_coordinator.jobs.host import HostState, QueuedWork
from fluxmesh_coordinator.jobs.model_check import other_reader
from fluxmesh_coordinator.jobs.progress import RemainingTime
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.types import Learn, LeasedHost, LetGo


class GenerationSession(JobSession[HostState]):
    """One request for pictures. The plan says which hosts are wanted, so it never grows."""

    state: GenerationState

    def __init__(self, job: GenerationJob, deadlines: Deadlines = DEADLINES) -> None:
        super().__init__(GenerationState(job), deadlines)
        self._dispatch = GenerationDispatch(self.state, self.send)
        self._observer = Observer(self.state)
        self._peaks: dict[str, int] = {}
        self._remaining = RemainingTime()
        self._proposed: Plan | None = None  # why hosts were leased, until it is told

    # Hooks

    def send(self, host: HostState, message: messages.Changing) -> None:
        if isinstance(message, messages.ModelWork):
            message = replace(message, memory_bytes=self.state.memory_on(host.rank))
        super().send(host, message)
        self._observer.sent(host, message, self.now)

    def new_host(self, leased: LeasedHost) -> HostState:
        info = leased.info.turned_to(self.state.work.weights)
        return HostState(replace(leased, info=info), self.now, self.deadlines)

    def propose(self, hosts: Sequence[HostInfo]) -> Plan:
        self._proposed = self.state.find(hosts)
        return self._proposed

    def begun(self) -> None:
        self.state.needs_plan = True
        self._observer.begin(self.now)

    def returned(self, host: HostState) -> None:
        """It helps with whole images, or makes a new plan possible."""
        state = self.state
        if state.option is None:
            state.needs_plan = True
        elif not state.needs_plan and state.phases and not state.in_ring:
            state.join_phase(host.rank)

    def go_on(self) -> None:
        state = self.state
        if state.needs_plan and not state.is_killing:
            self._plan()
        if state.images.is_complete:
            for phase in ("denoise", "decode"):
                self.tell(events.Peak(phase, self._peaks.get(phase, 0)))
            self._learn(self._observer.finished())
            self.finish()
        elif state.option is not None and not state.needs_plan:
            self._dispatch.go_on()
            self._let_go()

    def reported(self, host: HostState, report: messages.Report, unit: QueuedWork | None) -> None:
        match report:
            case messages.Joined():
                self._learn(self._observer.joined(self.now))
            case messages.RingTimed():
                self._learn(self._observer.ring_timed(host, report))
            case messages.LoadProgress():
                self._observer.prepares()
            case messages.Loaded():
                host.is_loaded = not host.has(messages.Load)
                self.state.holds(host, report.holding)
                self.check_model(host, report.holding.content)
            case messages.TextEncoded():
                self._encoded(host, report, unit)
            case messages.SourceEncoded():
                self.check_model(host, report.content)
                self.state.source = report.latents
            case messages.PicturesEncoded():
                self.check_model(host, report.content)
                self._check_reader(host, report.reader)
                self.state.conditions = self.state.conditions or report.conditions
            case messages.Stepped():
                self._stepped(host, report, unit)
            case messages.Pictured():
                self._pictured(host, report, unit)

    @property
    def title(self) -> str:
        request = self.state.job.request
        images = "1 image" if request.n_images == 1 else f"{request.n_images} images"
        return f"{images}, {request.height}x{request.width}"

    def progress(self, rank: int, now: float) -> messages.JobProgress:
        table = self.state.images
        together = self.state.has_ring_with(rank) and self.state.in_ring
        own = [image for image in table.images if image.painter == rank]
        shared = [image for image in table.images if image.painter is not None and together]
        at = next(iter((*own, *shared)), None)
        done, total = table.steps_done, len(table.images) * table.steps
        return messages.JobProgress(
            unit="image",
            done=sum(image.is_out for image in table.images),
            total=len(table.images),
            step=at.step if at else 0,
            steps=table.steps if at else 0,
            seconds=self._remaining.left(done, total, now),
        )

    # Within

    def _let_go(self) -> None:
        """Others may have a host that has read the prompt, and does nothing else."""
        rank = self.state.spare_reader
        if rank is not None:
            del self.state.hosts[rank]
            self.instruct(LetGo(rank))

    def _check_reader(self, host: HostState, content: str) -> None:
        """Ends the job where a host reads references with other files than its picture tells of:
        on each mesh that would be another picture."""
        job = self.state.job
        if job.reader and content and content != job.reader:
            self.end(other_reader(job.request.redux, host.rank, host.info.name))

    def _learn(self, news: Timings) -> None:
        if news != NOTHING:
            self.instruct(Learn(news))

    def _plan(self) -> None:
        settled = self.state.plan()
        option = settled.winner
        if option is None:
            self.stuck(settled.reason)
        elif not self.state.images.is_complete:
            self._remaining.predicted(option.seconds, self.now)
            self.tell(
                events.Planned(
                    placement=option.name,
                    hosts=option.ranks,
                    seconds=option.seconds,
                    reason=self._reason(settled, option),
                    notice=settled.notice,
                )
            )

    def _reason(self, settled: Plan, option: Option) -> str:
        """Why it is done so. The plan by which hosts were leased knows what more would take."""
        proposed, self._proposed = self._proposed, None
        way = None if proposed is None else proposed.winner
        if proposed is None or way is None or (way.name, way.ranks) != (option.name, option.ranks):
            return settled.reason
        return proposed.reason

    def _encoded(
        self, host: HostState, report: messages.TextEncoded, unit: QueuedWork | None
    ) -> None:
        self.check_model(host, report.content)
        self._learn(self._observer.encoded(host, report))
        if unit is not None and isinstance(unit.message, messages.Encode) and not report.cached:
            message = unit.message
            self.state.has_read(host, encoders_stay=message.stay and not message.makes_room)
            if message.makes_room:  # also what was loaded since that was sent
                host.is_loaded = False
        if self.state.features is None:
            self.state.features, self.state.read_by = report.features, host.rank
            self.tell(encoded(self.state.job.request, report))
            self.tell(events.Peak("text", report.peak_bytes))

    def _stepped(self, host: HostState, report: messages.Stepped, unit: QueuedWork | None) -> None:
        if unit is None or not isinstance(unit.message, messages.Paint):
            return
        paint, begun = unit.message, unit.since
        self._observer.stepped(host, paint, report, self.now, begun)
        host.stepped(paint, report.seconds, self.now, begun=begun, reused=report.reused)
        self.recovery.worked(host.rank)
        self._peak("denoise", report.peak_bytes)
        images = self.state.images
        if report.latents is not None and images.acknowledge(
            report.image,
            report.step,
            report.latents,
            report.seconds,
            paint.placement,
            reused=report.reused,
        ):
            self.recovery.advanced()
            self._remaining.stepped(images.steps_done, self.now)
            self._tell_step(host, report)
        if report.step < images.steps:
            return
        if paint.placement == "data" and not self.state.is_ending:
            for group in images.ready():
                if report.image in group.images:
                    self._dispatch.decode(host, group)
                    break

    def _tell_step(self, host: HostState, report: messages.Stepped) -> None:
        preview, source = report.preview, self.state.job.request.source
        if preview is not None and source is not None:
            preview = composite(preview, source)
        self.tell(
            events.Step(
                image=report.image,
                step=report.step,
                steps=self.state.images.steps,
                seconds=report.seconds,
                preview=preview,
                host=host.rank,
                reused=report.reused,
            )
        )
        if report.projected is not None:
            self.tell(
                events.Preview(
                    image=report.image,
                    step=report.step,
                    steps=self.state.images.steps,
                    pixels=report.projected,
                    host=host.rank,
                )
            )

    def _pictured(
        self, host: HostState, report: messages.Pictured, unit: QueuedWork | None
    ) -> None:
        self._peak("decode", report.peak_bytes)
        if unit is not None and isinstance(unit.message, messages.Decode):
            self._observer.pictured(unit.message, report, self.now, unit.since)
        images, request = self.state.images, self.state.job.request
        if not images.pictured(report.image):
            return
        image, pixels = images.images[report.image], report.pixels
        if request.source is not None:
            pixels = composite(pixels, request.source)
        self.tell(
            events.Picture(
                image=image.index,
                seed=request.seed_of(image.index),
                pixels=pixels,
                seconds=image.seconds + report.seconds,
                host=host.rank,
                placement=image.placement,
                steps=images.steps,
                reused=image.reused,
            )
        )

    def _peak(self, phase: str, nbytes: int) -> None:
        self._peaks[phase] = max(nbytes, self._peaks.get(phase, 0))


def encoded(request: FilledRequest, report: messages.TextEncoded) -> events.Encoded:
    """What is told of a request's texts once they are read."""
    cut, negative_cut = report.cut, report.negative_cut
    return events.Encoded(
        request.prompt,
        report.seconds,
        report.cached,
        tokens=cut.tokens if cut else 0,
        kept=cut.kept if cut else 0,
        dropped=request.prompt[cut.start :] if cut else "",
        negative_tokens=negative_cut.tokens if negative_cut else 0,
        negative_kept=negative_cut.kept if negative_cut else 0,
        negative_dropped=(request.negative or "")[negative_cut.start :] if negative_cut else "",
        content=report.content,
        revision=report.revision,
    )
