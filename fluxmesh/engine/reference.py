"""Runs a `GenerateRequest` on this machine and tells how it goes, event by event.

A short sequence of a worker's units (`worker.py`): encode, paint each image, decode. The same
units, spread over hosts, are what a mesh does. It holds no socket and prints nothing. Stopping is
the caller's: close the iterator, or let Ctrl-C pass through it, and the runner can run the next
request.

What stays in memory, beside what the worker decides:

- By default one phase at a time: the text encoders leave before the transformer loads, so that the
  peak is that of the larger one; after the request all weights leave.
- `keep_warm` (prompt after prompt) keeps transformer and autoencoder for the next request, and
  the text encoders too where all fit with room to spare (`memory.is_roomy`). Where they do not,
  an unseen prompt makes the transformer leave until the encoders are done.
- `preload` loads everything before anything starts, and keeps it for the request.
- `low_memory` makes all images' latents, lets the transformer leave, and decodes only then.
  Nothing stays warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.residency import COMPONENTS, WorkerOptions
from fluxmesh.engine.worker import Worker
from fluxmesh.events import Encoded, Event, Loading, Peak, Picture, Step
from fluxmesh.images import composite
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.wire import messages

PHASES = ("text", "denoise", "decode")


class Runner:
    """One request after another on one machine; keeps a worker between requests."""

    def __init__(
        self,
        *,
        keep_warm: bool = False,
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """`on_loading` hears of bytes while weights are read, between the events of `run`."""
        self.keep_warm = keep_warm
        self.worker = Worker(WorkerOptions(download=download, hear=on_loading))
        self._jobs = itertools.count()

    @property
    def pipeline(self) -> FluxPipeline | None:
        """That of the latest request."""
        return self.worker.pipeline

    def run(self, request: GenerateRequest) -> Iterator[Event]:
        """Yields events as they happen: loading, the prompt, every step, every picture, peaks.

        Raises `UsageError`, `ModelNotFoundError`, `WeightsError` and `AdapterError` before any
        compute, and `DoesNotFitError` where memory runs out.
        """
        self.worker.open(ModelVariant.of(request))
        job = _Job(self.worker, request, self.keep_warm, str(next(self._jobs)))
        try:
            yield from job.events()
        finally:
            job.close()

    def release(self) -> None:
        """Lets every model leave memory."""
        self.worker.release()


class _Job:
    """One request, as units of work."""

    def __init__(
        self, worker: Worker, request: GenerateRequest, keep_warm: bool, name: str
    ) -> None:
        self.worker, self.request, self.name = worker, request, name
        self.weights = ModelVariant.of(request)
        self.keep_warm = keep_warm and not request.low_memory
        self.roomy = request.preload or (self.keep_warm and worker.is_roomy(self.weights))
        checkpoint = worker.model.checkpoint
        defaults, config = checkpoint.defaults, checkpoint.autoencoder
        height, width = request.height or defaults.height, request.width or defaults.width
        if request.source is not None and request.height is None and request.width is None:
            height, width = request.source.pixels.shape[:2]
        self.height, self.width = height, width
        latent_size = (height // config.downsampling, width // config.downsampling)
        worker.model.check_size(latent_size, request.source)
        self.requested = request.steps or defaults.steps
        strength = 1.0 if request.source is None else request.source.strength
        tokens = latent_size[0] * latent_size[1] // 4
        self.steps = len(timesteps(self.requested, tokens, checkpoint.schedule, strength)) - 1
        self.work: dict[str, Any] = {  # what every unit begins with
            "fence": 0,
            "job": name,
            "ring_generation": 0,
            "weights": self.weights,
        }

    def events(self) -> Iterator[Event]:
        request = self.request
        if request.preload:
            preload = messages.Load(**self.work, components=tuple(COMPONENTS))
            yield from self._loadings(preload)
        text = yield from self._encode()
        source = yield from self._encode_source()
        yield Peak("text", self._peak("load", "text"))
        together = request.n_images if request.low_memory else request.decoding_batch_size
        for first in range(0, request.n_images, together):
            images = range(first, min(first + together, request.n_images))
            yield from self._paint(images, text, source)
        yield Peak("denoise", self._peak("denoise"))
        yield Peak("decode", self._peak("decode"))

    def close(self) -> None:
        """Lets go of what the policy does not keep."""
        self.worker.end_job()
        if not self.keep_warm:
            self.worker.drop_transformer()
            del self.worker.model.ae
        if not (self.keep_warm and self.roomy):
            self.worker.model.reload_text_encoders()

    def _peak(self, *phases: str) -> int:
        return max(self.worker.meter.peaks.get(phase, 0) for phase in phases)

    # Phases

    def _loadings(self, work: messages.Work) -> Iterator[Loading]:
        for report in self.worker.do(work):
            if isinstance(report, messages.LoadProgress):
                yield _loading(report)

    def _encode(self) -> Generator[Event, None, messages.TextEncoded]:
        request = self.request
        text: messages.TextEncoded | None = None
        work = messages.Encode(
            **self.work, prompt=request.prompt, t5_padding=request.t5_padding, stay=self.roomy
        )
        for report in self.worker.do(work):
            if isinstance(report, messages.LoadProgress):
                yield _loading(report)
            elif isinstance(report, messages.TextEncoded):
                text = report
        assert text is not None
        yield Encoded(request.prompt, text.seconds, text.cached)
        return text

    def _encode_source(self) -> Generator[Event, None, np.ndarray | None]:
        """The latents of the picture to begin from, or None."""
        if self.request.source is None:
            return None
        latents: np.ndarray | None = None
        for report in self.worker.do(
            messages.EncodeSource(**self.work, pixels=self.request.source.pixels)
        ):
            if isinstance(report, messages.LoadProgress):
                yield _loading(report)
            elif isinstance(report, messages.SourceEncoded):
                latents = report.latents
        return latents

    def _paint(
        self, images: range, text: messages.TextEncoded, source: np.ndarray | None
    ) -> Iterator[Event]:
        """Denoises these images one by one, then decodes them `decoding_batch_size` at a time."""
        seconds, reused = dict.fromkeys(images, 0.0), dict.fromkeys(images, 0)
        latents: dict[int, np.ndarray] = {}
        for image in images:
            for report in self.worker.do(self._painting(image, text, source)):
                if isinstance(report, messages.LoadProgress):
                    yield _loading(report)
                elif isinstance(report, messages.Stepped):
                    assert report.latents is not None
                    latents[image] = report.latents
                    seconds[image] += report.seconds
                    reused[image] += report.reused
                    preview = report.preview
                    if preview is not None:
                        preview = self._kept(preview)
                    yield Step(
                        image=image,
                        step=report.step,
                        steps=self.steps,
                        seconds=report.seconds,
                        preview=preview,
                        reused=report.reused,
                    )
        batch = self.request.decoding_batch_size
        for first in range(0, len(images), batch):
            part = tuple(images[first : first + batch])
            decode = messages.Decode(
                **self.work,
                images=part,
                height=self.height,
                width=self.width,
                latents=np.concatenate([latents.pop(image) for image in part]),
            )
            for report in self.worker.do(decode):
                if isinstance(report, messages.LoadProgress):
                    yield _loading(report)
                elif isinstance(report, messages.Pictured):
                    image = report.image
                    yield Picture(
                        image=image,
                        seed=self.request.seed_of(image),
                        pixels=self._kept(report.pixels),
                        seconds=seconds[image] + report.seconds,
                        steps=self.steps,
                        reused=reused[image],
                    )

    def _painting(
        self, image: int, text: messages.TextEncoded, source: np.ndarray | None
    ) -> messages.Paint:
        request, config = self.request, self.worker.model.checkpoint.autoencoder
        noise = initial_noise(
            request.seed_of(image), self.height, self.width, config.z_channels, config.downsampling
        )
        return messages.Paint(
            **self.work,
            placement="data",
            image=image,
            height=self.height,
            width=self.width,
            steps=self.requested,
            first=0,
            guidance=request.guidance,
            low_memory=request.low_memory,
            preview=request.stepwise,
            strength=1.0 if request.source is None else request.source.strength,
            latents=noise,
            noise=noise,
            features=text.features,
            source=source,
            mask=None if request.source is None else request.source.mask,
            cache=request.cache,
        )

    def _kept(self, pixels: np.ndarray) -> np.ndarray:
        """The picture with the user's own pixels outside of the mask."""
        return pixels if self.request.source is None else composite(pixels, self.request.source)


def _loading(report: messages.LoadProgress) -> Loading:
    return Loading(report.component, report.done_bytes, report.total_bytes)
