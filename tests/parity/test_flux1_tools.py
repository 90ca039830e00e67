"""FLUX.1's Fill, Canny, Depth and true guidance against diffusers' pipelines, whole, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline
from diffusers import FluxPipeline as DiffusersPipeline
from diffusers.models import embeddings
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux import pipeline_flux_fill
from PIL import Image
from safetensors.numpy import save_file

from fluxmesh import FluxPipeline
from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.engine.stages import to_pixels
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.request import SourceImage
from fluxmesh.sampling import latents
from fluxmesh.storage.safetensors import read_json
from fluxmesh.weights import hub
from tests.checkpoints import TRANSFORMER, make_checkpoint, write_json

pytestmark = pytest.mark.filterwarnings("ignore:The model reads:UserWarning")

PROMPT, NEGATIVE = "a red apple on a table", "two dogs"
STEPS, SEED = 3, 11
SIZE = (6, 10)  # latents
HEIGHT, WIDTH = 48, 80  # pixels
TOKEN = TRANSFORMER.out_channels
LATENTS = 1e-4  # relative error


@pytest.fixture(autouse=True)
def like_fluxmesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes the mean of what the autoencoder encodes, and turns time's sinusoids by
    float64 frequencies: its own, in float32, are 2e-3 off where guidance 30 is embedded."""

    def mean(self: Any, generator: Any = None) -> torch.Tensor:
        return self.mode()

    def sinusoids(timesteps: torch.Tensor, dim: int, *_: Any, **__: Any) -> torch.Tensor:
        frequencies = np.exp(-math.log(10_000) * np.arange(dim // 2) / (dim // 2))
        angles = timesteps[:, None].float() * torch.from_numpy(frequencies.astype(np.float32))
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mean)
    monkeypatch.setattr(embeddings, "get_timestep_embedding", sinusoids)


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def uneven_mask() -> np.ndarray:
    """Not on the grid of latents: the order of the mask's channels shows."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[9:30, 21:62] = 255
    return mask


def noise_of(flux: FluxPipeline) -> torch.Tensor:
    return torch.from_numpy(np.array(flux.noise(SEED, SIZE)))


def theirs_of(pipe: Any, **how: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Latents after each step and the picture, by diffusers."""
    kept: list[np.ndarray] = []

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        kept.append(tensors["latents"].numpy().copy())
        return {}

    pipe.set_progress_bar_config(disable=True)
    common = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS} | how
    images = pipe(
        prompt=PROMPT,
        max_sequence_length=16,
        output_type="np",
        callback_on_step_end=keep,
        **common,
    ).images
    return kept, images[0]


def held_to(flux: FluxPipeline, theirs: tuple[list[np.ndarray], np.ndarray], **how: Any) -> None:
    """Latents after every step, and the pixels of the picture that they are."""
    ours = flux.generate_latents(PROMPT, num_steps=STEPS, latent_size=SIZE, seed=SEED, **how)
    next(ours)
    x = None
    for i, (x, expected) in enumerate(zip(ours, theirs[0], strict=True)):
        error = np.linalg.norm(np.array(x) - expected) / np.linalg.norm(expected)
        assert error <= LATENTS, (i, error)
    assert x is not None
    pixels = to_pixels(flux.decode(x, SIZE))[0].astype(int)
    expected = np.round(theirs[1] * 255).astype(int)
    assert expected.std() > 5  # a flat picture would prove nothing
    assert np.abs(pixels - expected).max() <= 1


Makes = Callable[[str], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Makes checkpoints guided as dev is, of so many channels of input; each once."""
    made: dict[int, str] = {}

    def make(in_channels: int) -> str:
        if in_channels not in made:
            place = tmp_path_factory.mktemp(f"flux1-{in_channels}")
            make_checkpoint(
                place,
                seed=in_channels,
                transformer=replace(TRANSFORMER, in_channels=in_channels),
                guidance=True,
            )
            made[in_channels] = str(place)
        return made[in_channels]

    return make


def loaded(folder: str, **how: Any) -> FluxPipeline:
    return FluxPipeline(folder, dtype="float32", **how)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_fill(
    folder: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """Below strength 1 it begins from the picture; nothing is put back after a step."""
    flux = loaded(folder(2 * TOKEN + 256))
    noise = latents.unpack(noise_of(flux).numpy(), SIZE).transpose(0, 3, 1, 2)
    monkeypatch.setattr(
        pipeline_flux_fill, "randn_tensor", lambda *_, **__: torch.from_numpy(noise.copy())
    )
    theirs = theirs_of(
        FluxFillPipeline.from_pretrained(folder(2 * TOKEN + 256)),
        image=Image.fromarray(picture()),
        mask_image=Image.fromarray(uneven_mask()),
        guidance_scale=30.0,
        strength=strength,
    )
    source = SourceImage(picture(), strength, uneven_mask())
    held_to(flux, theirs, guidance=30.0, source=source)


def test_fill_keeps_what_the_mask_does_not_paint(folder: Callable[[int], str]) -> None:
    flux = loaded(folder(2 * TOKEN + 256))
    mask = uneven_mask()
    images = flux.generate_images(
        PROMPT, num_steps=1, latent_size=SIZE, seed=1, source=SourceImage(picture(), 1.0, mask)
    )
    pixels = to_pixels(images)[0]
    assert np.array_equal(pixels[mask == 0], picture()[mask == 0])
    assert not np.array_equal(pixels[mask > 0], picture()[mask > 0])


def test_a_control_map_of_another_size(folder: Callable[[int], str]) -> None:
    """Stretched to the picture's, as diffusers does it."""
    theirs = theirs_of(
        FluxControlPipeline.from_pretrained(folder(2 * TOKEN)),
        control_image=Image.fromarray(picture(70, 50)),
        latents=noise_of(loaded(folder(2 * TOKEN))),
        guidance_scale=30.0,
    )
    held_to(loaded(folder(2 * TOKEN)), theirs, guidance=30.0, control=picture(70, 50))


def control_lora() -> dict[str, np.ndarray]:
    """As BFL's, in diffusers' names: a wider input, biases of B, and norms that replace others."""
    rng, D = np.random.default_rng(9), TRANSFORMER.hidden_size
    widths = {
        "x_embedder": (D, 2 * TOKEN),
        "transformer_blocks.0.attn.to_q": (D, D),
        "single_transformer_blocks.1.proj_out": (D, 5 * D),
    }
    lora = {}
    for name, (rows, columns) in widths.items():
        key = f"transformer.{name}"
        lora[f"{key}.lora_A.weight"] = rng.standard_normal((3, columns)) / columns**0.5
        lora[f"{key}.lora_B.weight"] = rng.standard_normal((rows, 3)) / 3**0.5
        lora[f"{key}.lora_B.bias"] = rng.standard_normal(rows) / 3
    norm = "transformer.transformer_blocks.0.attn.norm_q.weight"
    lora[norm] = 1 + 0.2 * rng.standard_normal(TRANSFORMER.head_dim)
    return {name: array.astype(np.float32) for name, array in lora.items()}


@pytest.mark.parametrize("how", ["beside", "fused", "written"])
def test_a_control_lora_on_dev(folder: Callable[[int], str], tmp_path: Path, how: str) -> None:
    """Also where it is written into a folder, which is a Canny of its own."""
    path = tmp_path / "canny.safetensors"
    save_file(control_lora(), path)
    pipe = FluxControlPipeline.from_pretrained(folder(TOKEN))
    pipe.load_lora_weights({k: torch.from_numpy(v) for k, v in control_lora().items()})
    if how == "written":
        fuse_checkpoint(hub.resolve(folder(TOKEN)), tmp_path / "mine", [(path, 1.0)])
        flux = loaded(str(tmp_path / "mine"))
        index = read_json(tmp_path / "mine" / "model_index.json")
        assert index["_class_name"] == "FluxControlPipeline"
    else:
        flux = loaded(folder(TOKEN), adapters=[str(path)], fuse_adapters=how == "fused")
    theirs = theirs_of(
        pipe,
        control_image=Image.fromarray(picture()),
        latents=noise_of(flux),
        guidance_scale=30.0,
    )
    assert flux.architecture.takes == {"control", "control_from"}
    held_to(flux, theirs, guidance=30.0, control=picture())


def test_a_control_lora_paints_the_same_in_low_memory(
    folder: Callable[[int], str], tmp_path: Path
) -> None:
    """The part that makes modulations is loaded by itself, and gets its part of the LoRA."""
    path = tmp_path / "canny.safetensors"
    save_file(control_lora(), path)
    painted = []
    for low_memory in (False, True):
        flux = loaded(folder(TOKEN), adapters=[str(path)], low_memory=low_memory)
        how = {"num_steps": 1, "latent_size": SIZE, "seed": SEED, "control": picture()}
        painted.append(np.array(flux.generate_images(PROMPT, **how)))
    assert np.array_equal(*painted)


def test_true_guidance_of_kontext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands behind both calls; the negative prompt has another length."""
    monkeypatch.setattr(kontext, "SIZES", ((48, 32),))
    place = tmp_path
    make_checkpoint(place, seed=8, guidance=True)
    pipe = FluxKontextPipeline.from_pretrained(place)
    write_json(
        place / "model_index.json",
        read_json(place / "model_index.json") | {"_class_name": "FluxKontextPipeline"},
    )
    flux = loaded(str(place))
    theirs = theirs_of(
        pipe,
        image=Image.fromarray(picture(32, 48)),
        negative_prompt=NEGATIVE,
        true_cfg_scale=2.5,
        guidance_scale=2.5,
        max_area=HEIGHT * WIDTH,
        latents=noise_of(flux),
        _auto_resize=False,
    )
    held_to(flux, theirs, guidance=2.5, references=[picture(32, 48)], negative=NEGATIVE, cfg=2.5)


def test_true_guidance(folder: Callable[[int], str]) -> None:
    flux = loaded(folder(TOKEN))
    theirs = theirs_of(
        DiffusersPipeline.from_pretrained(folder(TOKEN)),
        negative_prompt=NEGATIVE,
        true_cfg_scale=3.0,
        guidance_scale=1.0,
        latents=noise_of(flux),
    )
    held_to(flux, theirs, guidance=1.0, negative=NEGATIVE, cfg=3.0)
