"""FLUX.2's time steps against diffusers' pipeline and scheduler: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from fluxmesh.models.flux2.config import Flux2Schedule
from fluxmesh.sampling.schedule import timesteps


@pytest.mark.parametrize("steps", [1, 4, 8, 28, 50])
@pytest.mark.parametrize("tokens", [24, 1024, 4096, 4300, 4301, 16384])
def test_time_steps_equal_diffusers(steps: int, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = Flux2Schedule()
    assert schedule.mu(tokens, steps) == mu
    assert timesteps(steps, tokens, schedule) == scheduler.sigmas.tolist()
