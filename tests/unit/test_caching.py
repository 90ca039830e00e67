"""The step cache: which steps it skips, what it puts in their place, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.models.flux1.config import ScheduleConfig
from fluxmesh.models.flux1.runtime import plan
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.runtime import DenoisePlan
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling.denoise import Basis, StepState, denoise
from fluxmesh.sampling.schedule import timesteps
from tests.unit.test_denoise import SIZE, make_noise, make_plan, random_flux, random_text

STEPS = 12
SOME = 0.15  # one that skips some steps of the model below
EVERYTHING = 1e9  # a threshold that skips whatever may be skipped


def paint(
    flow: Flux, made: DenoisePlan, threshold: float, seed: int = 3, **more: Any
) -> tuple[list[np.ndarray], list[bool]]:
    """The latents after each step, and which steps were reused."""
    walk = denoise(
        flow, made, make_noise(seed), caches=StepCache.of_calls(made.calls, threshold), **more
    )
    return _evaluated(walk)


def _evaluated(walk: Any) -> tuple[list[np.ndarray], list[bool]]:
    latents, reused = [], []
    for step in walk:
        assert isinstance(step, StepState)
        latents.append(np.array(step.x))
        reused.append(step.reused)
    return latents, reused


def tokens(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32).reshape(1, -1, 1)


def ask(cache: StepCache, added: mx.array, computed: float = 0.0) -> bool:
    """Whether the cache reused, for a step whose blocks would give `computed` everywhere."""
    cache.rest(added, mx.zeros((1, 2, 1)), lambda: mx.full((1, 2, 1), computed))
    return cache.reused


@pytest.fixture(scope="module")
def flow() -> Flux:
    """A random model to which neighbouring steps are alike, as they are to a trained one."""
    made = random_flux()
    layer = made.time_in.out_layer
    layer.weight, layer.bias = layer.weight * 0.02, layer.bias * 0.02
    made.img_in.weight = made.img_in.weight * 0.2
    return made


@pytest.mark.parametrize("threshold", [0.0, 1e-12])
def test_a_cache_that_skips_nothing_changes_no_byte(flow: Flux, threshold: float) -> None:
    made = make_plan(flow, STEPS)
    plain, _ = _evaluated(denoise(flow, made, make_noise()))
    cached, reused = paint(flow, made, threshold)
    assert reused == [False] * STEPS
    assert [a.tobytes() for a in plain] == [b.tobytes() for b in cached]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_first_and_the_last_step_are_always_computed(flow: Flux, steps: int) -> None:
    runs = []

    class CountingCache(Flux):
        def _rest(self, *arguments: Any) -> mx.array:
            runs.append(1)
            return super()._rest(*arguments)

    counting = random_flux()
    counting.__class__ = CountingCache
    _, reused = paint(counting, make_plan(flow, steps), EVERYTHING)
    assert reused == [0 < step < steps - 1 for step in range(steps)]
    assert len(runs) == reused.count(False)  # the others' blocks were not run


def test_more_steps_are_skipped_and_the_picture_is_further_off_with_the_threshold(
    flow: Flux,
) -> None:
    made = make_plan(flow, STEPS)
    plain, _ = _evaluated(denoise(flow, made, make_noise()))
    skipped, errors = [], []
    for threshold in (0.0, 0.1, 0.15, 0.2, 0.4, EVERYTHING):
        latents, reused = paint(flow, made, threshold)
        skipped.append(sum(reused))
        errors.append(float(np.linalg.norm(latents[-1] - plain[-1])))
    assert skipped == sorted(skipped) and len(set(skipped)) >= 4
    assert skipped[0] == 0 and skipped[-1] == STEPS - 2
    assert errors == sorted(errors) and errors[0] == 0 < errors[-1]


def test_what_the_other_blocks_added_is_added_again() -> None:
    cache = StepCache(0.5)
    cache.rest(tokens(1.0, 1.0), tokens(2.0, 3.0), lambda: tokens(12.0, 23.0))
    assert not cache.reused
    x = cache.rest(tokens(1.0, 1.1), tokens(3.0, 5.0), lambda: tokens(0.0, 0.0))
    assert cache.reused
    assert x.tolist() == tokens(13.0, 25.0).tolist()


def test_a_change_counts_from_the_step_that_was_computed_and_not_from_the_last_one() -> None:
    cache = StepCache(0.25)
    assert not ask(cache, tokens(1.0, 1.0))
    assert ask(cache, tokens(1.2, 1.2))
    assert not ask(cache, tokens(1.4, 1.4))
    assert ask(cache, tokens(1.6, 1.6))


def test_a_change_is_the_sum_over_all_tokens() -> None:
    cache = StepCache(0.25)
    ask(cache, tokens(1.0, -3.0))
    assert ask(cache, tokens(1.9, -3.0))  # 0.9 of 4
    assert not ask(cache, tokens(1.9, -2.8))  # 1.1 of 4
    below, at = StepCache(0.5), StepCache(0.5)
    for each in (below, at):
        ask(each, tokens(1.0, 1.0))
    assert ask(below, tokens(1.0, 1.9375)) and not ask(at, tokens(1.0, 2.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_computed(value: float) -> None:
    cache = StepCache(EVERYTHING)
    ask(cache, tokens(1.0, 1.0))
    assert not ask(cache, tokens(1.0, value))
    nothing = StepCache(EVERYTHING)
    ask(nothing, tokens(0.0, 0.0))
    assert not ask(nothing, tokens(0.0, 0.0))


def test_ranks_add_up_their_tokens_and_decide_by_the_sum() -> None:
    """By itself this rank would reuse; another one, whose tokens changed, makes both compute."""
    other = mx.array([[5.0, 1.0]])
    alone, ring = StepCache(0.5), StepCache(0.5, lambda sums: mx.concatenate([sums, other]))
    for cache in (alone, ring):
        ask(cache, tokens(1.0, 1.0))
    assert ask(alone, tokens(1.0, 1.0))
    assert not ask(ring, tokens(1.0, 1.0))
    nothing = mx.zeros((1, 0, 1))  # a rank without a token of the image
    for change, expected in ((5.0, False), (0.1, True)):
        row = mx.array([[change, 1.0]])
        bare = StepCache(0.5, lambda sums, row=row: mx.concatenate([sums, row]))
        ask(bare, nothing)
        assert ask(bare, nothing) is expected


def test_images_share_no_cache(flow: Flux) -> None:
    made = make_plan(flow, STEPS)
    alone = {seed: paint(flow, made, SOME, seed) for seed in (3, 4)}
    assert any(alone[3][1]) and any(alone[4][1])
    walks = [denoise(flow, made, make_noise(seed), caches=[StepCache(SOME)]) for seed in (3, 4)]
    together = [[np.array(step.x) for step in steps] for steps in zip(*walks, strict=True)]
    for place, seed in enumerate((3, 4)):
        assert together[-1][place].tobytes() == alone[seed][0][-1].tobytes()


def guided_plan(flow: Flux) -> DenoisePlan:
    """Two calls a step, of texts so different that each alone would skip other steps."""
    times = timesteps(STEPS, 6, ScheduleConfig())
    negative = {name: 30 * array[:, ::-1] for name, array in random_text().items()}
    return plan(flow, random_text(), times, SIZE, guidance=4.0, negative=negative, cfg=3.0)


@pytest.mark.parametrize("make", [lambda flow: make_plan(flow, STEPS), guided_plan])
def test_an_image_goes_on_to_the_same_bytes_from_the_step_that_was_last_computed(
    flow: Flux, make: Callable[[Flux], DenoisePlan]
) -> None:
    made = make(flow)
    whole, reused = paint(flow, made, SOME)
    assert any(reused[1:]) and not all(reused[1:-1])
    differs = False
    for first in range(1, STEPS):
        basis = max(step for step in range(first) if not reused[step])
        begun = mx.array(whole[basis - 1]) if basis else None
        x = mx.array(whole[first - 1])
        again, flags = paint(flow, made, SOME, first=first, latents=x, basis=Basis(basis, begun))
        assert flags == reused[first:]
        assert [a.tobytes() for a in again] == [b.tobytes() for b in whole[first:]]
        bare, flags = paint(flow, made, SOME, first=first, latents=x)
        assert not flags[0]
        differs = differs or bare[-1].tobytes() != whole[-1].tobytes()
    assert differs  # so that the basis was needed


def test_bfloat16_stays_bfloat16() -> None:
    flow = random_flux(mx.bfloat16)
    made = make_plan(flow, 3)
    cache = StepCache(EVERYTHING)
    for step in range(2):
        mods = made.modulations.at(step)
        velocity = flow(make_noise(), made.text, made.pe, mods, cache)
        assert velocity.dtype == mx.bfloat16
    assert cache.reused
