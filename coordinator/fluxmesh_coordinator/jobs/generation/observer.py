"""Watches a session's job and makes timings of it, for the mesh's record. Pure.

`session.py` tells it what is sent and what is reported; `job_times.py` holds the images' times, and
here are the ring's: how long it took to form, and what its collectives take.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

from fluxmesh.cluster.snapshot import RingTiming, TextTiming, Timings
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.job_times import JobTimes
from fluxmesh_coordinator.jobs.generation.state import GenerationState
from fluxmesh_coordinator.jobs.host import HostState, Readiness

NOTHING = Timings()


class Observer:
    """One job's."""

    def __init__(self, state: GenerationState) -> None:
        self.state = state
        self._times = JobTimes(state.work, state.job.request)

    def begin(self, now: float) -> None:
        """The job has its hosts."""
        self._times.begin(now)

    def sent(self, host: HostState, message: messages.Changing, now: float) -> None:
        """Something is sent: what is timed may begin with it."""
        ring = self.state.ring
        if isinstance(message, messages.AskPorts) and ring is not None and ring.begun is None:
            ring.begun = now
        if not isinstance(message, messages.Paint) or message.first:
            return
        ranks: tuple[int, ...] = (host.rank,)
        if message.placement != "data":
            if ring is None or not self._leads(host):
                return
            ranks = ring.ranks
        levels = {self.state.hosts[rank].readiness(message) for rank in ranks}
        readiness = min(levels, key=get_args(Readiness).index)  # of the one that is least ready
        self._times.given(message.image, (message.placement, ranks, message.shares), now, readiness)

    def prepares(self) -> None:
        """A host loads."""
        self._times.prepares()

    def joined(self, now: float) -> Timings:
        """A host has joined the ring; what is news of it, once all have."""
        ring = self.state.ring
        self._times.prepares()
        if ring is None or not ring.is_up or ring.begun is None:
            return NOTHING
        ring.formed = now - ring.begun
        known = self.state.links.timings.ring(ring.backend, ring.ranks)
        if known is None:  # its collectives are measured next
            return NOTHING
        return Timings((replace(known, gathers=(), sums=(), forming_seconds=ring.formed),))

    def ring_timed(self, host: HostState, report: messages.RingTimed) -> Timings:
        """A host has measured the ring; what all of them found, once the last one has."""
        ring = self.state.ring
        if ring is None or ring.timed is None:
            return NOTHING
        ring.timed.add(host.rank)
        if ring.timed != set(ring.ranks):
            return NOTHING
        timing = RingTiming(
            backend=ring.backend,
            ranks=ring.ranks,
            gathers=report.gathers,
            sums=report.sums,
            hidden=report.hidden,
            forming_seconds=ring.formed,
        )
        return Timings((timing,))

    def encoded(self, host: HostState, report: messages.TextEncoded) -> Timings:
        """A prompt is read; what that took, where it was not remembered."""
        self._times.encoded(report.seconds)
        weights, place = self.state.work.weights, self.state.text
        if report.cached or place is None or place.rank != host.rank or self.state.losses:
            return NOTHING
        if place.way == "remembered":  # it was not, and nobody knows whether layer by layer
            return NOTHING
        timing = TextTiming(
            rank=host.rank,
            model=weights.model,
            dtype=weights.dtype,
            bits=weights.bits_of_text,
            seconds=report.seconds,
            by_layers=place.way == "layers",
        )
        return Timings(texts=(timing,))

    def stepped(
        self,
        host: HostState,
        paint: messages.Paint,
        report: messages.Stepped,
        now: float,
        begun: float | None,
    ) -> None:
        """A step is done; of a ring, the first rank's count. `begun`: when the image was next."""
        if paint.placement == "data" or self._leads(host):
            painting = 0.0 if begun is None else now - begun
            self._times.stepped(report.image, report.step, report.seconds, painting)

    def pictured(
        self,
        decode: messages.Decode,
        report: messages.Pictured,
        now: float,
        begun: float | None,
    ) -> None:
        """A picture is there. `begun`: when its decode was next."""
        took = 0.0 if begun is None else (now - begun) / len(decode.images)
        self._times.decoded(report.image, report.seconds, took)

    def finished(self) -> Timings:
        """What the whole job is worth; nothing where hosts were lost on the way."""
        if self.state.losses:
            return NOTHING
        hosts = self.state.hosts
        keys = Counter(host.info.device_key for host in hosts.values())
        shared = [rank for rank, host in hosts.items() if keys[host.info.device_key] > 1]
        return self._times.news(self.state.links.backend_of, shared)

    def _leads(self, host: HostState) -> bool:
        ring = self.state.ring
        return ring is not None and host.rank == ring.ranks[0]
