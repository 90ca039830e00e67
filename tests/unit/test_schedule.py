"""Time steps: their ends, their order, their shift, and what strength leaves of them.

That they are diffusers' to the last bit is held by tests/parity/test_schedule.py.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.errors import UsageError
from fluxmesh.models.flux1.config import ScheduleConfig
from fluxmesh.sampling.schedule import timesteps

SCHNELL = ScheduleConfig()
DEV = ScheduleConfig(use_dynamic_shifting=True, shift=3.0)


def test_schnell_s_steps_are_evenly_spaced() -> None:
    assert timesteps(4, 4096, SCHNELL) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_dev_s_middle_step_moves_with_the_image_s_length() -> None:
    """Half of the noise becomes e^mu / (e^mu + 1): mu is 0.5 at 256 tokens, 1.15 at 4096."""
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        middle = timesteps(2, tokens, DEV)[1]
        assert middle == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), rel=1e-6)


@given(
    steps=st.integers(1, 1000),
    tokens=st.integers(1, 262144),
    schedule=st.sampled_from([SCHNELL, DEV, ScheduleConfig(shift=1.6)]),
    strength=st.floats(0.001, 1.0),
)
def test_steps_fall_from_at_most_one_to_zero(
    steps: int, tokens: int, schedule: ScheduleConfig, strength: float
) -> None:
    """For every request: up to 1000 steps, and 8192x8192 pixels.

    Strictly up to 4096x2048. Of more tokens dev's shift puts the first levels so near to 1 that
    float32 does not tell all of them apart (145 steps of 62821 tokens): a step of length 0 then
    changes nothing. diffusers has the same levels.
    """
    levels = timesteps(steps, tokens, schedule, strength)
    assert 2 <= len(levels) <= steps + 1
    assert levels[-1] == 0.0 < levels[-2]
    falls = [before - after for before, after in zip(levels, levels[1:], strict=False)]
    assert min(falls) >= 0
    assert min(falls) > 0 or (tokens > 32768 and schedule is DEV)
    assert levels == timesteps(steps, tokens, schedule)[-len(levels) :]
    if strength == 1.0:
        assert levels[0] == 1.0


@pytest.mark.parametrize("strength, run", [(1.0, 10), (0.6, 6), (0.55, 6), (0.01, 1)])
def test_strength_runs_its_share_of_the_steps(strength: float, run: int) -> None:
    assert len(timesteps(10, 256, SCHNELL, strength)) == run + 1


@pytest.mark.parametrize("steps, strength", [(0, 1.0), (4, 0.0), (4, 1.1), (4, math.nan)])
def test_senseless_requests_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(UsageError, match="must be"):
        timesteps(steps, 256, SCHNELL, strength)
