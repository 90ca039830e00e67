"""NaN and infinity are an error where they arise, and never a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh import FluxPipeline
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import NotFiniteError
from fluxmesh.request import AdapterRef, SourceImage
from fluxmesh.wire.messages import Decode, Encode, EncodeSource, Stepped
from tests.checkpoints import make_checkpoint
from tests.numerics.units import HEAD, only, painting
from tests.overflowing import PLACES, overflowing, write_lora

ASKED: dict[str, Any] = {"num_steps": 3, "latent_size": (4, 4), "seed": 1}
SOURCE = SourceImage(np.full((32, 32, 3), 90, np.uint8))
# Where it arises -> what the sentence says of it.
SAID = {
    "step": r"step 1 of 3 with (.*) in float32, .*try `fluxmesh models check \1`, which",
    "value": "step 1 of 3",
    "T5": "T5, for this prompt",
    "CLIP": "CLIP, for this prompt",
    "encoder": "the autoencoder, which read the picture",
    "decoder": "the autoencoder with",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_python_api_says_where(tmp_path: Path, place: str) -> None:
    flux = FluxPipeline(str(overflowing(tmp_path, place)), dtype="float32")
    with pytest.raises(NotFiniteError, match=SAID[place]) as caught:
        flux.generate_images("a dog", **ASKED, source=SOURCE if place == "encoder" else None)
    assert str(flux.name) in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_an_engine_says_where(tmp_path: Path, place: str) -> None:
    weights = ModelVariant(str(overflowing(tmp_path / "bad", place)), "float32")
    sound = ModelVariant(str(make_checkpoint(tmp_path / "sound").path), "float32")
    worker = Worker()
    paint = painting(Worker(), sound)
    units = {
        "step": (painted := dataclasses.replace(paint, weights=weights)),
        "value": painted,
        "encoder": EncodeSource(**HEAD, weights=weights, pixels=SOURCE.pixels),
        "decoder": Decode(
            **HEAD, weights=weights, images=(0,), height=32, width=48, latents=paint.noise
        ),
    }
    prompt = Encode(**HEAD, weights=weights, prompt="two dogs")
    with pytest.raises(NotFiniteError, match=SAID[place]):
        only(worker, units.get(place, prompt), Stepped)
    assert worker.quiet == ""


def test_latents_that_are_not_finite_are_not_decoded(tmp_path: Path) -> None:
    flux = FluxPipeline(str(make_checkpoint(tmp_path).path))
    for wrong in (mx.nan, mx.inf, -mx.inf):
        x = flux.noise(1, (4, 4))
        x[0, 3, 5] = wrong
        with pytest.raises(NotFiniteError, match="came out of the latents"):
            flux.decode(x, (4, 4))


def test_steps_that_are_not_kept_say_which_one_and_wait_for_no_other(tmp_path: Path) -> None:
    """A caller that evaluates each step hears of it right after it asks for the next one."""
    flux = FluxPipeline(str(overflowing(tmp_path, "step")), dtype="float32")
    steps = flux.generate_latents("a dog", **ASKED)
    next(steps)
    seen = []
    with pytest.raises(NotFiniteError, match="step 1 of 3"):
        for x in steps:
            mx.eval(x)
            seen.append(x)
    assert len(seen) == 2
    lazy = flux.generate_latents("a dog", **(ASKED | {"num_steps": 1}))
    with pytest.raises(NotFiniteError, match="step 1 of 1"):
        list(lazy)


def test_a_prompt_whose_features_are_not_finite_is_not_remembered(tmp_path: Path) -> None:
    flux = FluxPipeline(str(overflowing(tmp_path, "T5")), dtype="float32")
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="T5"):
            flux.encode("a dog")
    assert not flux.remembers("a dog")


def test_float16_that_overflows_within_a_step_names_the_wider_dtypes(tmp_path: Path) -> None:
    """The file's numbers fit into float16, and so does each step's input; a product does not."""
    model = overflowing(tmp_path, "value", large=6e4)
    with pytest.raises(NotFiniteError, match=r"step 1 of 3 .*try `dtype` bfloat16 or float32\."):
        FluxPipeline(str(model), dtype="float16").generate_images("a dog", **ASKED)
    FluxPipeline(str(model), dtype="float32").generate_images("a dog", **ASKED)


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_that_is_too_strong_is_named_among_what_helps(
    tmp_path: Path, fused: bool
) -> None:
    model = make_checkpoint(tmp_path / "model").path
    lora = write_lora(tmp_path / "lora.safetensors", 1.0)

    def painted(scale: float) -> mx.array:
        flux = FluxPipeline(
            str(model), adapters=[AdapterRef(str(lora), scale)], fuse_adapters=fused
        )
        return flux.generate_images("a dog", **ASKED)

    assert mx.isfinite(painted(1.0)).all().item()
    with pytest.raises(NotFiniteError, match="float32, or a smaller strength for `adapter`"):
        painted(1e38)


@pytest.mark.parametrize("first", [0, 2])
def test_a_step_is_numbered_from_the_beginning_of_its_image(
    worker: Worker, weights: ModelVariant, first: int
) -> None:
    work = painting(worker, weights, steps=4, first=first)
    broken = np.array(work.noise)
    broken[0, 0, 0] = np.inf
    with pytest.raises(NotFiniteError, match=f"step {first + 1} of 4"):
        only(worker, dataclasses.replace(work, latents=broken, noise=broken), Stepped)


@pytest.mark.parametrize("number", [mx.inf, -mx.inf, mx.nan])
def test_infinity_in_a_picture_is_not_taken_for_white_or_black(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    flux = FluxPipeline(str(make_checkpoint(tmp_path).path))
    whole = type(flux.ae).decode_tiled

    def broken(self: Any, z: mx.array) -> mx.array:
        picture = whole(self, z)
        picture[0, 3, 5, 1] = number
        return picture

    monkeypatch.setattr(type(flux.ae), "decode_tiled", broken)
    with pytest.raises(NotFiniteError, match="the autoencoder with"):
        flux.pixels(flux.noise(1, (4, 4)), (4, 4))
