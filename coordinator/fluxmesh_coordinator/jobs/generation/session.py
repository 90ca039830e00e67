"""The life of a job that paints: plan, rings, text, steps, pictures.

PURE; on `jobs/session.py`, which has what all jobs share. `state.py` holds where the job stands,
`dispatch.py` gives out work.

All placements are one mechanism. Every unit of work can be sent again to anyone, because all that
it needs is here: text features, noise (drawn from the seed), and each image's latents after its
last acknowledged step, which therefore never runs twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from fluxmesh import events
from fluxmesh.cluster.snapshot import HostInfo, Timings
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.images import composite
from fluxmesh.planning.plan import Plan
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.dispatch import GenerationDispatch
from fluxmesh_coordinator.jobs.generation.observer import NOTHING, Observer
from fluxmesh_coordinator.jobs.generation.state import GenerationJob, GenerationState
from fluxmesh_coordinator.jobs.host import HostState, QueuedWork
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.types import Learn, LeasedHost


class GenerationSession(JobSession[HostState]):
    """One request for pictures. The plan says which hosts are wanted, so it never grows."""

    state: GenerationState

    def __init__(self, job: GenerationJob, deadlines: Deadlines = DEADLINES) -> None:
        super().__init__(GenerationState(job), deadlines)
        self._dispatch = GenerationDispatch(self.state, self.send)
        self._observer = Observer(self.state)
        self._peaks: dict[str, int] = {}

    # Hooks

    def send(self, host: HostState, message: messages.Changing) -> None:
        super().send(host, message)
        self._observer.sent(host, message, self.now)

    def new_host(self, leased: LeasedHost) -> HostState:
        return HostState(leased, self.now, self.deadlines)

    def propose(self, hosts: Sequence[HostInfo]) -> Plan:
        return self.state.find(hosts)

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
                self._encoded(host, report)
            case messages.SourceEncoded():
                self.state.source = report.latents
            case messages.Stepped():
                self._stepped(host, report, unit)
            case messages.Pictured():
                self._pictured(host, report, unit)

    # Within

    def _learn(self, news: Timings) -> None:
        if news != NOTHING:
            self.instruct(Learn(news))

    def _plan(self) -> None:
        settled = self.state.plan()
        option = settled.winner
        if option is None:
            self.stuck(settled.reason)
        elif not self.state.images.is_complete:
            self.tell(
                events.Planned(
                    placement=option.name,
                    hosts=option.ranks,
                    seconds=option.seconds,
                    reason=settled.reason,
                    notice=settled.notice,
                )
            )

    def _encoded(self, host: HostState, report: messages.TextEncoded) -> None:
        self.check_model(host, report.content)
        if self.state.features is None:
            self.state.features = report.features
            prompt = self.state.job.request.prompt
            self.tell(events.Encoded(prompt, report.seconds, report.cached))
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
