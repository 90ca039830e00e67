"""The units of work that measure and warm: a trial picture, steps and a decode timed, the ring.

What is painted here nobody asked for: it is thrown away, and counts as nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import mlx.core as mx

from fluxmesh.cluster.snapshot import StepTiming
from fluxmesh.engine import device_memory, features, ring_probe
from fluxmesh.engine.painting import paint
from fluxmesh.engine.residency import Stopped
from fluxmesh.engine.state import GOES_ON, STOPS, EngineState, Reports
from fluxmesh.engine.units import decode
from fluxmesh.sampling.denoise import denoise
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Measure, MeasureRing, Paint, Report, Warm

MEASURED_STEPS = 2


def measure(engine: EngineState, work: Measure) -> Reports:
    """Steps and a decode of noise, after a trial picture. In a ring all are given it."""
    shape = engine.shape_of(work)
    has_kernels = any(made.is_of(work.weights) for made in engine.compiled)
    has_taken = any(made.is_sized(shape) for made in engine.compiled)
    has_made = shape in engine.compiled
    first = yield from _trial(engine, work)
    if engine.agree(work, STOPS if first is None else GOES_ON) == STOPS or first is None:
        return
    weights, pipeline = work.weights, engine.model
    engine.doing = "measuring"
    engine.begin("measuring")
    size, text = engine.latent_size(work), pipeline.runtime.blank(mx.float32)
    flow = engine.flow(work.placement)
    plan = pipeline.plan(
        text,
        num_steps=MEASURED_STEPS + 1,
        latent_size=size,
        flow=flow,
        conditions=pipeline.runtime.blank_conditions(size),
    )
    mx.eval(*plan.arrays)
    x = pipeline.noise(0, size)
    spent = [seconds for _, seconds in engine.walked(work, denoise(flow, plan, x), plan.steps)]
    if len(spent) < plan.steps:  # it was told to stop
        return
    with pipeline.bounded_pixels(work.height, work.width):
        mx.eval(pipeline.decode(x, size))
        start = time.perf_counter()
        mx.eval(pipeline.decode(x, size))
    step = statistics.mean(spent[1:])  # where the last one begins early, it looks short
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
        placement_seconds=longer if has_kernels and not has_taken else None,
        first_seconds=longer if has_taken and not has_made else None,
        when=time.time(),
        shares=work.shares,
    )
    yield messages.Timed(job=work.job, ring_generation=work.ring_generation, measured=measured)


def warm_up(engine: EngineState, work: Warm) -> Reports:
    """A trial picture, and no more."""
    start = time.perf_counter()
    if (yield from _trial(engine, work)) is not None:
        spent = time.perf_counter() - start
        yield messages.Warmed(job=work.job, ring_generation=work.ring_generation, seconds=spent)


def measure_ring(engine: EngineState, work: MeasureRing) -> Reports:
    """In a ring all are given it, and all stop where one of them is told to."""
    engine.doing = "measuring the ring"
    engine.begin("measuring")
    limit = engine.options.memory_bytes or device_memory.memory_of_device()
    table = ring_probe.timed(engine.ring(), work.seconds, limit, engine.options.stopping)
    engine.quiet = ""
    if table is None:
        return
    yield messages.RingTimed(
        job=work.job,
        ring_generation=work.ring_generation,
        gathers=table.gathers,
        sums=table.sums,
        hidden=table.hidden,
    )


def _trial(engine: EngineState, work: Measure | Warm) -> Generator[Report, None, float | None]:
    """The first step of a picture and a decode, as a job would have them, thrown away.

    Returns the step's seconds, or None where it was told to stop.
    """
    before = engine.done
    pipeline = engine.open(work.weights)
    model = pipeline.checkpoint.architecture
    noise = initial_noise(0, work.height, work.width, model.latent_channels, model.downsampling)
    text = pipeline.runtime.blank(pipeline.dtype)
    conditions = pipeline.runtime.blank_conditions(engine.latent_size(work))
    common: dict[str, Any] = {
        "fence": work.fence,
        "job": work.job,
        "ring_generation": work.ring_generation,
        "weights": work.weights,
        "height": work.height,
        "width": work.width,
    }
    painting = Paint(
        **common,
        placement=work.placement,
        shares=work.shares,
        image=0,
        steps=1,
        first=0,
        guidance=pipeline.checkpoint.defaults.guidance,
        low_memory=False,
        preview=False,
        strength=1.0,
        latents=None,
        noise=noise,
        features=features.to_arrays(text),
        conditions=features.to_arrays(conditions) or None,
    )
    seconds: float | None = None
    decoding = Decode(**common, images=(0,), latents=noise)
    for unit in (paint(engine, painting), decode(engine, decoding)):
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
    engine.done = replace(  # what jobs asked for is counted, and nobody asked for this
        engine.done,
        images=before.images,
        steps=before.steps,
        decodes=before.decodes,
    )
    return seconds
