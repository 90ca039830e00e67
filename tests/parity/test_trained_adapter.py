"""An adapter that fluxmesh has trained, in diffusers: the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as DiffusersPipeline

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.sampling import latents
from fluxmesh.training.local_executor import train
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights.hub import tiny_folder
from tests.checkpoints import make_checkpoint
from tests.datasets import make_dataset

PROMPT = "a red dog on a table"
STEPS, SEED, SIZE, SIDE = 4, 5, (8, 8), 64
KINDS = ["random", *(["embedded"] if (tiny_folder() / "model_index.json").is_file() else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_paints_the_same_picture_with_it(kind: str, tmp_path: Path) -> None:
    folder = tiny_folder() if kind == "embedded" else tmp_path / "model"
    if kind == "random":
        make_checkpoint(folder, seed=2, guidance=True)
    request = TrainRequest(
        dataset=str(make_dataset(tmp_path / "data")),
        seed=1,
        model=str(folder),
        dtype="float32",
        resolution=(SIDE, SIDE),
        num_augmentations=1,
        iterations=6,
        grad_accumulate=1,
        lora_rank=4,
        lora_alpha=8.0,
        warmup_steps=0,
        learning_rate=2e-3,
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
    )
    list(train(request))

    def painted(**more: Any) -> np.ndarray:
        flux = FluxPipeline(str(folder), dtype="float32", **more)
        images = flux.generate_images(
            PROMPT, num_steps=STEPS, guidance=3.5, latent_size=SIZE, seed=SEED
        )
        return to_pixels(images)[0].astype(int)

    ours = painted(adapters=[str(tmp_path / "out")])
    plain = FluxPipeline(str(folder), dtype="float32")
    noise = np.array(plain.noise(SEED, SIZE))
    oracle = DiffusersPipeline.from_pretrained(folder, dtype=torch.float32)
    oracle.load_lora_weights(str(tmp_path / "out" / "final_adapters.safetensors"))
    oracle.set_progress_bar_config(disable=True)
    theirs = oracle(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        height=SIDE,
        width=SIDE,
        latents=torch.from_numpy(noise.copy()),
        max_sequence_length=plain.checkpoint.defaults.t5_max_length,
        output_type="np",
    ).images[0]
    assert noise.shape == (1, SIZE[0] * SIZE[1] // latents.PATCH**2, noise.shape[2])
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert np.abs(ours - painted()).max() > 5  # the adapter does something
