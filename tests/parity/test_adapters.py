"""Adapters' files made by hand as other tools make them, in diffusers and here: the same picture.

And what `fluxmesh adapters` writes: converted files and fused folders, in diffusers.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as DiffusersPipeline

from fluxmesh import FluxPipeline
from fluxmesh.adapters.convert import convert_adapter
from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.engine.stages import to_pixels
from fluxmesh.weights import hub
from tests import checkpoints
from tests.checkpoints import make_checkpoint, write_safetensors

PROMPT = "a red dog on a table"
STEPS, SEED, SIZE, SIDE = 3, 5, (8, 8), 64
CONFIG = dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True)
WIDTH, MLP = CONFIG.hidden_size, CONFIG.mlp_hidden_dim
RANK, ALPHA = 4, 6.0
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=2, guidance=True).path


def factors(rng: np.random.Generator, out: int, into: int) -> tuple[np.ndarray, np.ndarray]:
    """Down [rank, in] and up [out, rank]."""
    drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in ((RANK, into), (out, RANK))]
    return drawn[0] / 3, drawn[1] / 3


def kohya(path: Path) -> Path:
    """sd-scripts' keys, which are BFL's modules with underscores, each with its alpha.

    Not `single_blocks.*.linear1`: diffusers splits that one at FLUX.1's sizes, whatever the model.
    """
    rng = np.random.default_rng(1)
    arrays: Arrays = {}
    for name, out, into in (
        ("double_blocks_0_img_attn_qkv", 3 * WIDTH, WIDTH),
        ("double_blocks_0_txt_attn_qkv", 3 * WIDTH, WIDTH),
        ("double_blocks_1_img_attn_proj", WIDTH, WIDTH),
        ("double_blocks_1_img_mlp_0", MLP, WIDTH),
        ("double_blocks_0_txt_mlp_2", WIDTH, MLP),
        ("double_blocks_1_img_mod_lin", 6 * WIDTH, WIDTH),
        ("single_blocks_0_linear2", WIDTH, WIDTH + MLP),
        ("single_blocks_1_modulation_lin", 3 * WIDTH, WIDTH),
    ):
        down, up = factors(rng, out, into)
        arrays[f"lora_unet_{name}.lora_down.weight"] = down
        arrays[f"lora_unet_{name}.lora_up.weight"] = up
        arrays[f"lora_unet_{name}.alpha"] = np.array(ALPHA, dtype=np.float32)
    write_safetensors(path, arrays)
    return path


def peft(path: Path) -> Path:
    """PEFT's keys as diffusers' training scripts save them, the alpha in the file's header."""
    rng = np.random.default_rng(2)
    arrays: Arrays = {}
    modules = []
    for name, out, into in (
        ("transformer_blocks.0.attn.to_q", WIDTH, WIDTH),
        ("transformer_blocks.0.attn.add_v_proj", WIDTH, WIDTH),
        ("transformer_blocks.1.ff.net.0.proj", MLP, WIDTH),
        ("transformer_blocks.1.attn.to_out.0", WIDTH, WIDTH),
        ("single_transformer_blocks.0.attn.to_k", WIDTH, WIDTH),
        ("single_transformer_blocks.0.proj_mlp", MLP, WIDTH),
        ("single_transformer_blocks.1.proj_out", WIDTH, WIDTH + MLP),
    ):
        down, up = factors(rng, out, into)
        arrays[f"transformer.{name}.lora_A.weight"] = down
        arrays[f"transformer.{name}.lora_B.weight"] = up
        modules.append(name)
    write_safetensors(path, arrays)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "lora_dropout": 0.0}
    text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    return with_metadata(path, {"format": "pt", "lora_adapter_metadata": text})


def with_metadata(path: Path, metadata: dict[str, str]) -> Path:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata)
    return path


MADE = {"kohya": kohya, "peft": peft}


def ours(folder: Path, **more: Any) -> np.ndarray:
    flux = FluxPipeline(str(folder), dtype="float32", **more)
    images = flux.generate_images(
        PROMPT, num_steps=STEPS, guidance=3.5, latent_size=SIZE, seed=SEED
    )
    return to_pixels(images)[0].astype(int)


def theirs(folder: Path, adapter: Path | None = None) -> np.ndarray:
    plain = FluxPipeline(str(folder), dtype="float32")
    oracle = DiffusersPipeline.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        oracle.load_lora_weights(str(adapter))
    oracle.set_progress_bar_config(disable=True)
    noise = np.array(plain.noise(SEED, SIZE))
    images = oracle(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        height=SIDE,
        width=SIDE,
        latents=torch.from_numpy(noise.copy()),
        max_sequence_length=plain.checkpoint.defaults.t5_max_length,
        output_type="np",
    ).images
    return np.asarray(np.round(images[0] * 255))


@pytest.mark.parametrize("tool", MADE)
def test_a_file_of_another_tool_paints_the_same_here_and_in_diffusers(
    folder: Path, tmp_path: Path, tool: str
) -> None:
    file = MADE[tool](tmp_path / f"{tool}.safetensors")
    painted = ours(folder, adapters=[str(file)])
    assert np.abs(painted - theirs(folder, file)).max() <= 1
    assert np.abs(painted - ours(folder)).max() > 5  # the adapter does something


@pytest.mark.parametrize(("tool", "to"), [("peft", "kohya"), ("kohya", "diffusers")])
def test_a_converted_file_paints_the_same_in_diffusers(
    folder: Path, tmp_path: Path, tool: str, to: str
) -> None:
    file = MADE[tool](tmp_path / f"{tool}.safetensors")
    if to == "kohya":  # diffusers reads kohya's linear1 at FLUX.1's sizes only
        file = without(file, "single_transformer_blocks.0")
    convert_adapter(
        file, tmp_path / "converted.safetensors", to, [hub.resolve(str(folder)).architecture]
    )
    expected = ours(folder, adapters=[str(file)])
    converted = tmp_path / "converted.safetensors"
    assert np.abs(expected - theirs(folder, converted)).max() <= 1
    assert np.abs(expected - ours(folder, adapters=[str(converted)])).max() <= 1
    assert np.abs(expected - ours(folder)).max() > 5


def without(path: Path, part: str) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if part not in key}  # noqa: SIM118
        save_file(kept, path, file.metadata())
    return path


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_diffusers_paints_the_same_from_a_fused_folder(tmp_path: Path, layout: str) -> None:
    made = make_checkpoint(tmp_path / "model", seed=2, guidance=True, layout=layout)
    adapters = [(kohya(tmp_path / "a.safetensors"), 0.7), (peft(tmp_path / "b.safetensors"), 1.0)]
    source = hub.resolve(str(made.path))
    fuse_checkpoint(source, tmp_path / "fused", adapters)
    fused = theirs(tmp_path / "fused")
    assert np.abs(fused - ours(tmp_path / "fused")).max() <= 1
    beside = ours(made.path, adapters=[lora_ref(*pair) for pair in adapters])
    assert np.abs(fused - beside).max() <= 1


def lora_ref(path: Path, scale: float) -> Any:
    from fluxmesh.request import AdapterRef

    return AdapterRef(str(path), scale)
