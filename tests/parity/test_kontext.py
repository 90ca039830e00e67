"""FLUX.1 Kontext's whole pipeline against diffusers', float32, same weights and noise.

The tiny checkpoint reads references at small sizes, put in the place of the published ones on
both sides; which of those is taken, and how a picture gets there, is compared by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.weights import hub
from tests.checkpoints import make_checkpoint
from tests.parity import flux2
from tests.parity.oracles import BOUND, relative_error

PROMPT = "make the sky red & the dog a 猫"
SMALL = ((64, 112), (80, 80), (112, 64))  # (width, height)
SIZES = [(8, 12), (10, 6)]  # of the output, in latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kontext")
    make_checkpoint(place, seed=4, guidance=True, t5_max_length=32)
    index = json.loads((place / "model_index.json").read_text())
    index["_class_name"] = "FluxKontextPipeline"
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    (place / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, and the mean of what the autoencoder encodes."""
    monkeypatch.setattr(kontext, "SIZES", SMALL)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SMALL)

    def mean(encoded: Any, **_: Any) -> torch.Tensor:
        return encoded.latent_dist.mode()

    monkeypatch.setattr(pipeline_flux_kontext, "retrieve_latents", mean)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
def test_an_edited_picture(folder: Path, size: tuple[int, int]) -> None:
    flux = FluxPipeline(str(folder), dtype="float32")
    oracle = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    picture, kept = flux2.picture(90, 61, 3), []

    def keep(_pipeline: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    theirs = oracle(
        image=Image.fromarray(picture),
        prompt=PROMPT,
        latents=torch.from_numpy(np.array(flux.noise(5, size))),
        height=8 * size[0],
        width=8 * size[1],
        max_area=64 * size[0] * size[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=32,
        output_type="np",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images[0]
    ours = list(flux.generate_latents(PROMPT, 1, 3, 2.5, size, 5, references=[picture]))[1:]
    mx.eval(ours)
    errors = [relative_error(*pair) for pair in zip(ours, kept, strict=True)]
    pixels = np.round(theirs * 255).astype(int)
    largest = np.abs(to_pixels(flux.decode(ours[-1], size))[0].astype(int) - pixels).max()
    print(f"latents {', '.join(f'{error:.1e}' for error in errors)}; pixels {largest}/255")
    assert max(errors) <= BOUND
    assert largest <= 1 and pixels.std() > 5
    without = list(flux.generate_latents(PROMPT, 1, 3, 2.5, size, 5))[-1]
    assert relative_error(without, torch.from_numpy(np.array(ours[-1]))) > 1e-2


@pytest.mark.parametrize(
    ("height", "width"), [(1024, 1024), (500, 333), (3000, 4000), (1200, 500), (99, 801)]
)
def test_a_picture_is_brought_to_the_size_that_diffusers_takes(
    folder: Path, height: int, width: int
) -> None:
    picture = flux2.picture(height, width, 7)
    fitted = kontext.fitted(picture)
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    assert sorted(map(tuple, sizes)) == sorted(kontext.SIZES)
    _, *theirs = min((abs(width / height - w / h), w, h) for w, h in sizes)
    assert fitted.shape[:2] == (theirs[1], theirs[0])
    oracle = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    image = oracle.image_processor.resize(Image.fromarray(picture), theirs[1], theirs[0])
    assert np.array_equal(np.asarray(image), fitted)


def test_what_is_written_again_is_kontext_still(folder: Path, tmp_path: Path) -> None:
    checkpoint = hub.resolve(str(folder))
    form, model = checkpoint.family.folder, checkpoint.architecture
    assert form.index(model)["_class_name"] == "FluxKontextPipeline"
    assert model.is_kontext and "references" in model.takes
