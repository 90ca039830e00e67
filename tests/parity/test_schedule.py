"""The schedule against diffusers' `FlowMatchEulerDiscreteScheduler`: the same float32 bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

from fluxmesh.models.flux1.config import ScheduleConfig
from fluxmesh.sampling.schedule import timesteps

SCHEDULES = {
    "schnell": ScheduleConfig(),
    "dev": ScheduleConfig(use_dynamic_shifting=True, shift=3.0),
    "static shift": ScheduleConfig(shift=1.6),
    "another slope": ScheduleConfig(
        use_dynamic_shifting=True, base_shift=0.2, max_shift=0.9, max_image_seq_len=2048
    ),
}


def scheduler(schedule: ScheduleConfig, steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """As `FluxPipeline.__call__` sets it up."""
    theirs = FlowMatchEulerDiscreteScheduler(**dataclasses.asdict(schedule))
    mu = calculate_shift(
        tokens,
        schedule.base_image_seq_len,
        schedule.max_image_seq_len,
        schedule.base_shift,
        schedule.max_shift,
    )
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return theirs


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 28, 50])
@pytest.mark.parametrize("tokens", [1, 64, 256, 1024, 4096, 9216])
def test_time_steps_are_diffusers_sigmas(name: str, steps: int, tokens: int) -> None:
    sigmas = scheduler(SCHEDULES[name], steps, tokens).sigmas.tolist()
    ours = timesteps(steps, tokens, SCHEDULES[name])
    assert ours == sigmas


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 0.7, 0.9, 1.0])
def test_strength_cuts_where_image_to_image_cuts(steps: int, strength: float) -> None:
    class Holder:
        pass

    holder = Holder()
    holder.scheduler = scheduler(SCHEDULES["dev"], steps, 1024)
    levels, _ = FluxImg2ImgPipeline.get_timesteps(holder, steps, strength, "cpu")
    ours = timesteps(steps, 1024, SCHEDULES["dev"], strength)
    np.testing.assert_allclose(ours[:-1], levels.numpy() / 1000, rtol=1e-6)
