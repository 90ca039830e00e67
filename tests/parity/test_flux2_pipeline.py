"""FLUX.2's whole pipeline against diffusers', float32, same weights and noise: text to pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.models.flux2.autoencoder import Flux2AutoEncoder
from fluxmesh.models.flux2.config import (
    Flux2AutoencoderConfig,
    Flux2Config,
    Flux2Schedule,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.references import fitted
from fluxmesh.models.flux2.single_file import flux2_config_of
from fluxmesh.models.flux2.tensor_maps import (
    autoencoder_tensors,
    is_flux2_transformer,
    text_encoder_tensors,
    transformer_tensors,
)
from fluxmesh.models.flux2.text_encoder import TextEncoder
from fluxmesh.models.flux2.tokenizer import ChatTokenizer
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.tensor_map import in_bfl_file
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.storage.safetensors import read_header
from tests.flux2_models import load
from tests.flux2_runtime import Flux2Models
from tests.parity import flux2
from tests.parity.oracles import BOUND, relative_error

PROMPT = "A tiny cat, 42 cats — café\nnaïve x2"
HEIGHT, WIDTH = 64, 96
SIZE = (8, 12)  # latents
REFERENCES = [flux2.picture(70, 101, 3), flux2.picture(64, 80, 4)]

# what diffusers' pipeline of each kind is called with
KINDS: dict[str, dict[str, Any]] = {
    "klein": {"num_inference_steps": 4, "guidance_scale": 1.0},
    "klein base": {"num_inference_steps": 3, "guidance_scale": 4.0},
    "klein KV": {"num_inference_steps": 3},
    "dev": {"num_inference_steps": 3, "guidance_scale": 3.0},
}


class Made:
    """One kind's pipeline, and fluxmesh's runtime of the same files."""

    def __init__(self, kind: str, folder: Path) -> None:
        encoder = "mistral3" if kind == "dev" else "qwen3"
        self.options = KINDS[kind]
        self.parts = flux2.parts(encoder, seed=11 + list(KINDS).index(kind))
        if kind == "dev":
            self.oracle: Any = Flux2Pipeline(**self.parts)
        elif kind == "klein KV":
            self.oracle = Flux2KleinKVPipeline(**self.parts)
        else:
            self.oracle = Flux2KleinPipeline(**self.parts, is_distilled=kind == "klein")
        self.oracle.set_progress_bar_config(disable=True)
        self.folder = flux2.save(self.parts, folder)
        index = dict(self.oracle.config) | {"_class_name": type(self.oracle).__name__}
        (folder / "model_index.json").write_text(json.dumps(index))
        self.runtime = runtime(self.folder, encoder, kind)

    def theirs(
        self, noise: np.ndarray, size: tuple[int, int] = SIZE, **options: Any
    ) -> tuple[list[torch.Tensor], np.ndarray]:
        """diffusers' latents after each step, and its picture in [0, 1]."""
        kept = []

        def keep(_pipeline: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept.append(tensors["latents"].clone())
            return {}

        latents = noise.transpose(0, 2, 1).reshape(1, -1, size[0] // 2, size[1] // 2)
        pictures = self.oracle(
            prompt=PROMPT,
            latents=torch.from_numpy(latents.copy()),
            output_type="np",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
            **{"height": HEIGHT, "width": WIDTH} | self.options | options,
        ).images
        return kept, np.asarray(pictures)

    def ours(
        self, noise: np.ndarray, references: list[np.ndarray] | None = None
    ) -> tuple[list[mx.array], np.ndarray]:
        guidance = self.options.get("guidance_scale", 1.0)
        steps = self.options["num_inference_steps"]
        kept = self.runtime.encode_references(references) if references else None
        request = self.runtime.prepare(
            self.runtime.encode_text(PROMPT, guidance),
            timesteps(steps, noise.shape[1], Flux2Schedule()),
            SIZE,
            guidance,
            kept,
        )
        latents = list(self.runtime.denoise(request, mx.array(noise)))
        return latents, np.array(self.runtime.decode(latents[-1], SIZE))


def runtime(folder: Path, encoder: str, kind: str) -> Flux2Models:
    text = folder / "text_encoder"
    text_config = TextEncoderConfig.from_dict(flux2.config_of(text))
    files = [text / "model.safetensors"]
    config = Flux2Config.from_dict(flux2.config_of(folder / "transformer"))
    ae_config = Flux2AutoencoderConfig.from_dict(flux2.config_of(folder / "vae"))
    weights = "diffusion_pytorch_model.safetensors"
    return Flux2Models(
        transformer=load(
            Flux2(config), transformer_tensors(config), [folder / "transformer" / weights]
        ),
        text_encoder=load(TextEncoder(text_config), text_encoder_tensors(text_config), files),
        embedding=EmbeddingRows(files, text_config),
        tokenizer=ChatTokenizer.from_folder(folder / "tokenizer", encoder),
        autoencoder=load(
            Flux2AutoEncoder(ae_config), autoencoder_tensors(ae_config), [folder / "vae" / weights]
        ),
        is_distilled=kind in ("klein", "klein KV"),
        remembers_references=kind == "klein KV",
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp("flux2"))


def noise_of(seed: int) -> np.ndarray:
    return initial_noise(seed, HEIGHT, WIDTH, channels=4)


def check(ours: tuple[list[mx.array], np.ndarray], theirs: tuple[list[Any], np.ndarray]) -> None:
    steps = [relative_error(*pair) for pair in zip(ours[0], theirs[0], strict=True)]
    pixels = [np.round(picture * 255).astype(np.uint8) for picture in (ours[1], theirs[1])]
    assert pixels[1].std() > 5  # a flat picture would prove nothing
    largest = np.abs(pixels[0].astype(int) - pixels[1].astype(int)).max()
    print(f"latents {', '.join(f'{step:.1e}' for step in steps)}; pixels {largest}/255")
    assert max(steps) <= BOUND
    assert largest <= 1


def test_text_to_image(made: Made) -> None:
    noise = noise_of(7)
    check(made.ours(noise), made.theirs(noise))


def test_a_pipeline_on_the_folder_paints_what_diffusers_paints(made: Made) -> None:
    """As a user has it: by the folder's name, nothing said of what it is."""
    flux = FluxPipeline(str(made.folder), dtype="float32")
    noise = flux.noise(9, SIZE)
    assert np.array_equal(np.array(noise), noise_of(9))
    guidance, steps = made.options.get("guidance_scale", 1.0), made.options["num_inference_steps"]
    latents = list(flux.generate_latents(PROMPT, 1, steps, guidance, SIZE, seed=9))[1:]
    mx.eval(latents)
    check((latents, np.array(flux.decode(latents[-1], SIZE))), made.theirs(noise_of(9)))


def test_reference_pictures(made: Made) -> None:
    """Two of other sizes than the output, neither a multiple of 16."""
    noise = noise_of(8)
    images = [Image.fromarray(picture) for picture in REFERENCES]
    ours = made.ours(noise, REFERENCES)
    check(ours, made.theirs(noise, image=images))
    without = made.ours(noise)
    assert relative_error(ours[0][-1], torch.from_numpy(np.array(without[0][-1]))) > 1e-2


@pytest.mark.parametrize("count", [1, 2])
def test_a_pipeline_on_the_folder_edits_what_diffusers_edits(made: Made, count: int) -> None:
    """As a user has it: files of any size, and the output has that of the first."""
    pictures = REFERENCES[-count:]
    flux = FluxPipeline(str(made.folder), dtype="float32")
    size = flux.latent_size_of(pictures)
    assert size == ((8, 10) if count == 1 else SIZE)
    guidance, steps = made.options.get("guidance_scale", 1.0), made.options["num_inference_steps"]
    latents = list(flux.generate_latents(PROMPT, 1, steps, guidance, seed=9, references=pictures))
    mx.eval(latents[1:])
    images = [Image.fromarray(picture) for picture in pictures]
    given = {"image": images if count == 2 else images[0], "height": None, "width": None}
    theirs = made.theirs(np.array(flux.noise(9, size)), size=size, **given)
    check((latents[1:], np.array(flux.decode(latents[-1], size))), theirs)


def test_a_large_reference_is_scaled_as_diffusers_scales_it(made: Made) -> None:
    processor = made.oracle.image_processor
    for height, width in ((1500, 1111), (700, 2900), (1024, 1030)):
        picture = flux2.picture(height, width, 5)
        image = processor._resize_to_target_area(Image.fromarray(picture), 1024 * 1024)
        width, height = (side // 16 * 16 for side in image.size)
        theirs = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        ours = fitted(picture, 16)
        pixels = np.round((theirs[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        assert np.array_equal(ours, pixels)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfl_s_single_file_gives_the_same_velocity(made: Made, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "flux-2.safetensors"
    flux2.write(flux2.bfl_transformer(made.parts["transformer"]), path, prefix)
    assert is_flux2_transformer(read_header(path).entries)
    folder = made.runtime.transformer
    config = flux2_config_of(path)
    assert config == folder.config
    other = load(Flux2(config), in_bfl_file(transformer_tensors(config)), [path])
    img, txt = mx.random.normal((1, 6, 16)), mx.random.normal((1, 3, 96))
    ids = np.arange(24).reshape(6, 4), np.arange(12).reshape(3, 4)
    calls = [
        flow.forward(img, ids[0], txt, ids[1], mx.array([0.7]), 3.0) for flow in (folder, other)
    ]
    assert np.array_equal(np.array(calls[0]), np.array(calls[1]))
