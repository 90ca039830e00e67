"""The units of work that measure and warm: a trial picture, steps and a decode timed, the ring.

What is painted here nobody asked for: it is thrown away, and counts as nothing.
"""

from __future__ import annotations

import contextlib
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
from fluxmesh.sampling.conditioning import Conditioning
from fluxmesh.sampling.denoise import denoise
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Measure, MeasureRing, Paint, Report, Warm

MEASURED_STEPS = 2


def measure(engine: EngineState, work: Measure) -> Reports:
    """Steps and a decode of noise, after a trial picture. In a ring all are given it."""
    shape = engine.shape_of(work)
    has_kernels = any(made.is_of(work.weights) for made in engine.compiled)
    has_made = shape in engine.compiled
    first = yield from _trial(engine, work)
    if engine.agree(work, STOPS if first is None else GOES_ON) == STOPS or first is None:
        return
    weights, pipeline = work.weights, engine.model
    engine.doing = "measuring"
    engine.begin("measuring")
    config, size = pipeline.checkpoint.transformer, engine.latent_size(work)
    tokens = pipeline.checkpoint.defaults.t5_max_length
    text = Conditioning(
        mx.zeros((1, tokens, config.context_in_dim)), mx.zeros((1, config.vec_in_dim))
    )
    flow = engine.flow(work.placement)
    plan = pipeline.plan(text, num_steps=MEASURED_STEPS + 1, latent_size=size, flow=flow)
    mx.eval(plan.modulations, plan.pe)
    x = pipeline.noise(0, size)
    spent = [seconds for _, seconds in engine.walked(work, denoise(flow, plan, x), plan.steps)]
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
    painting = Paint(
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
