"""BFL's names and their pieces, against diffusers' own conversions of single files and adapters."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers import FluxPipeline as DiffusersPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from fluxmesh.adapters.changes import LowRank
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.tensor_maps import to_diffusers, transformer_tensors
from fluxmesh.weights import hub, loading
from tests import checkpoints
from tests import flux1_adapters as lora
from tests.checkpoints import make_checkpoint
from tests.parity.oracles import BOUND, normal, relative_error

# diffusers' conversions know FLUX's full width only; one block of each kind keeps this small
FULL_WIDTH = FluxConfig(depth=1, depth_single_blocks=1, guidance_embed=True)


def test_the_transformers_single_file_splits_as_diffusers_splits_it():
    tensors = transformer_tensors(FULL_WIDTH)
    rng = np.random.default_rng(0)
    # one column is enough: the conversion deals in rows, and the whole would be 1.5 GB
    arrays = {
        name: rng.standard_normal((target.shape[0], *[1 for _ in target.shape[1:]]))
        for name, target in tensors.items()
    }
    ours = {
        key: np.concatenate([arrays[rows.key][rows.start : rows.stop] for rows in pieces])
        for key, pieces in to_diffusers(tensors).items()
    }
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(state)
    assert state == {}  # every tensor of the single file was understood
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), ours[key], err_msg=key)


def test_the_autoencoders_single_file_is_that_of_diffusers(tmp_path):
    made = make_checkpoint(tmp_path / "bfl", layout="bfl", seed=6)
    folder = make_checkpoint(tmp_path / "diffusers", seed=6).folder
    theirs = AutoencoderKL.from_single_file(
        str(made.folder / "ae.safetensors"), config=str(folder), subfolder="vae"
    ).eval()
    ours = loading.load_autoencoder(hub.resolve(str(made.path)), mx.float32)
    z = normal(1, 16, 4, 6, seed=1)
    with torch.no_grad():
        scaled = torch.from_numpy(z) / ours.config.scale_factor + ours.config.shift_factor
        expected = theirs.decode(scaled).sample.permute(0, 2, 3, 1)
    assert relative_error(ours.decode(mx.array(z.transpose(0, 2, 3, 1))), expected) <= BOUND


# --- adapters ------------------------------------------------------------------------------------


def random_adapter(config: FluxConfig, seed: int, rank: int = 2) -> dict[str, LowRank]:
    rng = np.random.default_rng(seed)
    adapter = {}
    for name, target in transformer_tensors(config).items():
        if name.endswith(".weight"):
            out, into = target.shape
            a = rng.standard_normal((rank, into), dtype=np.float32) / into**0.5
            b = rng.standard_normal((out, rank), dtype=np.float32)
            adapter[name.removesuffix(".weight")] = LowRank(a, b, 0.5)
    return adapter


def change(low: LowRank, x: np.ndarray) -> np.ndarray:
    """What an adapter adds to a linear's output."""
    return low.scale * (low.b @ (low.a @ x))


@pytest.mark.parametrize("file_format", ["kohya", "diffusers"])
def test_diffusers_understands_our_files_as_we_do(tmp_path, file_format):
    adapter = random_adapter(FULL_WIDTH, seed=1)
    path = tmp_path / "ours.safetensors"
    lora.write_adapter(path, adapter, FULL_WIDTH, file_format)
    # diffusers rewrites any format into its own names; what it made of ours is read back
    state, alphas = DiffusersPipeline.lora_state_dict(path, return_alphas=True)
    assert not alphas
    arrays = {key: value.float().numpy() for key, value in state.items()}
    converted = tmp_path / "theirs.safetensors"
    checkpoints.write_safetensors(converted, arrays)
    converted_back = lora.read_adapter(converted, FULL_WIDTH)
    assert converted_back.keys() == adapter.keys()
    for name, low in adapter.items():
        x = np.random.default_rng(2).standard_normal(low.a.shape[1], dtype=np.float32)
        np.testing.assert_allclose(
            change(converted_back[name], x), change(low, x), rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("guidance", [False, True])
def test_an_adapted_transformer_equals_that_of_diffusers(tmp_path, guidance, fuse):
    made = make_checkpoint(tmp_path / "model", seed=8, guidance=guidance)
    config = made.transformer
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(config, seed=3, rank=4), config)
    ours = loading.load_transformer(hub.resolve(str(made.path)), mx.float32)
    lora.apply_adapters(ours, [(path, 0.7)], fuse=fuse)

    theirs = FluxTransformer2DModel.from_pretrained(made.folder, subfolder="transformer").eval()
    plain = velocity(theirs, config)
    theirs.load_lora_adapter(str(path), prefix="transformer", adapter_name="test")
    theirs.set_adapters("test", 0.7)
    expected = velocity(theirs, config)

    inputs = request(config)
    actual = ours.forward(
        **{name: mx.array(value) for name, value in inputs.items()},
        guidance=3.5 if guidance else None,
    )
    assert relative_error(actual, expected) <= BOUND
    assert relative_error(actual, plain) > 0.1  # the adapter does something


def request(config: FluxConfig) -> dict[str, np.ndarray]:
    """Random input of 2 by 3 tokens, by the names of `Flux.forward`."""
    ids = np.stack([np.zeros(6), np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)], axis=-1)
    return {
        "img": normal(1, 6, config.in_channels, seed=1),
        "img_ids": ids.astype(np.float32),
        "txt": normal(1, 5, config.context_in_dim, seed=2),
        "txt_ids": np.zeros((5, 3), dtype=np.float32),
        "timesteps": np.array([0.7], dtype=np.float32),
        "y": normal(1, config.vec_in_dim, seed=3),
    }


def velocity(model: FluxTransformer2DModel, config: FluxConfig) -> torch.Tensor:
    inputs = {name: torch.from_numpy(value) for name, value in request(config).items()}
    with torch.no_grad():
        return model(
            hidden_states=inputs["img"],
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["y"],
            timestep=inputs["timesteps"],
            img_ids=inputs["img_ids"],
            txt_ids=inputs["txt_ids"],
            guidance=torch.tensor([3.5]) if config.guidance_embed else None,
        ).sample


def test_the_random_checkpoints_of_the_tests_load_in_diffusers(tmp_path):
    config = dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True)
    made = make_checkpoint(tmp_path, transformer=config, shards=2)
    _, missing = FluxTransformer2DModel.from_pretrained(
        made.folder, subfolder="transformer", output_loading_info=True
    )
    assert not any(missing.values())
