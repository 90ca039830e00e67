"""FLUX.2's adapters in diffusers: trained here, converted, fused, and ai-toolkit's own LoKr."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from fluxmesh.adapters.convert import convert_adapter
from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.training.local_executor import train
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights import hub
from tests.adapter_files import KINDS, write
from tests.datasets import make_dataset
from tests.flux2_checkpoint import make_single_file
from tests.parity import flux2

PROMPT = "a tiny cat"
SIDE, SIZE, STEPS, SEED = 64, (8, 8), 2, 5
TEXT_LENGTH = 48  # that the tokenizer declares, instead of 512: the prompt and its frame go in
WIDTH, MLP = 64, 192  # of `flux2.transformer`


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of klein's base model, as diffusers saves it."""
    folder = flux2.save(flux2.parts("qwen3", seed=31), tmp_path_factory.mktemp("base"))
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    declared = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(declared.read_text()) | {"model_max_length": TEXT_LENGTH}
    declared.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fluxmesh train` leaves of a few steps, large ones."""
    place = tmp_path_factory.mktemp("trained")
    request = TrainRequest(
        dataset=str(make_dataset(place / "data", sizes=((32, 32),))),
        seed=1,
        model=str(base),
        dtype="float32",
        resolution=(32, 32),
        num_augmentations=1,
        iterations=3,
        grad_accumulate=1,
        lora_rank=4,
        lora_alpha=8.0,
        warmup_steps=0,
        learning_rate=3e-2,
        output_dir=str(place / "out"),
        cache_dir=str(place / "cache"),
    )
    list(train(request))
    return place / "out" / "final_adapters.safetensors"


def ours(folder: Path, *adapters: Path) -> np.ndarray:
    flux = FluxPipeline(str(folder), dtype="float32", adapters=[str(path) for path in adapters])
    images = flux.generate_images(
        PROMPT, num_steps=STEPS, guidance=4.0, latent_size=SIZE, seed=SEED
    )
    return to_pixels(images)[0].astype(int)


def theirs(folder: Path, adapter: Path | None = None) -> np.ndarray:
    oracle = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        oracle.load_lora_weights(str(adapter))
    oracle.set_progress_bar_config(disable=True)
    noise = np.array(FluxPipeline(str(folder), dtype="float32").noise(SEED, SIZE))
    latents = noise.transpose(0, 2, 1).reshape(1, -1, SIZE[0] // 2, SIZE[1] // 2)
    images = oracle(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        latents=torch.from_numpy(latents.copy()),
        max_sequence_length=TEXT_LENGTH,
        output_type="np",
    ).images
    return np.round(np.asarray(images[0]) * 255).astype(int)


@pytest.fixture(scope="module")
def painted(base: Path, trained: Path) -> np.ndarray:
    """With the adapter, here."""
    picture = ours(base, trained)
    assert np.abs(picture - ours(base)).max() > 5  # it does something
    return picture


def test_what_was_trained_paints_the_same_in_diffusers(
    base: Path, trained: Path, painted: np.ndarray
) -> None:
    assert np.abs(painted - theirs(base, trained)).max() <= 1


@pytest.mark.parametrize("to", ["kohya", "ai-toolkit"])
def test_a_converted_file_paints_the_same_in_diffusers(
    base: Path, trained: Path, painted: np.ndarray, tmp_path: Path, to: str
) -> None:
    converted = tmp_path / "converted.safetensors"
    done = convert_adapter(trained, converted, to, [hub.resolve(str(base)).architecture])
    assert done.linears == 2 * 8 + 3 * 2
    assert np.abs(painted - theirs(base, converted)).max() <= 1


def lokr(rng: np.random.Generator, path: Path) -> Path:
    """ai-toolkit's, on fused matrices and others; scale 1, as diffusers takes it."""
    arrays: dict[str, Any] = {}
    for name, out, into in (
        ("double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH),
        ("double_blocks.1.txt_attn.qkv", 3 * WIDTH, WIDTH),
        ("double_blocks.1.img_mlp.0", 2 * MLP, WIDTH),
        ("single_blocks.1.linear1", 3 * WIDTH + 2 * MLP, WIDTH),
        ("single_blocks.2.linear2", WIDTH, WIDTH + MLP),
    ):
        stored, _ = KINDS["lokr_full"](rng, np.zeros((out, into), np.float32))
        arrays |= {f"diffusion_model.{name}.{end}": array for end, array in stored.items()}
    return write(path, arrays)


def test_ai_toolkit_s_lokr_on_fused_matrices_paints_the_same(base: Path, tmp_path: Path) -> None:
    file = lokr(np.random.default_rng(2), tmp_path / "lokr.safetensors")
    picture = ours(base, file)
    assert np.abs(picture - ours(base)).max() > 5
    assert np.abs(picture - theirs(base, file)).max() <= 1


def as_it_is(folder: Path, _target: Path) -> Path:
    return folder


def as_a_single_file(folder: Path, target: Path) -> Path:
    """BFL's file, beside the folder's other parts."""
    shutil.copytree(folder, target)
    file = make_single_file(folder, target / "flux-2-klein-base-4b.safetensors")
    (target / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (target / "model_index.json").unlink()
    return file


@pytest.mark.parametrize("layout", [as_it_is, as_a_single_file])
def test_diffusers_paints_the_same_from_a_fused_folder(
    base: Path,
    trained: Path,
    painted: np.ndarray,
    tmp_path: Path,
    layout: Callable[[Path, Path], Path],
) -> None:
    source = hub.resolve(str(layout(base, tmp_path / "source")))
    fuse_checkpoint(source, tmp_path / "fused", [(trained, 1.0)])
    assert np.abs(painted - ours(tmp_path / "fused")).max() <= 1
    assert np.abs(painted - theirs(tmp_path / "fused")).max() <= 1
