"""The unit of work that paints: one image, step after step, alone or as a rank of a ring.

What images of a job share (`DenoisePlan`) is made once, and kept in `EngineState.plans`. Before
each step the ranks of a ring agree on whether to go on (`EngineState.agree`, `lookahead.py`).
"""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from fluxmesh.engine import features
from fluxmesh.engine.pipeline import to_pixels
from fluxmesh.engine.residency import Stopped
from fluxmesh.engine.state import GOES_ON, LOADS, STOPS, EngineState, Reports
from fluxmesh.errors import UsageError
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling.denoise import Basis, DenoisePlan, denoise
from fluxmesh.sampling.img2img import SourceLatents, mask_latents
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Paint


def paint(engine: EngineState, work: Paint) -> Reports:
    """One image: a step, evaluated, its report, the next; a ring agrees before each."""
    pipeline = engine.open(work.weights)
    tokens = features.tokens(work.features)
    shape = (work.placement, work.weights, work.height, work.width, tokens)
    engine.begin_step(shape)  # already here, for the ranks of a ring wait for one another
    pipeline.low_memory = work.low_memory
    key = _plan_key(work)
    lacks = _lacks(engine, work, key)
    going = engine.agree(work, LOADS if lacks else GOES_ON)
    if going == STOPS:
        return
    with engine.meter.phase("denoise"):
        try:
            if work.low_memory and _kept_plan(engine, work.placement, key) is None:
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
        if going == LOADS and engine.stops(work):  # whoever was stopped while it loaded says so
            return
        engine.doing = "denoising"
        plan = _plan(engine, work, key)
        if work.first and work.latents is None:
            raise UsageError(f"The latents after {work.first} steps are missing; send them.")
        if work.first >= plan.steps:
            raise UsageError(f"The image has {plan.steps} steps, all of them done; decode it.")
        walk = denoise(
            engine.flow(work.placement),
            plan,
            mx.array(work.noise),
            source=_source(engine, work),
            first=work.first,
            latents=None if work.latents is None else mx.array(work.latents),
            cache=_cache(engine, work),
            basis=_basis(work),
        )
        is_first = work.placement == "data" or engine.ring().rank == 0
        pace = engine.walked(work, walk, plan.steps - work.first, ahead=not work.cache)
        for number, (step, seconds) in enumerate(pace, start=work.first + 1):
            engine.warm.add(shape)
            if number == work.first + 1:
                engine.has_made(engine.shape_of(work))
            done = int(number == plan.steps)
            engine.count(steps=1, reused=int(step.reused), images=done)
            preview = None
            if work.preview and is_first:
                engine.quiet = "decoding"
                preview = to_pixels(pipeline.decode(step.clean, engine.latent_size(work)))[0]
            engine.quiet = ""
            yield messages.Stepped(
                job=work.job,
                ring_generation=work.ring_generation,
                image=work.image,
                step=number,
                is_last=number == plan.steps,
                seconds=seconds,
                peak_bytes=engine.meter.now("denoise"),
                latents=np.array(step.x) if is_first else None,
                preview=preview,
                reused=step.reused,
            )


def _lacks(engine: EngineState, work: Paint, key: bytes) -> list[str]:
    """What has to load: the part of the transformer that the placement needs, or what was
    released of it."""
    engine.hold_for(work)
    if _kept_plan(engine, work.placement, key) is None:
        engine.drop_incomplete(work.placement)
    needed = ("transformer", *(("autoencoder",) if work.preview else ()))
    return [component for component in needed if engine.missing(component)]


def _plan(engine: EngineState, work: Paint, key: bytes) -> DenoisePlan:
    """What the images of a job share, evaluated; kept for the next one.

    All ranks of a ring must find it, or none, since it is made with a collective: so that one
    is kept for each placement and never for another job, whatever a rank does in between.
    """
    plan = _kept_plan(engine, work.placement, key)
    if plan is None:
        engine.plans.pop(work.placement, None)
        plan = engine.model.plan(
            features.text(work.features),
            num_steps=work.steps,
            guidance=work.guidance,
            latent_size=engine.latent_size(work),
            strength=work.strength,
            flow=engine.planner(work.placement),
        )
        mx.eval(plan.modulations, plan.pe)
        engine.plans[work.placement] = (key, plan)
    return plan


def _kept_plan(engine: EngineState, placement: str, key: bytes) -> DenoisePlan | None:
    known, plan = engine.plans.get(placement, (b"", None))
    return plan if known == key else None


def _source(engine: EngineState, work: Paint) -> SourceLatents | None:
    if work.source is None:
        return None
    config = engine.model.checkpoint.autoencoder
    painted = None
    if work.mask is not None:
        painted = mask_latents(work.mask, config.downsampling, config.z_channels)
    return SourceLatents(mx.array(work.source), painted)


def _cache(engine: EngineState, work: Paint) -> StepCache | None:
    """What the steps of this image share, where the request allows it; ranks decide as one."""
    if not work.cache:
        return None
    return StepCache(work.cache, None if work.placement == "data" else engine.ring().gather)


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
