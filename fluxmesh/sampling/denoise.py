"""The sampler: from noise to a picture's latents, one step at a time, as a generator.

A family's runtime computes what all images of a request share (`DenoisePlan`: time steps,
modulations, rotary tables); `denoise` then walks one image from its noise to its latents and yields
after each step without evaluating anything: the caller evaluates, reports, shows a preview or
stops. Stands between the transformer and the pipeline (`engine/`), and knows neither files nor
prompts.

The flow is straight: x_t = (1 - t) * clean + t * noise, the model predicts dx/dt, and an Euler
step walks it (diffusers' `FlowMatchEulerDiscreteScheduler`; Liu et al. 2022, "Flow Straight and
Fast"). Latents and their update are float32 whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from fluxmesh.models.runtime import DenoisePlan
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling import latents
from fluxmesh.sampling.img2img import SourceLatents

Guide = Callable[[mx.array, int], mx.array]
"""A custom loss: `guide(clean, step)` gives a scalar that the sampler makes smaller.

`clean` is the picture that the model expects at this point, as latents float32 [1, h, w, C] (what
`FluxPipeline.ae.decode` takes), `step` counts from 0. Before each step the prediction moves by
minus the gradient of the loss, so the loss carries its own strength. Only the prediction is
differentiated, not the transformer: a step costs no more memory than without a guide.
Source: He et al. 2023, "Manifold Preserving Guided Diffusion" (https://arxiv.org/abs/2311.16424),
without its projection.
"""


class StepState(NamedTuple):
    """Where one image stands after a step; lazy arrays, packed float32 [1, L, 4C]."""

    x: mx.array  # latents at the next time step
    clean: mx.array  # the finished latents as predicted at this step; costs nothing unless used
    reused: bool = False  # most of its blocks were not run (`step_cache.py`)


class Basis(NamedTuple):
    """The step that a cache held when it was lost."""

    step: int  # counted from 0
    latents: mx.array | None  # that it began from; None: those of the very beginning


def denoise(
    flow: Any,
    plan: DenoisePlan,
    noise: mx.array,
    *,
    source: SourceLatents | None = None,
    guide: Guide | None = None,
    first: int = 0,
    latents: mx.array | None = None,
    caches: Sequence[StepCache] = (),
    basis: Basis | None = None,
) -> Iterator[StepState]:
    """Yields a `StepState` for each of `plan.steps` steps of one image; nothing is evaluated.

    `noise` is packed float32 [1, L, 4C]. With `source`, begins from its picture, noised to the
    first time step, and after every step puts back what its mask keeps. With `first`, goes on
    from the `latents` that so many steps left, to the same bytes as without the interruption.

    `flow` is the transformer, also spread over hosts. With empty `caches`, one for each of
    `plan.calls`, steps that differ little are approximated, the first and the last never; then each
    step evaluates its beginning, in order to compare. To go on to the same bytes it needs
    a `basis`, whose blocks are computed again; without one, the step after `first` is computed.
    """
    x = start = noise if source is None else source.noised(noise, plan.times[0])

    if first:
        assert latents is not None, "to go on, the latents after the last step are needed"
        x = latents
        if caches and basis is not None:
            begun = start if basis.latents is None else basis.latents
            plan.velocity(flow, begun, basis.step, caches)
    for i in range(first, plan.steps):
        t, t_next = plan.times[i], plan.times[i + 1]
        for cache in caches:
            cache.is_forced = i == plan.steps - 1
        velocity = plan.velocity(flow, x, i, caches)
        clean = x - t * velocity
        if guide is not None:
            clean = clean - _pull(guide, clean, plan.latent_size, i)
            velocity = (x - clean) / t
        x = x + (t_next - t) * velocity
        if source is not None:
            x = source.keep(x, noise, t_next)
            clean = source.keep(clean, noise, 0.0)
        yield StepState(x, clean, any(cache.reused for cache in caches))


def _pull(guide: Guide, clean: mx.array, latent_size: tuple[int, int], step: int) -> mx.array:
    """The gradient of the loss with respect to the predicted latents, packed float32."""

    def loss(packed: mx.array) -> mx.array:
        return guide(latents.unpack(packed, latent_size), step)

    return mx.grad(loss)(clean).astype(mx.float32)
