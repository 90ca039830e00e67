"""Which calls of the transformer FLUX.2's kinds of guidance and references make."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.errors import UsageError
from fluxmesh.models.flux2.positions import image_positions
from fluxmesh.models.flux2.runtime import ReferenceTokens, TextFeatures
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.step_cache import StepCache
from tests.flux2_models import SMALL, random_flux2
from tests.flux2_runtime import Flux2Models

TIMES = [1.0, 0.6, 0.0]
PROMPT, NEGATIVE = mx.ones((1, 5, 20)), mx.zeros((1, 5, 20))
NOISE = mx.random.normal((1, 6, 16), key=mx.random.key(1))


class WatchedFlux2:
    """A transformer that keeps what it was called with, and what it gave."""

    def __init__(self, flux: Flux2) -> None:
        self.flux, self.calls = flux, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flux, name)

    def __call__(self, img: mx.array, txt: mx.array, *rest: Any) -> mx.array:
        velocity = self.flux(img, txt, *rest)
        self.calls.append(SimpleNamespace(img=img, txt=txt, memory=rest[3], velocity=velocity))
        return velocity


def runtime(guidance_embed: bool = False, **options: Any) -> Flux2Models:
    flux = WatchedFlux2(random_flux2(replace(SMALL, guidance_embed=guidance_embed)))
    unused: Any = None
    return Flux2Models(
        transformer=flux,
        text_encoder=unused,
        embedding=unused,
        tokenizer=unused,
        autoencoder=unused,
        **options,
    )


def references() -> ReferenceTokens:
    tokens = mx.random.normal((1, 4, 16), key=mx.random.key(2))
    return ReferenceTokens(tokens, image_positions(2, 2, 1))


@pytest.mark.parametrize(
    ("made", "guidance"),
    [
        (runtime(is_distilled=True), 4.0),  # klein: nothing to guide
        (runtime(is_distilled=False), 1.0),  # a base model, not guided
        (runtime(guidance_embed=True, is_distilled=False), 4.0),  # dev
    ],
    ids=["klein", "base", "dev"],
)
def test_one_call_a_step_where_guidance_is_none_or_embedded(made, guidance: float) -> None:
    request = made.prepare(TextFeatures(PROMPT, NEGATIVE), TIMES, (4, 6), guidance)
    steps = list(made.denoise(request, NOISE))
    assert len(steps) == 2 and len(made.transformer.calls) == 2
    assert all(mx.array_equal(call.txt, PROMPT) for call in made.transformer.calls)


def test_a_base_model_is_asked_twice_a_step_and_moved_away_from_the_negative_prompt() -> None:
    made = runtime(is_distilled=False)
    request = made.prepare(TextFeatures(PROMPT, NEGATIVE), TIMES, (4, 6), 3.0)
    velocity = made.velocity(request, NOISE, 1)
    asked, negative = made.transformer.calls
    assert mx.array_equal(asked.txt, PROMPT) and mx.array_equal(negative.txt, NEGATIVE)
    expected = negative.velocity + 3.0 * (asked.velocity - negative.velocity)
    np.testing.assert_allclose(np.array(velocity), np.array(expected), rtol=1e-6)
    with pytest.raises(UsageError, match="negative"):
        made.prepare(TextFeatures(PROMPT), TIMES, (4, 6), 3.0)


def test_each_of_the_two_calls_has_a_step_cache_of_its_own() -> None:
    made = runtime(is_distilled=False)
    request = made.prepare(TextFeatures(PROMPT, NEGATIVE), TIMES, (4, 6), 3.0)
    caches = [StepCache(1e9), StepCache(1e9)]
    mx.eval(made.velocity(request, NOISE, 0, caches))
    assert [cache.reused for cache in caches] == [False, False]
    mx.eval(made.velocity(request, NOISE, 1, caches))
    assert [cache.reused for cache in caches] == [True, True]


def test_references_follow_the_noisy_tokens_at_every_step_and_are_left_out_of_the_velocity() -> (
    None
):
    made = runtime(is_distilled=True)
    kept = references()
    request = made.prepare(TextFeatures(PROMPT), TIMES, (4, 6), 1.0, kept)
    assert request.pe.shape[-3] == 5 + 6 + 4
    steps = list(made.denoise(request, NOISE))
    assert steps[-1].shape == NOISE.shape
    for call in made.transformer.calls:
        assert mx.array_equal(call.img[:, 6:], kept.tokens) and call.memory is None


def test_a_model_that_remembers_references_never_sees_their_tokens_again() -> None:
    made = runtime(is_distilled=True, remembers_references=True)
    request = made.prepare(TextFeatures(PROMPT), TIMES, (4, 6), 1.0, references())
    assert request.pe.shape[-3] == 5 + 6
    steps = list(made.denoise(request, NOISE))
    assert steps[-1].shape == NOISE.shape
    assert all(call.img.shape == NOISE.shape for call in made.transformer.calls)
    assert all(call.memory is request.memory for call in made.transformer.calls)
    plain = made.prepare(TextFeatures(PROMPT), TIMES, (4, 6), 1.0)
    assert not np.allclose(np.array(list(made.denoise(plain, NOISE))[-1]), np.array(steps[-1]))
