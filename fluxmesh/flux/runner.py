"""Runs a `GenerateRequest` on this machine and tells how it goes, event by event.

Stands on the pipeline and below whoever asks (the command line today, the engine of a mesh):
it holds no socket and prints nothing. Stopping is the caller's: close the iterator, or let
Ctrl-C pass through it, and the runner can run the next request.

What stays in memory (the memory policy):

- By default one phase at a time: the text encoders load, run and leave before the transformer
  loads, so that the peak is that of the larger one; after the request all weights leave.
- `keep_warm` (prompt after prompt) keeps transformer and autoencoder for the next request, and
  the text encoders too where all fit with room to spare (`memory.is_roomy`). Where they do not,
  an unseen prompt makes the transformer leave until the encoders are done.
- `preload` loads everything before anything starts, and keeps it for the request.
- `low_memory` releases the modulation weights once they are used, makes all images' latents,
  lets the transformer leave, and decodes only then. Nothing stays warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.errors import DoesNotFitError
from fluxmesh.events import Encoded, Event, Loading, Peak, Picture, Step
from fluxmesh.flux import memory
from fluxmesh.flux.conditioning import Conditioning
from fluxmesh.flux.denoise import Plan, denoise
from fluxmesh.flux.pipeline import FluxPipeline, to_pixels
from fluxmesh.flux.source import SourceLatents, composite
from fluxmesh.request import GenerateRequest

PHASES = ("text", "denoise", "decode")
TEXT_ENCODERS = ("clip", "t5")


class Runner:
    """One request after another on one machine; keeps a pipeline between requests."""

    def __init__(
        self,
        *,
        keep_warm: bool = False,
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """`on_loading` hears of bytes while weights are read, between the events of `run`."""
        self.keep_warm = keep_warm
        self.download = download
        self.on_loading = on_loading
        self.pipeline: FluxPipeline | None = None
        self._key: tuple[Any, ...] | None = None

    def run(self, request: GenerateRequest) -> Iterator[Event]:
        """Yields events as they happen: loading, the prompt, every step, every picture, peaks.

        Raises `UsageError`, `ModelNotFoundError`, `WeightsError` and `AdapterError` before any
        compute, and `DoesNotFitError` where memory runs out.
        """
        job = _Job(self._pipeline(request), request, self.keep_warm)
        try:
            yield from job.events()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"Memory ran out while {job.doing} with {request.model}; try --quantize, "
                "--low-memory or a smaller --image-size."
            ) from error
        finally:
            job.close()

    def release(self) -> None:
        """Lets every model leave memory."""
        self.pipeline, self._key = None, None
        mx.clear_cache()

    def _pipeline(self, request: GenerateRequest) -> FluxPipeline:
        """The pipeline that this request needs: the one at hand, or a new one."""
        key = (
            request.model,
            request.dtype,
            request.bits,
            request.adapters,
            request.fuse_adapters,
        )
        if self.pipeline is None or key != self._key:
            self.release()
            self.pipeline = FluxPipeline(
                request.model,
                dtype=request.dtype,
                bits=request.bits,
                adapters=request.adapters,
                fuse_adapters=request.fuse_adapters,
                download=self.download,
                on_loading=self.on_loading,
            )
            self._key = key
        self.pipeline.t5_padding = request.t5_padding
        self.pipeline.low_memory = request.low_memory
        return self.pipeline


class _Job:
    """One request on one pipeline."""

    def __init__(self, pipeline: FluxPipeline, request: GenerateRequest, keep_warm: bool) -> None:
        self.pipeline = pipeline
        self.request = request
        self.keep_warm = keep_warm and not request.low_memory
        self.meter = memory.PeakMeter()
        self.doing = "starting"
        self.roomy = request.preload or (
            self.keep_warm and memory.is_roomy(pipeline.checkpoint, request.dtype, request.bits)
        )
        defaults = pipeline.checkpoint.defaults
        height, width = request.height or defaults.height, request.width or defaults.width
        if request.source is not None and request.height is None and request.width is None:
            height, width = request.source.pixels.shape[:2]
        downsampling = pipeline.checkpoint.autoencoder.downsampling
        self.latent_size = (height // downsampling, width // downsampling)
        pipeline.check_size(self.latent_size, request.source)

    def events(self) -> Iterator[Event]:
        request = self.request
        with self.meter.phase("text"):
            if request.preload:
                yield from self._load("text encoders", *TEXT_ENCODERS)
                yield from self._load("transformer", "flow")
                yield from self._load("autoencoder", "ae")
            text = yield from self._encode()
            source = yield from self._encode_source()
        yield Peak("text", self.meter.peaks["text"])

        with self.meter.phase("denoise"):
            plan = yield from self._plan(text)
        together = request.n_images if request.low_memory else request.decoding_batch_size
        for first in range(0, request.n_images, together):
            images = range(first, min(first + together, request.n_images))
            yield from self._paint(images, plan, source)
        yield Peak("denoise", self.meter.peaks["denoise"])
        yield Peak("decode", self.meter.peaks["decode"])

    def close(self) -> None:
        """Lets go of what the policy does not keep."""
        if not self.keep_warm:
            del self.pipeline.flow, self.pipeline.ae
        if not (self.keep_warm and self.roomy):
            self.pipeline.reload_text_encoders()

    # Phases

    def _encode(self) -> Generator[Event, None, Conditioning]:
        """The prompt's features; the encoders come and go as memory allows."""
        self.doing = "reading the prompt"
        pipeline = self.pipeline
        cached = pipeline.remembers(self.request.prompt)
        start = time.perf_counter()
        if not cached:
            if not self.roomy:
                del pipeline.flow
            yield from self._load("text encoders", *TEXT_ENCODERS)
            start = time.perf_counter()
        text = pipeline.encode(self.request.prompt)
        if not self.roomy:
            pipeline.reload_text_encoders()
        yield Encoded(self.request.prompt, time.perf_counter() - start, cached)
        return text

    def _encode_source(self) -> Generator[Event, None, SourceLatents | None]:
        """The latents of the picture to begin from, or None."""
        if self.request.source is None:
            return None
        self.doing = "encoding the picture"
        yield from self._load("autoencoder", "ae")
        return self.pipeline.encode_source(self.request.source)

    def _plan(self, text: Conditioning) -> Generator[Event, None, Plan]:
        """What all images share; loads the transformer."""
        self.doing = "loading the transformer"
        request, pipeline = self.request, self.pipeline
        pipeline.drop_incomplete_flow()
        yield from self._load("transformer", "flow")
        plan = pipeline.plan(
            text,
            num_steps=request.steps,
            guidance=request.guidance,
            latent_size=self.latent_size,
            strength=1.0 if request.source is None else request.source.strength,
        )
        mx.eval(plan.modulations, plan.pe)
        return plan

    def _paint(self, images: range, plan: Plan, source: SourceLatents | None) -> Iterator[Event]:
        """Denoises these images one by one, then decodes them `decoding_batch_size` at a time."""
        latents: list[mx.array] = []
        seconds: list[float] = []
        for k in images:
            start = time.perf_counter()
            if self.request.stepwise:
                yield from self._load("autoencoder", "ae")
            with self.meter.phase("denoise"):
                latents.append((yield from self._denoise(k, plan, source)))
            seconds.append(time.perf_counter() - start)
        if self.request.low_memory:
            del self.pipeline.flow
        yield from self._load("autoencoder", "ae")
        batch = self.request.decoding_batch_size
        for first in range(0, len(images), batch):
            part = slice(first, first + batch)
            self.doing = "decoding"
            start = time.perf_counter()
            with self.meter.phase("decode"):
                pixels = self._decode(mx.concatenate(latents[part]))
            share = (time.perf_counter() - start) / len(pixels)
            for k, spent, picture in zip(images[part], seconds[part], pixels, strict=True):
                yield Picture(k, self.request.seed_of(k), picture, spent + share)

    def _denoise(
        self, k: int, plan: Plan, source: SourceLatents | None
    ) -> Generator[Event, None, mx.array]:
        """One image's latents, a `Step` event after each step."""
        self.doing = "denoising"
        noise = self.pipeline.noise(self.request.seed_of(k), self.latent_size)
        start = time.perf_counter()
        x = noise
        walk = denoise(self.pipeline.flow, plan, noise, source=source)
        for i, step in enumerate(walk, start=1):
            x = step.x
            mx.eval(x)
            seconds = time.perf_counter() - start
            preview = self._decode(step.clean)[0] if self.request.stepwise else None
            yield Step(k, i, plan.steps, seconds, preview)
            start = time.perf_counter()
        return x

    def _decode(self, latents: mx.array) -> np.ndarray:
        """uint8 [B, H, W, 3], the user's own pixels outside of the mask."""
        pixels = to_pixels(self.pipeline.decode(latents, self.latent_size))
        if self.request.source is None:
            return pixels
        return np.stack([composite(picture, self.request.source) for picture in pixels])

    def _load(self, component: str, *names: str) -> Iterator[Event]:
        """Loads what is missing of a component, with an event before and after."""
        missing = [name for name in names if not self.pipeline.is_loaded(name)]
        if not missing:
            return
        self.doing = f"loading the {component}"
        total = self.pipeline.file_bytes(*missing)
        yield Loading(component, 0, total)
        for name in missing:
            getattr(self.pipeline, name)
        yield Loading(component, total, total)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX failed to allocate: Metal, CUDA and the CPU each say so in words."""
    text = str(error).lower()
    words = ("malloc", "out of memory", "unable to allocate", "insufficient memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)
