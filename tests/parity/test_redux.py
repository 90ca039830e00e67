"""FLUX.1 Redux against diffusers: SigLIP and the embedder, and the whole pipeline, float32.

diffusers reads all prompts padded to 512 tokens there, and so does the checkpoint here. One prompt
goes with all pictures, as fluxmesh has it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as TheirPipeline
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from transformers import SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.images import read_picture, to_model_range
from fluxmesh.models.flux1.conditions.pictures import as_siglip_sees
from tests.checkpoints import make_checkpoint
from tests.parity import flux2
from tests.parity.oracles import BOUND, relative_error
from tests.redux_checkpoint import SIGLIP, make_redux

PROMPT = "two dogs on a 猫"
SIZES = [(8, 12), (10, 6)]  # of the output, in latents
CASES: dict[str, tuple[str, Sequence[float]]] = {  # a prompt, and the strength of each picture
    "one picture": (PROMPT, (1.0,)),
    "no words": ("", (1.0,)),
    "weaker": (PROMPT, (0.35,)),
    "two pictures": (PROMPT, (1.0, 1.0)),
    "two that count otherwise": (PROMPT, (0.7, 0.4)),
}


@pytest.fixture(scope="module")
def redux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_redux(tmp_path_factory.mktemp("redux"))


@pytest.fixture(scope="module", params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    guided = request.param == "dev"
    place = tmp_path_factory.mktemp(request.param)
    make_checkpoint(place, seed=4, guidance=guided, t5_max_length=512 if guided else 256)
    return place


def processor() -> Any:
    side = SIGLIP.image_size
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def prior(folder: Path, redux: Path) -> FluxPriorReduxPipeline:
    oracle = TheirPipeline.from_pretrained(folder, dtype=torch.float32)
    return FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel.from_pretrained(redux / "image_encoder"),
        feature_extractor=processor(),
        image_embedder=ReduxImageEncoder.from_pretrained(redux / "image_embedder"),
        text_encoder=oracle.text_encoder,
        tokenizer=oracle.tokenizer,
        text_encoder_2=oracle.text_encoder_2,
        tokenizer_2=oracle.tokenizer_2,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_picture_by_redux(folder: Path, redux: Path, case: str) -> None:
    prompt, strengths = CASES[case]
    size, length = SIZES[len(strengths) - 1], 512 if "dev" in folder.name else 256
    flux = FluxPipeline(str(folder), dtype="float32", redux=str(redux))
    oracle = TheirPipeline.from_pretrained(folder, dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    pictures = [flux2.picture(61 + 7 * k, 90, k) for k in range(len(strengths))]
    before = prior(folder, redux)
    encode = before.encode_prompt
    # which has 512 tokens of a prompt, also for schnell
    before.encode_prompt = lambda **how: encode(**(how | {"max_sequence_length": length}))
    told = before(
        image=list(map(Image.fromarray, pictures)),
        prompt=prompt,
        prompt_embeds_scale=list(strengths),
        pooled_prompt_embeds_scale=list(strengths),
    )
    kept: list[torch.Tensor] = []

    def keep(_pipeline: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    theirs = oracle(
        prompt_embeds=told.prompt_embeds,
        pooled_prompt_embeds=told.pooled_prompt_embeds,
        latents=torch.from_numpy(np.array(flux.noise(5, size))),
        height=8 * size[0],
        width=8 * size[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        output_type="np",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images[0]
    references = list(zip(pictures, strengths, strict=True))
    ours = list(flux.generate_latents(prompt, 1, 3, 2.5, size, 5, references=references))[1:]
    mx.eval(ours)
    errors = [relative_error(*pair) for pair in zip(ours, kept, strict=True)]
    pixels = np.round(theirs * 255).astype(int)
    largest = np.abs(to_pixels(flux.decode(ours[-1], size))[0].astype(int) - pixels).max()
    print(f"latents {', '.join(f'{error:.1e}' for error in errors)}; pixels {largest}/255")
    assert max(errors) <= BOUND
    assert largest <= 1 and pixels.std() > 5
    without = list(flux.generate_latents(prompt, 1, 3, 2.5, size, 5))[-1]
    assert relative_error(without, torch.from_numpy(np.array(ours[-1]))) > 10 * BOUND


def test_siglip_and_the_embedder(redux: Path, tmp_path: Path) -> None:
    """By themselves, of several layers' worth of numbers at once."""
    flux = FluxPipeline(str(make_checkpoint(tmp_path).path), dtype="float32", redux=str(redux))
    flux.read_references_with(str(redux))
    pixels = np.concatenate([to_model_range(flux2.picture(30, 30, k)) for k in range(2)])
    ours = flux.vision["siglip"](mx.array(pixels))
    siglip = SiglipVisionModel.from_pretrained(redux / "image_encoder")
    embedder = ReduxImageEncoder.from_pretrained(redux / "image_embedder")
    with torch.no_grad():
        seen = siglip(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state
        theirs = embedder(seen).image_embeds
    assert ours.shape == (2, 4, 24)
    assert relative_error(ours, seen) <= BOUND
    assert relative_error(flux.vision["redux"](ours), theirs) <= BOUND


@pytest.mark.parametrize("shape", [(384, 384), (99, 801), (31, 17), (1200, 500), (1, 1), (30, 30)])
@pytest.mark.parametrize("side", [384, 30])
def test_a_picture_is_stretched_as_transformers_does_it(shape: tuple[int, int], side: int) -> None:
    picture = flux2.picture(*shape, 7)
    extractor = SiglipImageProcessorPil(size={"height": side, "width": side})
    theirs = extractor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    fitted = as_siglip_sees(picture, side)
    assert fitted.dtype == np.uint8 and fitted.shape == (side, side, 3)
    ours = to_model_range(fitted).transpose(0, 3, 1, 2)
    assert np.abs(ours - theirs).max() <= 1e-6


def test_a_picture_that_is_turned_or_transparent_in_parts_is_seen_as_viewers_show_it() -> None:
    """Laid over white and turned before it is stretched; transformers does neither by itself."""
    rgb, alpha = flux2.picture(40, 70, 3), flux2.picture(40, 70, 4)[..., 0]
    clear = Image.fromarray(np.dstack([rgb, alpha]), "RGBA")
    white = Image.new("RGBA", clear.size, "white")
    shown = Image.alpha_composite(white, clear).convert("RGB")
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by a quarter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clear.rotate(90, expand=True).save(file, "PNG", exif=exif)
    theirs = processor()(shown, return_tensors="np")["pixel_values"]
    ours = to_model_range(as_siglip_sees(read_picture(file.getvalue()), SIGLIP.image_size))
    assert np.abs(ours.transpose(0, 3, 1, 2) - theirs).max() <= 1e-6
