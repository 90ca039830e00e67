"""The time steps of a generation: how much noise is left before each step. Imports no mlx.

FLUX is a rectified flow: x_t = (1 - t) * image + t * noise, and the model predicts the velocity
noise - image. Sampling goes from t = 1 to t = 0 with Euler steps, and the steps are shifted
towards t = 1, the more the longer the image is in tokens (and, in FLUX.2, the fewer they are).

The numbers are those of diffusers' `FluxPipeline` with `FlowMatchEulerDiscreteScheduler`, which
computes them in float32: same order of operations, same bits. The shift itself is equation 23 of
Esser et al. 2024, "Scaling Rectified Flow Transformers" (https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

import math

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.base import Shifting


def timesteps(
    steps: int, image_seq_len: int, schedule: Shifting, strength: float = 1.0
) -> list[float]:
    """Noise levels, from the first one down to exactly 0.0: one more than there are steps to run.

    `image_seq_len` counts image tokens (a token is 2x2 latents, so 16x16 pixels of FLUX).
    `strength` below 1 skips the first steps, as image-to-image does: of `steps` steps, about
    `steps * strength` remain, and never fewer than one. The source: `get_timesteps` of
    diffusers' `FluxImg2ImgPipeline`.

    Raises `UsageError` where `steps` is below 1 or `strength` lies outside (0, 1].
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}; it must be at least 1.")
    first = first_step(steps, strength)
    linear = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if schedule.use_dynamic_shifting:
        factor = math.exp(schedule.mu(image_seq_len, steps))
        levels = factor / (factor + (1 / linear - 1))
    else:
        levels = schedule.shift * linear / (1 + (schedule.shift - 1) * linear)
    return [*levels[first:].tolist(), 0.0]


def first_step(steps: int, strength: float) -> int:
    """How many of `steps` steps image-to-image at this strength skips.

    Raises `UsageError` where `strength` lies outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise UsageError(f"strength is {strength}; it must be above 0 and at most 1.")
    # diffusers' own expression: how steps * strength rounds decides which step comes first.
    return int(max(steps - min(steps * strength, steps), 0))
