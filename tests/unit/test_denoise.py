"""The sampler on a small random transformer: time, masks, custom losses, nothing evaluated."""

from __future__ import annotations

import io

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from fluxmesh.models.flux1.config import FluxConfig, ScheduleConfig
from fluxmesh.models.flux1.runtime import Flux1Plan, plan
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.runtime import guided_velocity
from fluxmesh.sampling import latents
from fluxmesh.sampling.denoise import denoise
from fluxmesh.sampling.img2img import SourceLatents, mask_latents
from fluxmesh.sampling.schedule import timesteps

SIZE = (4, 6)  # latents
CONFIG = FluxConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)


def random_flux(dtype: mx.Dtype = mx.float32) -> Flux:
    flow = Flux(CONFIG)
    rng = np.random.default_rng(0)
    values = tree_map(lambda p: mx.array(0.2 * rng.standard_normal(p.shape)), flow.parameters())
    flow.update(values)
    flow.set_dtype(dtype)
    return flow


def random_text() -> dict[str, mx.array]:
    rng = np.random.default_rng(1)
    return {
        "t5": mx.array(rng.standard_normal((1, 5, 12)), dtype=mx.float32),
        "clip": mx.array(rng.standard_normal((1, 8)), dtype=mx.float32),
    }


def make_plan(flow: Flux, steps: int = 4, strength: float = 1.0) -> Flux1Plan:
    times = timesteps(steps, 6, ScheduleConfig(), strength)
    return plan(flow, random_text(), times, SIZE, guidance=4.0)


def make_noise(seed: int = 3) -> mx.array:
    return mx.array(latents.initial_noise(seed, 32, 48, channels=4))


def test_every_step_is_an_euler_step_of_the_models_velocity() -> None:
    flow = random_flux()
    made = make_plan(flow)
    x = make_noise()
    for i, step in enumerate(denoise(flow, made, x)):
        t, t_next = made.times[i], made.times[i + 1]
        velocity = flow(x, made.text, made.pe, made.modulations.at(i))
        assert mx.allclose(step.x, x + (t_next - t) * velocity, atol=1e-5)
        assert mx.allclose(step.clean, x - t * velocity, atol=1e-5)
        x = step.x
    assert mx.allclose(step.x, step.clean, atol=1e-5)  # at t = 0 they are the same


def test_latents_stay_float32_under_bfloat16_weights() -> None:
    flow = random_flux(mx.bfloat16)
    made = make_plan(flow, steps=2)
    assert made.text.dtype == mx.bfloat16
    assert [step.x.dtype for step in denoise(flow, made, make_noise())] == [mx.float32] * 2


def test_a_caller_that_stops_early_leaves_the_rest_uncomputed() -> None:
    flow = random_flux()
    calls = []
    forward = type(flow).__call__

    class CountingFlow(Flux):
        def __call__(self, *arguments: mx.array) -> mx.array:
            calls.append(1)
            return forward(self, *arguments)

    flow.__class__ = CountingFlow
    steps = denoise(flow, make_plan(flow), make_noise())
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2


def test_a_source_at_full_strength_without_mask_changes_nothing() -> None:
    flow = random_flux()
    source = SourceLatents(mx.ones((1, 6, 16)), None)
    plain = [step.x for step in denoise(flow, make_plan(flow), make_noise())]
    started = [step.x for step in denoise(flow, make_plan(flow), make_noise(), source=source)]
    assert mx.array_equal(plain[-1], started[-1])


def test_strength_begins_later_and_nearer_to_the_source() -> None:
    flow = random_flux()
    source = SourceLatents(mx.ones((1, 6, 16)), None)
    made = make_plan(flow, steps=4, strength=0.5)
    assert made.steps == 2
    steps = list(denoise(flow, made, make_noise(), source=source))
    assert len(steps) == 2
    start = 0.5 * make_noise() + 0.5 * source.clean
    velocity = flow(start, made.text, made.pe, made.modulations.at(0))
    assert mx.allclose(steps[0].x, start - 0.25 * velocity, atol=1e-5)


def test_what_a_mask_keeps_ends_as_the_source_itself() -> None:
    flow = random_flux()
    mask = np.zeros((32, 48), np.uint8)
    mask[:16] = 255  # the upper row of tokens is painted
    painted = mask_latents(mask, downsampling=8, channels=4)
    source = SourceLatents(mx.random.normal((1, 6, 16), key=mx.random.key(5)), painted)
    *_, last = denoise(flow, make_plan(flow), make_noise(), source=source)
    assert mx.array_equal(last.x[:, 3:], source.clean[:, 3:])
    assert not mx.allclose(last.x[:, :3], source.clean[:, :3], atol=0.1)


def test_a_custom_loss_is_smaller_with_its_guide() -> None:
    flow = random_flux()
    seen = []

    def distance(clean: mx.array, step: int) -> mx.array:
        seen.append((clean.shape, step))
        return 0.2 * mx.sum((clean - 1.0) ** 2)

    def loss_of(x: mx.array) -> float:
        return float(distance(latents.unpack(x, SIZE), 0))

    *_, plain = denoise(flow, make_plan(flow), make_noise())
    *_, guided = denoise(flow, make_plan(flow), make_noise(), guide=distance)
    assert seen == [((1, 4, 6, 4), step) for step in range(4)]
    assert loss_of(guided.x) < 0.5 * loss_of(plain.x)


@pytest.mark.parametrize("guidance_embed", [False, True])
def test_guidance_reaches_only_models_that_embed_it(guidance_embed: bool) -> None:
    config = FluxConfig(**{**vars(CONFIG), "guidance_embed": guidance_embed})
    mx.random.seed(0)
    flow = Flux(config)
    times = timesteps(2, 6, ScheduleConfig())
    weak, strong = (plan(flow, random_text(), times, SIZE, guidance=g) for g in (1.0, 5.0))
    same = bool(mx.allclose(weak.modulations.final, strong.modulations.final, atol=1e-6))
    assert same is not guidance_embed


def test_a_second_call_needs_what_the_first_gave_and_gets_its_inputs_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but data orders two collectives in a CUDA graph: there `depends` does nothing."""
    monkeypatch.setattr(mx, "depends", lambda x, _before: x)
    img = mx.array([[[0.1, -0.0, 3.0]]])
    texts = [mx.ones((1, 2, 4), mx.bfloat16), mx.full((1, 2, 4), 0.3, mx.bfloat16)]
    calls: list[tuple[mx.array, mx.array]] = []

    def ask(x: mx.array, text: mx.array, call: int) -> mx.array:
        calls.append((x, text))
        return mx.erfinv(x) if call == 0 else x  # an operation that nothing else here has

    guided_velocity(ask, img, texts, 3.0)
    for given in calls[1]:
        drawn = io.StringIO()
        mx.export_to_dot(drawn, given)
        assert "ErfInv" in drawn.getvalue()
    for given, own in zip(calls[1], (img, texts[1]), strict=True):
        assert given.dtype == own.dtype
        assert np.array_equal(np.array(given.view(mx.uint8)), np.array(own.view(mx.uint8)))
