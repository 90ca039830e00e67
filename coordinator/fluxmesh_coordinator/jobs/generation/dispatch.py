"""What every host is given next: rings, weights, prompt, images, decodes. Pure.

Between `state.py` (where the job stands) and `session.py`, which calls `GenerationDispatch.go_on`
after all that happens. It looks at nothing but the state, so that after a loss the same code sends
again whatever is missing.
"""

from __future__ import annotations

from fluxmesh.cluster.shares import EVEN
from fluxmesh.planning.plan import Phase
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.images import DecodeGroup, ImageProgress
from fluxmesh_coordinator.jobs.generation.state import GenerationState
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.state import Sender


class GenerationDispatch:
    """Gives out work, through `send`."""

    def __init__(self, state: GenerationState, send: Sender) -> None:
        self.state, self.send = state, send

    def go_on(self) -> None:
        """Sends all that can be sent now."""
        state = self.state
        self._next_phase()
        if state.in_ring and not (self._form_ring() and self._measure_ring()):
            return
        if state.job.request.preload:
            self._load()
            self._encode()
        else:  # where memory is short, the encoders have it first and leave
            self._encode()
            self._load()
        if state.in_ring:
            self._paint_together()
        else:
            self._paint_apart()

    def decode(self, host: HostState, group: DecodeGroup) -> None:
        """Has a host decode images that are painted."""
        state = self.state
        group.decoder = host.rank
        self.send(
            host,
            messages.Decode(
                fence=host.fence,
                job=state.job.id,
                ring_generation=host.ring_generation,
                weights=state.work.weights,
                images=group.images,
                height=state.work.height,
                width=state.work.width,
                latents=state.images.latents_of(group),
            ),
        )

    def _next_phase(self) -> None:
        """Leaves phases whose images are all painted, once nobody is at one any more."""
        state = self.state
        while state.phases and not set(state.phases[0].images) & set(state.images.unpainted):
            if self._anyone_has(messages.Paint):
                return
            state.phases.pop(0)
            if state.phases:
                state.enter()

    def _form_ring(self) -> bool:
        """Whether the ring of this phase is up; takes the next step towards it if not."""
        state, ranks, hosts = self.state, self.state.phases[0].ranks, self.state.hosts
        if state.ring is None:
            if not all(hosts[rank].is_free for rank in ranks):
                return False
            state.ring = Ring.of(ranks, hosts, state.links.backend_of(ranks))
        for rank, message in state.ring.advance(hosts, state.job):
            self.send(hosts[rank], message)
        return state.ring.is_up

    def _measure_ring(self) -> bool:
        """Whether it is known what this ring's collectives take; has them measured if not.

        A job that has lost a host goes on at once: the next one measures.
        """
        state, ring = self.state, self.state.ring
        assert ring is not None
        if ring.timed is None:
            known = state.links.timings.ring(ring.backend, ring.ranks)
            if known is not None or state.losses:
                ring.timed = set(ring.ranks)
                return True
            members = [state.hosts[rank] for rank in ring.ranks]
            if not all(host.is_free for host in members):
                return False
            ring.timed = set()
            for host in members:
                unit = messages.MeasureRing(
                    fence=host.fence, job=state.job.id, ring_generation=host.ring_generation
                )
                self.send(host, unit)
        return ring.timed == set(ring.ranks)

    def _load(self) -> None:
        """Everyone who works in this phase loads its transformer, whole or in shards."""
        state = self.state
        if not state.phases:
            return
        phase, request = state.phases[0], state.job.request
        shards = len(phase.ranks) if phase.layout == "sharded" else 1
        for place, rank in enumerate(phase.ranks):
            host = state.hosts[rank]
            if host.is_loaded or host.killed is not None or host.has(messages.Load):
                continue
            components = ["transformer"]
            if request.preload or (state.job.warm and not request.low_memory):
                components.append("autoencoder")
            if request.preload and host is state.reader:
                components.insert(0, "text encoders")
            text_stays = rank not in state.text_leaves
            if not text_stays:
                state.encoders_leave(host)
            self.send(
                host,
                messages.Load(
                    fence=host.fence,
                    job=state.job.id,
                    ring_generation=host.ring_generation,
                    weights=state.work.weights,
                    shards=shards,
                    shard=place if shards > 1 else 0,
                    shares=phase.shares if shards > 1 else EVEN,
                    components=tuple(components),
                    low_memory=request.low_memory,
                    text_stays=text_stays,
                ),
            )

    def _encode(self) -> None:
        """Somebody reads the prompt, and the pictures that the job comes with."""
        state = self.state
        self._encode_text()
        host = state.picture_reader
        if host is not None and host.killed is None:
            self._encode_source(host)
        if state.sees:
            host = state.reader
        if host is not None and host.killed is None:
            self._encode_pictures(host)

    def _encode_text(self) -> None:
        state, request, reader = self.state, self.state.job.request, self.state.reader
        if reader is None or reader.killed is not None:
            return
        if state.features is None and not self._anyone_has(messages.Encode):
            place = state.text
            makes_room = place is not None and place.makes_room
            if makes_room:  # what it loaded before leaves, and is sent for again
                reader.is_loaded = False
            # What it is thought to remember it may have to read after all, beside nothing.
            is_known = place is not None and place.way == "remembered"
            self.send(
                reader,
                messages.Encode(
                    fence=reader.fence,
                    job=state.job.id,
                    ring_generation=reader.ring_generation,
                    weights=state.work.weights,
                    prompt=request.prompt,
                    negative=request.negative,
                    t5_padding=request.t5_padding,
                    stay=state.encoders_stay,
                    makes_room=makes_room or is_known or request.low_memory,
                    by_layers=is_known or (place is not None and place.way == "layers"),
                ),
            )

    def _encode_source(self, host: HostState) -> None:
        """The picture to begin from is sent to one host, once: what is made of it is kept here."""
        state, source = self.state, self.state.start
        text_stays = host.rank not in state.text_leaves
        room = {"makes_room": state.job.request.low_memory, "text_stays": text_stays}
        lacks_source = source is not None and state.source is None
        if source is not None and lacks_source and not self._anyone_has(messages.EncodeSource):
            self.send(
                host,
                messages.EncodeSource(
                    fence=host.fence,
                    job=state.job.id,
                    ring_generation=host.ring_generation,
                    weights=state.work.weights,
                    pixels=source.pixels,
                    **room,
                ),
            )

    def _encode_pictures(self, host: HostState) -> None:
        """And so are the others, all to one."""
        state, request = self.state, self.state.job.request
        lacks_conditions = state.pictures and state.conditions is None
        if lacks_conditions and not self._anyone_has(messages.EncodePictures):
            self.send(
                host,
                messages.EncodePictures(
                    fence=host.fence,
                    job=state.job.id,
                    ring_generation=host.ring_generation,
                    weights=state.work.weights,
                    named=state.pictures,
                    reader=request.redux if state.sees else "",
                    strengths=request.reference_strengths if state.sees else (),
                    stay=state.encoders_stay and state.text is not None and state.text.stays,
                    makes_room=self._sees_alone if state.sees else request.low_memory,
                    text_stays=state.sees or host.rank not in state.text_leaves,
                ),
            )

    @property
    def _sees_alone(self) -> bool:
        """Whether what sees pictures takes memory in turn with the transformer."""
        place = self.state.text
        return self.state.job.request.low_memory or (place is not None and place.makes_room)

    def _anyone_has(self, kind: type[messages.Message]) -> bool:
        return any(host.has(kind) for host in self.state.hosts.values())

    def _paint_apart(self) -> None:
        """`data`: every host that is free takes what nobody decodes, or else an image."""
        state = self.state
        for host in state.members:
            if host.killed is not None:
                continue
            group = next(state.images.ready(), None) if host.is_free else None
            if group is not None:
                self.decode(host, group)
                continue
            if not (state.phases and state.can_paint and host.is_loaded):
                continue
            if host.has(messages.Paint, messages.Load):
                continue
            image = state.images.take(host.rank, state.phases[0].images)
            if image is not None:
                self._paint(host, image, state.phases[0])

    def _paint_together(self) -> None:
        """A ring: one image after another; when each member has one to decode, all decode."""
        state, phase, members = self.state, self.state.phases[0], self.state.members
        if not (state.can_paint and all(member.is_free and member.is_loaded for member in members)):
            return
        groups = list(state.images.ready())
        if len(groups) >= len(members):
            for host, group in zip(members, groups, strict=False):
                self.decode(host, group)
            return
        image = state.images.take(members[0].rank, phase.images)
        if image is not None:
            for host in members:
                self._paint(host, image, phase)

    def _paint(self, host: HostState, image: ImageProgress, phase: Phase) -> None:
        """From the last acknowledged step on, or from noise."""
        state, request, sizes = self.state, self.state.job.request, self.state.job.sizes
        features, source = state.features, state.start
        assert features is not None
        height, width = state.work.height, state.work.width
        seed, model = request.seed_of(image.index), sizes.architecture
        noise = initial_noise(seed, height, width, model.latent_channels, model.downsampling)
        paint = messages.Paint(
            fence=host.fence,
            job=state.job.id,
            ring_generation=host.ring_generation,
            weights=state.work.weights,
            placement=phase.placement,
            image=image.index,
            height=height,
            width=width,
            steps=request.steps,
            first=image.step,
            guidance=request.guidance,
            low_memory=request.low_memory,
            preview=request.stepwise,
            strength=1.0 if request.source is None else request.source.strength,
            latents=image.latents,
            noise=noise,
            features=features,
            source=state.source,
            mask=None if source is None else source.mask,
            conditions=state.conditions,
            cfg=request.cfg,
            cache=request.cache,
            basis=image.basis,
            basis_latents=image.basis_latents if request.cache else None,
            preview_every=request.preview_every,
            shares=phase.shares,
        )
        if state.option is not None:
            host.expect(paint, phase.step_seconds, measured=state.option.measured)
        self.send(host, paint)
