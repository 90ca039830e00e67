"""One accepted request of a client, from its place in line to its pictures.

Lives in the server's event loop: `service.py` makes it, `lane.py` tells what becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from fluxmesh.planning.workload import Workload
from fluxmesh_coordinator.server.queue.event_log import EventLog, clock_number
from fluxmesh_coordinator.server.queue.journal import JobRecord

if TYPE_CHECKING:
    from fluxmesh_coordinator.commands.generate import ReadyPrompt, Spread
    from fluxmesh_coordinator.runtime.lent_hosts import LentHosts
    from fluxmesh_coordinator.runtime.resolved import Resolved
    from fluxmesh_coordinator.server.problems import ProblemError

JobStage = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(kw_only=True)
class ServedJob:
    """A job and all that is known of it."""

    id: str
    client: str
    fingerprint: str  # of what was asked: a repeat of the id asks for the same, or is refused
    model: str  # its name, as clients say it
    n_images: int
    height: int  # pixels
    width: int  # pixels
    steps: int
    seed: int
    ready: ReadyPrompt | None  # None once it is over: its pictures would stay in memory
    spread: Spread | None = None
    lent: LentHosts | None = None  # the hosts that were lent to it when it began
    previews: bool = False  # whether somebody wants to see it while it is painted
    stage: JobStage = "queued"
    overtaken: int = 0  # times that another began on hosts for which this one waits
    is_cancelled: bool = False  # somebody asked for its end
    failure: ProblemError | None = None  # why it failed
    waiting: int = 0  # connections that wait for its pictures
    accepted: float = field(default_factory=time.time)  # seconds since 1970
    arrived: float = field(default_factory=time.monotonic)
    began: float = 0.0  # of the clock `time.monotonic`; 0: not yet
    first_step: float = 0.0  # of the same clock
    has_loaded: bool = False  # weights, for this job
    expected: float = 0.0  # seconds from `began` to the last picture, 0: nobody knows
    steps_done: dict[int, int] = field(default_factory=dict)  # by image
    pictures: dict[int, str] = field(default_factory=dict)  # names, by image
    last_preview: dict[str, Any] | None = None  # of one that was cancelled before its first picture
    kept: int = 0  # of these, pictures that were there before it began
    events: EventLog = field(default_factory=lambda: EventLog(clock_number()))

    @classmethod
    def of(
        cls, ready: ReadyPrompt, *, id: str, client: str, fingerprint: str, model: str,
        spread: Spread, previews: bool,
    ) -> Self:  # fmt: skip
        """A request that is resolved."""
        request = ready.resolved.request
        return cls(
            id=id,
            client=client,
            fingerprint=fingerprint,
            model=model,
            n_images=request.n_images,
            height=request.height,
            width=request.width,
            steps=request.steps,
            seed=request.seed,
            ready=ready,
            spread=spread,
            previews=previews,
        )

    @property
    def record(self) -> JobRecord:
        """What is kept of it, should this server end."""
        return JobRecord(
            id=self.id, fingerprint=self.fingerprint, model=self.model, seed=self.seed,
            n_images=self.n_images, height=self.height, width=self.width, steps=self.steps,
            accepted=self.accepted,
        )  # fmt: skip

    def keep(self, names: Mapping[int, str]) -> None:
        """These pictures, by image, are there already, and are told."""
        for image, name in sorted(names.items()):
            self.pictures[image] = name
            self.steps_done[image] = self.steps
            self.events.append("picture", self.picture_told(image, name))
        self.kept = len(names)

    def picture_told(self, image: int, name: str) -> dict[str, Any]:
        """The fields of a `picture` event."""
        return {
            "image": image,
            "name": name,
            "url": f"/api/pictures/{name}",
            "seed": self.seed + image,
            "width": self.width,
            "height": self.height,
        }

    def parts(self) -> list[tuple[int, Resolved]]:
        """What is to be painted, once it begins: a first image, and the request from there on.

        One part, unless pictures that were kept stand between those that are missing.
        """
        assert self.ready is not None
        resolved = self.ready.resolved
        missing = [k for k in range(self.n_images) if k not in self.pictures]
        firsts = [k for k in missing if k - 1 not in missing]
        ends = [k + 1 for k in missing if k + 1 not in missing]
        return [
            (first, resolved.of_images(first, end - first))
            for first, end in zip(firsts, ends, strict=True)
        ]

    @property
    def names(self) -> list[str]:
        """Its finished pictures, in the order of the images."""
        return [self.pictures[image] for image in sorted(self.pictures)]

    @property
    def work(self) -> float:
        """Images x pixels x steps, of what it has to paint."""
        return float((self.n_images - self.kept) * self.height * self.width * self.steps)

    @property
    def nbytes(self) -> int:
        """Of pictures that it holds in memory."""
        if self.ready is None:
            return 0
        request = self.ready.resolved.request
        pictures = [*request.references, request.control]
        if request.source is not None:
            pictures += [request.source.pixels, request.source.mask]
        return sum(picture.nbytes for picture in pictures if picture is not None)

    @property
    def denoiser(self) -> Hashable:
        """The same for jobs that hosts paint with the same weights in memory."""
        if self.ready is None:
            return self.model
        resolved = self.ready.resolved
        return Workload.of(resolved.request, resolved.model.sizes).weights.denoiser

    @property
    def progress(self) -> float:
        """0 to 1."""
        if self.stage == "done":
            return 1.0
        return min(1.0, sum(self.steps_done.values()) / max(1, self.n_images * self.steps))

    def seconds_left(self, now: float) -> float:
        """Until its last picture, of a job that runs; 0: nobody knows."""
        if self.stage != "running":
            return 0.0
        elapsed, left = now - self.began, 1 - self.progress
        if self.expected > elapsed:
            return self.expected - elapsed
        done = 1 - left - self.kept / max(1, self.n_images)  # since it began
        return elapsed * left / done if done > 0 else 0.0
