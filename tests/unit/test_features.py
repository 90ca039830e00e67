"""Named features: bits that travel as they are, and an engine that takes no others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.engine import features
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import UsageError
from fluxmesh.wire.messages.training import Validate

AXES = {"t5": 3, "clip": 2}
T5, CLIP = np.ones((1, 4, 8), np.uint16), np.ones((1, 8), np.uint16)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_prompts_features_are_the_same_bits_on_the_other_side(dtype: mx.Dtype) -> None:
    t5, clip = mx.random.normal((1, 5, 8)).astype(dtype), mx.random.normal((1, 6)).astype(dtype)
    named = features.to_arrays({"t5": t5, "clip": clip})
    assert {array.dtype.name for array in named.values()} <= {"uint16", "float32"}
    assert features.tokens(named) == 5
    text = features.from_arrays(named, AXES)
    assert (text["t5"].dtype, text["clip"].dtype) == (dtype, dtype)
    assert mx.array_equal(text["t5"], t5) and mx.array_equal(text["clip"], clip)


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"words": T5}, "'t5' were needed, and words came"),
        ({"t5": T5}, "'clip' were needed, and t5 came"),
        (
            {"t5": T5[0], "clip": CLIP},
            r"'t5' came as uint16 \[4, 8\]; they are uint16 or float32 of 3 dim",
        ),
        ({"t5": T5, "clip": T5}, "'clip' came as uint16"),
        ({"t5": np.concatenate([T5, T5]), "clip": CLIP}, "'t5' came as uint16"),
    ],
)
def test_features_of_something_else_are_named(named: dict[str, np.ndarray], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        features.from_arrays(named, AXES)


def test_the_latents_of_a_crop_are_one() -> None:
    latents = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    assert np.array_equal(np.array(features.latents({"latents": latents})), latents)
    with pytest.raises(UsageError, match="'latents' were needed, and nothing came"):
        features.latents({})
    with pytest.raises(UsageError, match="'latents' came as uint16"):  # bits of no number
        features.latents({"latents": latents.astype(np.uint16)})


def test_an_engine_names_a_unit_that_it_can_not_do() -> None:
    """One that does not train, say."""
    with pytest.raises(UsageError, match="does no Validate"):
        list(Worker().do(Validate(fence=1, job="job", ring_generation=0)))
