"""The units of work of one engine: load, encode, paint, decode, measure, warm. Holds no socket.

A unit goes in as a message (`messages.Work`), reports come out, one after another, from a
generator: whoever asks (the engine's process, `fluxmesh_agent/engine.py`) sends them on, and closes
the generator to stop. Stands on `residency.py` (the models in memory, the place in a ring).

What stays in memory (the memory policy):

- Models stay until another unit needs the room. `Encode` without `stay` makes the transformer
  leave until the encoders are done, and the encoders leave before anything else loads.
- Other weights, or another shard of these, make what is there leave first.
- `low_memory` loads the modulation weights alone, uses them, and lets them leave before the rest
  of the transformer comes; that leaves before the first picture is decoded.

In a ring all ranks are given the same `Paint`s, and before each step they agree on whether anyone
was told to stop (`Ranks.most`): a rank that stopped alone would leave the others in a collective.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.cluster.snapshot import Holding, StepTiming
from fluxmesh.engine import device_memory, features, ring_probe
from fluxmesh.engine.lookahead import walked
from fluxmesh.engine.pipeline import to_pixels
from fluxmesh.engine.residency import ModelStore, Stopped, WorkerOptions
from fluxmesh.errors import DoesNotFitError, UsageError
from fluxmesh.models.partition import Shard
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import SourceImage
from fluxmesh.sampling.conditioning import Conditioning
from fluxmesh.sampling.denoise import Basis, DenoisePlan, StepState, denoise
from fluxmesh.sampling.img2img import SourceLatents, mask_latents
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import (
    Decode,
    Encode,
    EncodeSource,
    Load,
    Measure,
    MeasureRing,
    Paint,
    Report,
    Warm,
)

MEASURED_STEPS = 2
GOES_ON, LOADS, STOPS = range(3)  # what a rank does next; in a ring, all do the greatest

Reports = Generator[Report, None, None]


class Worker(ModelStore):
    """Does one unit of work after another."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        super().__init__(options)
        self.quiet = ""  # what it does, while it gives no other sign of life
        self._plans: dict[str, tuple[bytes, DenoisePlan]] = {}  # the latest of each placement
        self._warm: set[Any] = set()  # what steps were run at since something was read
        self._job = ""

    def do(self, work: messages.Work) -> Iterator[Report]:
        """Does one unit and yields its reports.

        Raises what a wrong model, file or request deserves (`errors.py`), `DoesNotFitError` where
        memory runs out. A unit that is told to stop ends without the report that would end it.
        """
        if work.job != self._job:
            self.end_job()
            self.meter.forget()
            self._job = work.job
        self._begin("loading")  # what was there leaves, and headers are read, maybe from afar
        does = self.units().get(type(work))
        try:
            if does is None:
                raise UsageError(f"This engine does no {type(work).__name__}.")
            yield from self._timed(does(work))
        except Stopped:
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            name = "the model" if self.weights is None else self.weights.model
            raise DoesNotFitError(
                f"Memory ran out while {self.doing} with {name}; try {self.less_memory(work)}."
            ) from error
        finally:
            self.quiet = ""
            self.done = replace(self.done, peak_bytes=max(self.done.peak_bytes, self.meter.now()))

    def _timed(self, reports: Reports) -> Reports:
        """What a unit reports; its time is counted, without that of whoever sends the reports."""
        start = time.perf_counter()
        with contextlib.closing(reports):
            for report in reports:
                self.count(busy_seconds=time.perf_counter() - start)
                yield report
                start = time.perf_counter()
        self.count(busy_seconds=time.perf_counter() - start)

    def less_memory(self, work: messages.Work) -> str:
        """What makes units like this one take less memory."""
        return "`quantize`, `low_memory` or a smaller `image_size`"

    def units(self) -> dict[type, Callable[[Any], Reports]]:
        """What does each kind of unit."""
        return {
            Load: self._load_all,
            Encode: self._encode,
            EncodeSource: self._encode_source,
            Paint: self._paint,
            Decode: self._decode,
            Measure: self._measure,
            Warm: self._warm_up,
            MeasureRing: self._measure_ring,
        }

    def end_job(self) -> None:
        """Lets go of what only the images of one job share."""
        self._plans.clear()

    def release(self) -> None:
        super().release()
        self.end_job()

    # Units

    def _load_all(self, work: Load) -> Reports:
        start = time.perf_counter()
        self.open(work.weights)
        self.model.low_memory = work.low_memory
        with self.meter.phase("load"):
            for component in work.components or ("transformer",):
                if component == "transformer":
                    self.hold(Shard(work.shard, work.shards))
                    if work.low_memory:  # the modulation weights come first, with an image
                        continue
                yield from self._loading(work, component)
        holding = self.holding or Holding(
            weights=work.weights,
            nbytes=0,
            shards=work.shards,
            shard=work.shard,
            content=self.content,
        )
        yield messages.Loaded(
            job=work.job,
            ring_generation=work.ring_generation,
            holding=holding,
            seconds=time.perf_counter() - start,
        )

    def _encode(self, work: Encode) -> Reports:
        self.doing = "reading the prompt"
        pipeline = self.open(work.weights)
        pipeline.t5_padding = work.t5_padding
        cached = pipeline.remembers(work.prompt)
        with self.meter.phase("text"):
            start = time.perf_counter()
            if not cached:
                if not work.stay:
                    self.drop_transformer()
                yield from self._loading(work, "text encoders")
                start = time.perf_counter()
            self._begin("encoding", "encode")
            text = pipeline.encode(work.prompt)
            self.quiet = ""
            if not work.stay:
                pipeline.reload_text_encoders()
            seconds = time.perf_counter() - start
            self.count(encodes=0 if cached else 1)
            named = features.of_text(text)
            peak = self.meter.now("text")
        yield messages.TextEncoded(
            job=work.job,
            ring_generation=work.ring_generation,
            seconds=seconds,
            cached=cached,
            peak_bytes=peak,
            content=self.content,
            features=named,
        )

    def _encode_source(self, work: EncodeSource) -> Reports:
        pipeline = self.open(work.weights)
        with self.meter.phase("text"):
            yield from self._loading(work, "autoencoder")
            self.doing = "encoding the picture"
            self._begin("encoding", "encode")
            source = pipeline.encode_source(SourceImage(work.pixels))
            self.quiet = ""
        yield messages.SourceEncoded(
            job=work.job, ring_generation=work.ring_generation, latents=np.array(source.clean)
        )

    def _paint(self, work: Paint) -> Reports:
        """One image: a step, evaluated, its report, the next; a ring agrees before each."""
        pipeline = self.open(work.weights)
        tokens = features.tokens(work.features)
        shape = (work.placement, work.weights, work.height, work.width, tokens)
        self._begin_step(shape)  # already here, for the ranks of a ring wait for one another
        pipeline.low_memory = work.low_memory
        key = _plan_key(work)
        lacks = self._lacks(work, key)
        going = self._agree(work, LOADS if lacks else GOES_ON)
        if going == STOPS:
            return
        with self.meter.phase("denoise"):
            try:
                if work.low_memory and self._kept_plan(work.placement, key) is None:
                    if "transformer" in lacks:
                        yield from self._loading(work, "modulation")
                    if self._stops(work):  # all ranks or none make the plan, and go on to load
                        self.drop_transformer()
                        return
                    self._plan(work, key)
                for component in lacks:
                    yield from self._loading(work, component)
            except Stopped:
                if work.placement == "data":
                    return
            self._begin_step(shape)
            if going == LOADS and self._stops(work):  # whoever was stopped while it loaded says so
                return
            self.doing = "denoising"
            plan = self._plan(work, key)
            if work.first and work.latents is None:
                raise UsageError(f"The latents after {work.first} steps are missing; send them.")
            if work.first >= plan.steps:
                raise UsageError(f"The image has {plan.steps} steps, all of them done; decode it.")
            walk = denoise(
                self.flow(work.placement),
                plan,
                mx.array(work.noise),
                source=self._source(work),
                first=work.first,
                latents=None if work.latents is None else mx.array(work.latents),
                cache=self._cache(work),
                basis=_basis(work),
            )
            is_first = work.placement == "data" or self.ring().rank == 0
            pace = self._walked(work, walk, plan.steps - work.first, ahead=not work.cache)
            for number, (step, seconds) in enumerate(pace, start=work.first + 1):
                self._warm.add(shape)
                if number == work.first + 1:
                    self.has_made(self.shape_of(work))
                done = int(number == plan.steps)
                self.count(steps=1, reused=int(step.reused), images=done)
                preview = None
                if work.preview and is_first:
                    self.quiet = "decoding"
                    preview = to_pixels(pipeline.decode(step.clean, self._latent_size(work)))[0]
                self.quiet = ""
                yield messages.Stepped(
                    job=work.job,
                    ring_generation=work.ring_generation,
                    image=work.image,
                    step=number,
                    is_last=number == plan.steps,
                    seconds=seconds,
                    peak_bytes=self.meter.now("denoise"),
                    latents=np.array(step.x) if is_first else None,
                    preview=preview,
                    reused=step.reused,
                )

    def _decode(self, work: Decode) -> Reports:
        pipeline = self.open(work.weights)
        if pipeline.low_memory:
            self.drop_transformer()
        with self.meter.phase("decode"):
            yield from self._loading(work, "autoencoder")
            if self.options.stopping():
                return
            self.doing = "decoding"
            self._begin("decoding", "decode")
            start = time.perf_counter()
            with pipeline.bounded_pixels(work.height, work.width, len(work.images)):
                pixels = to_pixels(pipeline.decode(mx.array(work.latents), self._latent_size(work)))
            self.quiet = ""
            seconds = (time.perf_counter() - start) / len(pixels)
            self.count(decodes=len(pixels))
            peak = self.meter.now("decode")
        for image, picture in zip(work.images, pixels, strict=True):
            yield messages.Pictured(
                job=work.job,
                ring_generation=work.ring_generation,
                image=image,
                seconds=seconds,
                peak_bytes=peak,
                pixels=picture,
            )

    def _measure(self, work: Measure) -> Reports:
        """Steps and a decode of noise, after a trial picture. In a ring all are given it."""
        shape = self.shape_of(work)
        has_kernels = any(made.is_of(work.weights) for made in self.compiled)
        has_made = shape in self.compiled
        first = yield from self._trial(work)
        if self._agree(work, STOPS if first is None else GOES_ON) == STOPS or first is None:
            return
        weights, pipeline = work.weights, self.model
        self.doing = "measuring"
        self._begin("measuring")
        config, size = pipeline.checkpoint.transformer, self._latent_size(work)
        tokens = pipeline.checkpoint.defaults.t5_max_length
        text = Conditioning(
            mx.zeros((1, tokens, config.context_in_dim)), mx.zeros((1, config.vec_in_dim))
        )
        flow = self.flow(work.placement)
        plan = pipeline.plan(text, num_steps=MEASURED_STEPS + 1, latent_size=size, flow=flow)
        mx.eval(plan.modulations, plan.pe)
        x = pipeline.noise(0, size)
        spent = [seconds for _, seconds in self._walked(work, denoise(flow, plan, x), plan.steps)]
        if len(spent) < plan.steps:  # it was told to stop
            return
        with pipeline.bounded_pixels(work.height, work.width):
            mx.eval(pipeline.decode(x, size))
            start = time.perf_counter()
            mx.eval(pipeline.decode(x, size))
        step = min(spent[1:])
        longer = max(0.0, first - step)
        measured = StepTiming(
            model=weights.model,
            height=work.height,
            width=work.width,
            dtype=weights.dtype,
            bits=weights.bits,
            step_seconds=step,
            decode_seconds=time.perf_counter() - start,
            placement=work.placement,
            hosts=shape.hosts,
            kernels_seconds=None if has_kernels else longer,
            first_seconds=longer if has_kernels and not has_made else None,
            when=time.time(),
        )
        yield messages.Timed(job=work.job, ring_generation=work.ring_generation, measured=measured)

    def _warm_up(self, work: Warm) -> Reports:
        """A trial picture, and no more."""
        start = time.perf_counter()
        if (yield from self._trial(work)) is not None:
            spent = time.perf_counter() - start
            yield messages.Warmed(job=work.job, ring_generation=work.ring_generation, seconds=spent)

    def _trial(self, work: Measure | Warm) -> Generator[Report, None, float | None]:
        """The first step of a picture and a decode, as a job would have them, thrown away.

        Returns the step's seconds, or None where it was told to stop.
        """
        before = self.done
        pipeline = self.open(work.weights)
        config, ae = pipeline.checkpoint.transformer, pipeline.checkpoint.autoencoder
        tokens = pipeline.checkpoint.defaults.t5_max_length
        noise = initial_noise(0, work.height, work.width, ae.z_channels, ae.downsampling)
        text = Conditioning(
            mx.zeros((1, tokens, config.context_in_dim), pipeline.dtype),
            mx.zeros((1, config.vec_in_dim), pipeline.dtype),
        )
        common: dict[str, Any] = {
            "fence": work.fence,
            "job": work.job,
            "ring_generation": work.ring_generation,
            "weights": work.weights,
            "height": work.height,
            "width": work.width,
        }
        paint = Paint(
            **common,
            placement=work.placement,
            image=0,
            steps=1,
            first=0,
            guidance=pipeline.checkpoint.defaults.guidance,
            low_memory=False,
            preview=False,
            strength=1.0,
            latents=None,
            noise=noise,
            features=features.of_text(text),
        )
        seconds: float | None = None
        decode = Decode(**common, images=(0,), latents=noise)
        for unit in (self._paint(paint), self._decode(decode)):
            is_done = False
            with contextlib.closing(unit) as reports, contextlib.suppress(Stopped):
                for report in reports:
                    is_done = isinstance(report, messages.Stepped | messages.Pictured)
                    if isinstance(report, messages.Stepped):
                        seconds = report.seconds
                    if not is_done:
                        yield report
            if not is_done:  # it was told to stop
                return None
        self.done = replace(  # what jobs asked for is counted, and nobody asked for this
            self.done,
            images=before.images,
            steps=before.steps,
            decodes=before.decodes,
        )
        return seconds

    def _measure_ring(self, work: MeasureRing) -> Reports:
        """In a ring all are given it, and none stops on the way: it is short."""
        self.doing = "measuring the ring"
        self._begin("measuring")
        limit = self.options.memory_bytes or device_memory.memory_of_device()
        table = ring_probe.timed(self.ring(), work.seconds, limit)
        self.quiet = ""
        yield messages.RingTimed(
            job=work.job,
            ring_generation=work.ring_generation,
            gathers=table.gathers,
            sums=table.sums,
            hidden=table.hidden,
        )

    # Parts of them

    def _walked(
        self, work: Paint | Measure, walk: Iterator[StepState], steps: int, ahead: bool = True
    ) -> Iterator[tuple[StepState, float]]:
        """Steps, evaluated, with their seconds. A cache waits for the device: nothing is ahead."""
        with self.model.bounded_steps(self._latent_size(work)):
            yield from walked(
                walk,
                steps,
                None if work.placement == "data" else self.ring(),
                self.options.stopping,
                pause=lambda: self.options.pause("step"),
                ahead=ahead,
            )

    def _loading(self, work: messages.Work, component: str) -> Reports:
        for event in self.load(component):
            self._begin("loading")
            self._warm.clear()  # whatever runs next reads new weights, and may take long
            yield messages.LoadProgress(
                job=work.job,
                ring_generation=work.ring_generation,
                component=event.component,
                done_bytes=event.done_bytes,
                total_bytes=event.total_bytes,
            )
        self.quiet = ""

    def _lacks(self, work: Paint, key: bytes) -> list[str]:
        """What has to load: the part of the transformer that the placement needs, or what was
        released of it."""
        self.hold_for(work)
        if self._kept_plan(work.placement, key) is None:
            self.drop_incomplete(work.placement)
        needed = ("transformer", *(("autoencoder",) if work.preview else ()))
        return [component for component in needed if self.missing(component)]

    def _stops(self, work: Paint | Measure) -> bool:
        """Whether to stop: in a ring, on all ranks or on none."""
        return self._agree(work, GOES_ON) == STOPS

    def _agree(self, work: Paint | Measure, own: int) -> int:
        """What all ranks do, if this one would do `own`: `STOPS` goes before all else."""
        if self.options.stopping():
            own = STOPS
        if work.placement == "data":
            return own
        start = time.perf_counter()
        most = self.ring().most(own)
        self.count(agree_seconds=time.perf_counter() - start)
        return most

    def _plan(self, work: Paint, key: bytes) -> DenoisePlan:
        """What the images of a job share, evaluated; kept for the next one.

        All ranks of a ring must find it, or none, since it is made with a collective: so that one
        is kept for each placement and never for another job, whatever a rank does in between.
        """
        plan = self._kept_plan(work.placement, key)
        if plan is None:
            self._plans.pop(work.placement, None)
            plan = self.model.plan(
                features.text(work.features),
                num_steps=work.steps,
                guidance=work.guidance,
                latent_size=self._latent_size(work),
                strength=work.strength,
                flow=self.planner(work.placement),
            )
            mx.eval(plan.modulations, plan.pe)
            self._plans[work.placement] = (key, plan)
        return plan

    def _kept_plan(self, placement: str, key: bytes) -> DenoisePlan | None:
        known, plan = self._plans.get(placement, (b"", None))
        return plan if known == key else None

    def _source(self, work: Paint) -> SourceLatents | None:
        if work.source is None:
            return None
        config = self.model.checkpoint.autoencoder
        painted = None
        if work.mask is not None:
            painted = mask_latents(work.mask, config.downsampling, config.z_channels)
        return SourceLatents(mx.array(work.source), painted)

    def _cache(self, work: Paint) -> StepCache | None:
        """What the steps of this image share, where the request allows it; ranks decide as one."""
        if not work.cache:
            return None
        return StepCache(work.cache, None if work.placement == "data" else self.ring().gather)

    def _latent_size(self, work: Paint | Decode | Measure) -> tuple[int, int]:
        downsampling = self.model.checkpoint.autoencoder.downsampling
        size = (work.height // downsampling, work.width // downsampling)
        self.model.check_size(size, None)
        return size

    def _begin_step(self, shape: Any) -> None:
        self._begin(messages.WARM_STEP if shape in self._warm else "first step")

    def _begin(self, quiet: str, phase: str = "") -> None:
        """From here on the unit gives no sign until it is done."""
        self.quiet = quiet
        if phase:
            self.options.pause(phase)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX failed to allocate: Metal, CUDA and the CPU each say so in words."""
    text = str(error).lower()
    words = ("malloc", "out of memory", "unable to allocate", "insufficient memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def _basis(work: Paint) -> Basis | None:
    """What a lost cache held; a request that begins has lost none."""
    if not work.cache or not work.first:
        return None
    if work.basis >= work.first:
        raise UsageError(
            f"An image that goes on after {work.first} steps can't have step {work.basis + 1} as "
            "the latest that was computed."
        )
    latents = work.basis_latents
    return Basis(work.basis, None if latents is None else mx.array(latents))


def _plan_key(work: Paint) -> bytes:
    """Equal for paintings that share a plan."""
    size = (work.height, work.width, work.steps, work.guidance, work.strength, work.low_memory)
    key = hashlib.blake2b(repr((work.job, work.ring_generation, work.weights, size)).encode())
    for name, array in sorted(work.features.items()):
        key.update(repr((name, array.dtype.name, array.shape)).encode() + array.tobytes())
    return key.digest()
