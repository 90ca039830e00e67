"""The whole pipeline against diffusers', float32, same weights and noise: from text to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline
from diffusers import FluxPipeline as DiffusersPipeline
from diffusers.pipelines.flux import pipeline_flux_img2img, pipeline_flux_inpaint
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.models.flux1.config import ScheduleConfig
from fluxmesh.request import SourceImage
from fluxmesh.sampling import latents
from fluxmesh.weights.hub import tiny_folder
from tests.checkpoints import make_checkpoint

# The prompt is longer than what so small a model reads: both sides cut it.
pytestmark = pytest.mark.filterwarnings("ignore:The model reads:UserWarning")

PROMPT = "two dogs in the park, a red apple & 猫"
STEPS = 4
GUIDANCE = 3.5
SEED = 11
SIZE = (8, 12)  # latents
HEIGHT, WIDTH = 64, 96  # pixels
KINDS = ["schnell-like", "dev-like", "shifted"]
if (tiny_folder() / "model_index.json").is_file():
    KINDS.append("embedded")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of each kind."""
    if request.param == "embedded":
        return tiny_folder()
    place = tmp_path_factory.mktemp("checkpoint")
    if request.param == "schnell-like":
        make_checkpoint(place, seed=1)
    elif request.param == "dev-like":  # guidance embedding, shifted by the image's length
        make_checkpoint(place, seed=2, guidance=True, t5_max_length=32, shards=2)
    else:
        make_checkpoint(place, seed=3, schedule=ScheduleConfig(shift=1.6))
    return place


@pytest.fixture(scope="module")
def flux(folder: Path) -> FluxPipeline:
    return FluxPipeline(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> DiffusersPipeline:
    return DiffusersPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def same_noise(flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws fluxmesh's noise, and takes the mean of what the autoencoder encodes."""
    noise = latents.unpack(np.array(flux.noise(SEED, SIZE)), SIZE).transpose(0, 3, 1, 2)

    def drawn(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        assert tuple(shape) == noise.shape
        return torch.from_numpy(noise.copy())

    def mean(encoded: Any, **_: Any) -> torch.Tensor:
        return encoded.latent_dist.mode()

    for module in (pipeline_flux_img2img, pipeline_flux_inpaint):
        monkeypatch.setattr(module, "randn_tensor", drawn)
        monkeypatch.setattr(module, "retrieve_latents", mean)


def common(flux: FluxPipeline) -> dict[str, Any]:
    """What every diffusers pipeline is called with."""
    return {
        "prompt": PROMPT,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "height": HEIGHT,
        "width": WIDTH,
        "max_sequence_length": flux.checkpoint.defaults.t5_max_length,
        "output_type": "np",
    }


def painted(flux: FluxPipeline, source: SourceImage | None = None) -> np.ndarray:
    images = flux.generate_images(
        PROMPT, num_steps=STEPS, guidance=GUIDANCE, latent_size=SIZE, seed=SEED, source=source
    )
    return to_pixels(images)[0]


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    """In steps of 1/255; `theirs` is float in [0, 1]. A flat picture would prove nothing."""
    pixels = np.round(theirs * 255).astype(np.uint8)
    assert ours.shape == pixels.shape
    assert pixels.std() > 5
    return int(np.abs(ours.astype(int) - pixels.astype(int)).max())


def picture() -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    smooth = [np.sin(rows / 9) + np.cos(columns / (5 + i)) for i in range(3)]
    return np.round(127 + 60 * np.stack(smooth, axis=-1)).astype(np.uint8)


def test_text_to_image(flux: FluxPipeline, oracle: DiffusersPipeline) -> None:
    noise = torch.from_numpy(np.array(flux.noise(SEED, SIZE)))
    theirs = oracle(latents=noise, **common(flux)).images[0]
    assert largest_difference(painted(flux), theirs) <= 1


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image(flux: FluxPipeline, oracle: DiffusersPipeline, strength: float) -> None:
    pipeline = FluxImg2ImgPipeline(**oracle.components)
    image = Image.fromarray(picture())
    theirs = pipeline(image=image, strength=strength, **common(flux)).images[0]
    ours = painted(flux, SourceImage(picture(), strength))
    assert largest_difference(ours, theirs) <= 1


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(flux: FluxPipeline, oracle: DiffusersPipeline, strength: float) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 24:80] = 255  # on the grid of latents, where both read the mask alike
    pipeline = FluxInpaintPipeline(**oracle.components)
    theirs = pipeline(
        image=Image.fromarray(picture()),
        mask_image=Image.fromarray(mask),
        strength=strength,
        **common(flux),
    ).images[0]
    ours = painted(flux, SourceImage(picture(), strength, mask))
    inside = mask == 255
    assert np.array_equal(ours[~inside], picture()[~inside])
    assert largest_difference(ours[inside], theirs[inside]) <= 1


def test_both_layouts_of_one_model_give_the_same_picture(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "diffusers", seed=7)
    files = make_checkpoint(tmp_path / "bfl", seed=7, layout="bfl")
    from_folder = FluxPipeline(str(folder.path), dtype="float32")
    other = FluxPipeline(str(files.path), dtype="float32")
    other_length = other.checkpoint.defaults.t5_max_length
    assert from_folder.checkpoint.defaults.t5_max_length == other_length
    assert np.array_equal(painted(from_folder), painted(other))
