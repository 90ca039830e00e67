"""The unit of work that paints: one image, step after step, alone or as a rank of a ring.

What images of a job share (`DenoisePlan`) is made once, and kept in `EngineState.plan`. Before
each step the ranks of a ring agree on whether to go on (`EngineState.agree`, `lookahead.py`).
"""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from fluxmesh.engine import features, preview
from fluxmesh.engine.residency import Stopped
from fluxmesh.engine.state import GOES_ON, LOADS, PLANS, STOPS, EngineState, Reports
from fluxmesh.errors import UsageError
from fluxmesh.models.runtime import DenoisePlan
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling.denoise import Basis, denoise
from fluxmesh.sampling.img2img import SourceLatents, mask_latents
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Paint


def paint(engine: EngineState, work: Paint) -> Reports:
    """One image: a step, evaluated, its report, the next; a ring agrees before each."""
    pipeline = engine.open(work.weights)
    engine.check_latents(work.noise, work)
    tokens = features.tokens(work.features) + work.added_tokens
    shape = (work.placement, work.weights, work.height, work.width, tokens, work.shares)
    engine.begin_step(shape)  # already here, for the ranks of a ring wait for one another
    pipeline.low_memory = work.low_memory
    key = _plan_key(work)
    lacks = _lacks(engine, work, key)
    own = GOES_ON if _kept_plan(engine, key) else PLANS
    going = engine.agree(work, LOADS if lacks else own)
    if going == STOPS:
        return
    if going != GOES_ON:  # a plan is made with collectives: by all ranks, or by none
        engine.plan = None
        lacks = _lacks(engine, work, key)
    with engine.meter.phase("denoise"):
        try:
            if work.low_memory and _kept_plan(engine, key) is None:
                if "transformer" in lacks:
                    yield from engine.loading(work, "modulation")
                if engine.stops(work):  # all ranks or none make the plan, and go on to load
                    engine.drop_transformer()
                    return
                _plan(engine, work, key)
            for component in lacks:
                yield from engine.loading(work, component)
        except Stopped:
            if work.placement == "data":
                return
        engine.begin_step(shape)
        if going != GOES_ON and engine.stops(work):  # whoever was stopped while it loaded says so
            return
        engine.doing = "denoising"
        plan = _prepared(engine, work, key)
        if work.first and work.latents is None:
            raise UsageError(f"The latents after {work.first} steps are missing; send them.")
        if work.first >= plan.steps:
            raise UsageError(f"The image has {plan.steps} steps, all of them done; decode it.")
        source = _source(engine, work)
        is_first = work.placement == "data" or engine.ring().rank == 0
        previews = preview.of_image(engine, work, plan.times, source) if is_first else None
        engine.begin_step(shape)
        walk = denoise(
            engine.flow(work.placement),
            plan,
            mx.array(work.noise),
            source=source,
            first=work.first,
            latents=None if work.latents is None else mx.array(work.latents),
            caches=_caches(engine, work, plan),
            basis=_basis(work),
        )
        left = plan.steps - work.first
        pace = engine.walked(work, walk, left, ahead=not work.cache, first=work.first)
        for number, (step, seconds) in enumerate(pace, start=work.first + 1):
            engine.warm.add(shape)
            if number == work.first + 1:
                engine.has_made(engine.shape_of(work))
            done = int(number == plan.steps)
            engine.count(steps=1, reused=int(step.reused), images=done)
            decoded = None
            if work.preview and is_first:
                engine.quiet = "decoding"
                decoded = pipeline.pixels(step.clean, engine.latent_size(work))[0]
            engine.quiet = ""
            latents = np.array(step.x) if is_first else None
            projected = None
            if previews is not None and latents is not None:
                projected = previews.after(number, latents)
            yield messages.Stepped(
                job=work.job,
                ring_generation=work.ring_generation,
                image=work.image,
                step=number,
                is_last=number == plan.steps,
                seconds=seconds,
                peak_bytes=engine.meter.now("denoise"),
                latents=latents,
                preview=decoded,
                projected=projected,
                reused=step.reused,
            )


def _lacks(engine: EngineState, work: Paint, key: bytes) -> list[str]:
    """What has to load: the part of the transformer that the placement needs, or what was
    released of it."""
    engine.hold_for(work)
    if _kept_plan(engine, key) is None:
        engine.drop_incomplete(work.placement)
    needs_autoencoder = work.preview or (work.preview_every and preview.known(engine) is None)
    needed = ("transformer", *(("autoencoder",) if needs_autoencoder else ()))
    return [component for component in needed if engine.missing(component)]


def _plan(engine: EngineState, work: Paint, key: bytes) -> DenoisePlan:
    """What the images of a job share, evaluated; kept for the next one.

    One alone: that of another placement leaves before this is made, for keys and values of
    references may be gigabytes.
    """
    plan = _kept_plan(engine, key)
    if plan is None:
        engine.plan = None
        runtime = engine.model.runtime
        plan = engine.model.plan(
            features.from_arrays(work.features, runtime.feature_axes, runtime.optional_features),
            num_steps=work.steps,
            guidance=work.guidance,
            latent_size=engine.latent_size(work),
            strength=work.strength,
            flow=engine.planner(work.placement),
            cfg=work.cfg,
            conditions=features.conditions(work.conditions),
        )
        mx.eval(*plan.arrays)
        engine.plan = (key, plan)
    return plan


def _prepared(engine: EngineState, work: Paint, key: bytes) -> DenoisePlan:
    """The plan with what takes the whole transformer: once for all images, on all ranks."""
    plan = _plan(engine, work, key)
    prepared = plan.prepared(engine.flow(work.placement))
    if prepared is not plan:
        engine.begin("first step")  # many references take as long as several steps
        with engine.model.bounded_steps(engine.latent_size(work), work.added_tokens):
            mx.eval(*prepared.arrays)
        engine.plan = (key, prepared)
    return prepared


def _kept_plan(engine: EngineState, key: bytes) -> DenoisePlan | None:
    known, plan = engine.plan or (b"", None)
    return plan if known == key else None


def _source(engine: EngineState, work: Paint) -> SourceLatents | None:
    if work.source is None:
        return None
    model = engine.model.architecture
    painted = None
    if work.mask is not None:
        painted = mask_latents(work.mask, model.downsampling, model.latent_channels)
    return SourceLatents(mx.array(work.source), painted)


def _caches(engine: EngineState, work: Paint, plan: DenoisePlan) -> list[StepCache]:
    """What the steps of this image share, where the request allows it; ranks decide as one."""
    if not work.cache:
        return []
    gather = None if work.placement == "data" else engine.ring().gather
    return StepCache.of_calls(plan.calls, work.cache, gather)


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
    place = (work.placement, work.ring_generation, work.shares)
    shared = (work.job, place, work.weights, size, work.cfg)
    key = hashlib.blake2b(repr(shared).encode())
    for name, array in sorted((*work.features.items(), *(work.conditions or {}).items())):
        key.update(repr((name, array.dtype.name, array.shape)).encode() + array.tobytes())
    return key.digest()
