"""Sampling: everything of micro-batch n follows from (seed, n)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.models.flux1.config import FluxConfig, ScheduleConfig
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.training.micro_batches import Sampler, TimeSteps, deal
from tests.flux2_checkpoint import architecture_of

A, B = (64, 64), (48, 80)
UNIFORM = TimeSteps("uniform", ScheduleConfig())


def sampler(seed=3, sizes=(A, A, B, A, B), crops=3, batch=2, times=UNIFORM, dropout=0.3):
    return Sampler(seed, sizes, crops, batch, times, dropout)


def contents(micro):
    return (
        micro.items,
        micro.size,
        micro.times.tobytes(),
        micro.without_caption,
        micro.noise(6, 4).tobytes(),
        micro.dropout_keys(5).tobytes(),
    )


def test_a_micro_batch_is_the_same_whatever_was_asked_before_it():
    in_order = [contents(sampler().micro_batch(n)) for n in range(40)]
    shared = sampler()
    backwards = {n: contents(shared.micro_batch(n)) for n in reversed(range(40))}
    assert in_order == [backwards[n] for n in range(40)]
    assert len(set(in_order)) == 40


def test_another_seed_changes_every_part():
    drawn, others = (contents(sampler(seed).micro_batch(0))[2:] for seed in (3, 4))
    for ours, other in zip(drawn, others, strict=True):
        if not isinstance(ours, tuple):
            assert ours != other


def test_an_epoch_has_every_crop_of_every_image_once_and_never_mixes_sizes():
    made = sampler()
    batches = [made.micro_batch(n) for n in range(made.epoch_length)]
    assert Counter(item for micro in batches for item in micro.items) == Counter(
        (image, crop) for image in range(5) for crop in range(3)
    )
    assert sorted(len(micro.items) for micro in batches) == [1, 2, 2, 2, 2, 2, 2, 2]
    for micro in batches:
        assert {made.sizes[image] for image, _ in micro.items} == {micro.size}
        assert micro.times.shape == (len(micro.items),) == (len(micro.without_caption),)
    second = [made.micro_batch(made.epoch_length + n).items for n in range(made.epoch_length)]
    assert second != [micro.items for micro in batches]


def test_noise_is_standard_normal_and_never_that_of_a_generated_picture():
    micro = sampler(seed=3).micro_batch(0)
    noise = micro.noise(64, 64)
    assert noise.dtype == np.float32 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert not np.isin(noise[0, 0], initial_noise(3, 128, 128)).any()


def test_the_share_of_captions_left_out_is_the_one_asked_for():
    made = sampler(sizes=[A] * 4, batch=4)
    left = [flag for n in range(500) for flag in made.micro_batch(n).without_caption]
    assert np.mean(left) == pytest.approx(0.3, abs=0.05)
    assert not any(sampler(dropout=0).micro_batch(n).without_caption[0] for n in range(50))


def levels(times, size=(512, 512), count=4000):
    return times.draw(np.random.default_rng(0), count, size)


def test_uniform_time_steps_are_shifted_as_generation_is():
    """Uniform quantiles, shifted, are what `timesteps` gives for the same image."""
    dev = ScheduleConfig(use_dynamic_shifting=True)
    drawn = levels(TimeSteps("uniform", dev))
    steps = timesteps(4, 1024, dev)  # 512x512 is 1024 tokens
    for share, level in zip((1.0, 0.75, 0.5, 0.25), steps, strict=False):
        assert np.mean(drawn <= level) == pytest.approx(share, abs=0.025)
    plain = levels(TimeSteps("uniform", ScheduleConfig()))
    assert plain.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.mean() > 0.6
    assert drawn.min() > 0 and drawn.max() <= 1


def test_logit_normal_time_steps_crowd_the_middle():
    drawn = levels(TimeSteps("logit-normal", ScheduleConfig()))
    logits = np.log(drawn / (1 - drawn))
    assert abs(logits.mean()) < 0.05 and logits.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["schnell", "distilled"])
def test_schnell_trains_at_its_four_steps_alone(kind):
    drawn = levels(TimeSteps(kind, ScheduleConfig()))
    assert set(drawn.tolist()) == {0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize(
    ("guidance", "schedule", "kind"),
    [
        (False, ScheduleConfig(), "distilled"),
        (True, ScheduleConfig(use_dynamic_shifting=True), "uniform"),
        (False, ScheduleConfig(shift=1.6), "uniform"),
    ],
)
def test_the_model_decides_how_time_steps_are_drawn(guidance, schedule, kind):
    config = FluxConfig(guidance_embed=guidance)
    model = replace(FLUX1.published["dev"].architecture, transformer=config, schedule=schedule)
    assert TimeSteps.of("auto", model).kind == kind
    assert TimeSteps.of("logit-normal", model).kind == "logit-normal"


@pytest.mark.parametrize(("kind", "steps"), [("klein", 4), ("base", 50), ("dev", 50)])
def test_flux2_s_time_steps_are_shifted_as_its_own_number_of_steps_is(kind, steps):
    """A distilled klein sees the levels of its four steps alone, all others every level."""
    model = architecture_of(kind)
    times = TimeSteps.of("auto", model)
    painted = timesteps(steps, 1024, model.shifting)[:-1]  # 512x512 is 1024 tokens
    drawn = levels(times)
    if kind == "klein":
        assert sorted(set(drawn.tolist()), reverse=True) == pytest.approx(painted, abs=1e-6)
    else:
        assert times.kind == "uniform"
        for share in (0.75, 0.5, 0.25):
            level = painted[round(steps * (1 - share))]
            assert np.mean(drawn <= level) == pytest.approx(share, abs=0.03)


@given(st.integers(0, 70), st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_dealing_gives_every_number_to_one_host_in_proportion(count, shares):
    hands = deal(range(count), shares)
    assert [number for hand in hands for number in hand] == list(range(count))
    for hand, share in zip(hands, shares, strict=True):
        assert abs(len(hand) - count * share / sum(shares)) <= 1


def test_eight_micro_batches_on_three_equal_hosts_are_three_three_and_two():
    assert [len(hand) for hand in deal(range(8), [1, 1, 1])] == [3, 3, 2]
