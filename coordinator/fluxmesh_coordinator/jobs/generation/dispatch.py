"""What every host is given next: rings, weights, prompt, images, decodes. Pure.

Between `course.py` (where the job stands) and `session.py`, which calls `Dispatch.go_on` after all
that happens. It looks at nothing but the state, so that after a loss the same code sends again
whatever is missing.
"""

from __future__ import annotations

from fluxmesh.planning.plan import Phase
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.images import Group, Image
from fluxmesh_coordinator.jobs.generation.state import Course, Send
from fluxmesh_coordinator.jobs.host import Worker
from fluxmesh_coordinator.jobs.ring import Ring


class Dispatch:
    """Gives out work, through `send`."""

    def __init__(self, course: Course, send: Send) -> None:
        self.course, self.send = course, send

    def go_on(self) -> None:
        """Sends all that can be sent now."""
        course = self.course
        self._next_phase()
        if course.in_ring and not self._form_ring():
            return
        if course.job.request.preload:
            self._load()
            self._encode()
        else:  # where memory is short, the encoders have it first and leave
            self._encode()
            self._load()
        if course.in_ring:
            self._paint_together()
        else:
            self._paint_apart()

    def decode(self, worker: Worker, group: Group) -> None:
        """Has a host decode images that are painted."""
        course = self.course
        group.decoder = worker.rank
        latents = course.album.latents_of(group)
        size = (course.work.height, course.work.width)
        self.send(worker, messages.Decode(*self._common(worker), group.images, *size, latents))

    def _common(self, worker: Worker) -> tuple[int, str, int, messages.Weights]:
        return worker.fence, self.course.job.id, worker.epoch, self.course.work.weights

    def _next_phase(self) -> None:
        """Leaves phases whose images are all painted, once nobody is at one any more."""
        course = self.course
        while course.phases and not set(course.phases[0].images) & set(course.album.unpainted):
            if self._anyone_has(messages.Paint):
                return
            course.phases.pop(0)
            if course.phases:
                course.enter()

    def _form_ring(self) -> bool:
        """Whether the ring of this phase is up; takes the next step towards it if not."""
        course, backend = self.course, self.course.links.backend
        ranks, workers = course.phases[0].ranks, course.workers
        if course.ring is None:
            if not all(workers[rank].is_free for rank in ranks):
                return False
            course.ring = Ring.of(ranks, workers)
        ring = course.ring
        orders = []
        if not ring.is_asked:
            orders += ring.ask(workers, backend)
        if ring.has_ports and not ring.is_told:
            orders += ring.join(workers, course.job, backend)
        for rank, message in orders:
            self.send(workers[rank], message)
        return ring.is_up

    def _load(self) -> None:
        """Everyone who works in this phase loads its transformer, whole or in shards."""
        course = self.course
        if not course.phases:
            return
        phase, request = course.phases[0], course.job.request
        shards = len(phase.ranks) if phase.layout == "sharded" else 1
        for place, rank in enumerate(phase.ranks):
            worker = course.workers[rank]
            if worker.is_loaded or worker.killed is not None or worker.has(messages.Load):
                continue
            components = ["transformer"]
            if request.preload or (course.job.warm and not request.low_memory):
                components.append("autoencoder")
            if request.preload and worker is course.reader:
                components.insert(0, "text encoders")
            shard = place if shards > 1 else 0
            self.send(
                worker,
                messages.Load(
                    *self._common(worker), shards, shard, tuple(components), request.low_memory
                ),
            )

    def _encode(self) -> None:
        """Somebody reads the prompt, and the picture to begin from."""
        course, request, reader = self.course, self.course.job.request, self.course.reader
        if reader is None or reader.killed is not None:
            return
        if course.features is None and not self._anyone_has(messages.Encode):
            padding, stay = request.t5_padding, course.encoders_stay
            encode = messages.Encode(*self._common(reader), request.prompt, padding, stay)
            self.send(reader, encode)
        source = request.source
        if source is None or course.source is not None:
            return
        if not self._anyone_has(messages.EncodeSource):
            self.send(reader, messages.EncodeSource(*self._common(reader), source.pixels))

    def _anyone_has(self, kind: type[messages.Message]) -> bool:
        return any(worker.has(kind) for worker in self.course.workers.values())

    def _paint_apart(self) -> None:
        """`data`: every host that is free takes what nobody decodes, or else an image."""
        course = self.course
        for worker in course.members:
            if worker.killed is not None:
                continue
            group = next(course.album.ready(), None) if worker.is_free else None
            if group is not None:
                self.decode(worker, group)
                continue
            if not (course.phases and course.can_paint and worker.is_loaded):
                continue
            if worker.has(messages.Paint, messages.Load):
                continue
            image = course.album.take(worker.rank, course.phases[0].images)
            if image is not None:
                self._paint(worker, image, course.phases[0])

    def _paint_together(self) -> None:
        """A ring: one image after another; when each member has one to decode, all decode."""
        course, phase, members = self.course, self.course.phases[0], self.course.members
        if not (course.can_paint and all(one.is_free and one.is_loaded for one in members)):
            return
        groups = list(course.album.ready())
        if len(groups) >= len(members):
            for worker, group in zip(members, groups, strict=False):
                self.decode(worker, group)
            return
        image = course.album.take(members[0].rank, phase.images)
        if image is not None:
            for worker in members:
                self._paint(worker, image, phase)

    def _paint(self, worker: Worker, image: Image, phase: Phase) -> None:
        """From the last acknowledged step on, or from noise."""
        course, request = self.course, self.course.job.request
        features, source, sizes = course.features, request.source, course.job.sizes
        assert features is not None
        size = (course.work.height, course.work.width)
        noise = initial_noise(
            request.seed_of(image.index),
            *size,
            sizes.autoencoder.z_channels,
            sizes.autoencoder.downsampling,
        )
        paint = messages.Paint(
            *self._common(worker),
            phase.placement,
            image.index,
            *size,
            request.steps or sizes.defaults.steps,
            image.step,
            request.guidance,
            request.low_memory,
            request.stepwise,
            1.0 if source is None else source.strength,
            noise if image.latents is None else image.latents,
            noise,
            features.t5,
            features.clip,
            course.source,
            None if source is None else source.mask,
            request.cache,
            image.basis,
            image.basis_latents if request.cache else None,
        )
        if course.option is not None:
            worker.expect(paint, phase.step_seconds, measured=course.option.measured)
        self.send(worker, paint)
