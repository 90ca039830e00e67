"""FLUX.2's transformer against diffusers' `Flux2Transformer2DModel`."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)

from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.positions import image_positions, text_positions
from fluxmesh.models.flux2.tensor_maps import transformer_tensors
from fluxmesh.models.flux2.transformer import Flux2
from tests.parity.oracles import BOUND, load, normal, randomize, relative_error


@dataclass(frozen=True)
class Flux2Sizes:
    heads: int
    axes: tuple[int, ...]
    double: int
    single: int
    guidance: bool
    batch: int
    grid: tuple[int, int]  # rows and columns of image tokens
    text: int  # text tokens
    references: tuple[tuple[int, int], ...] = ()  # rows and columns of each
    theta: int = 2000

    @property
    def oracle_config(self) -> dict:
        return {
            "in_channels": 16,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": sum(self.axes),
            "num_attention_heads": self.heads,
            "joint_attention_dim": 20,
            "guidance_embeds": self.guidance,
            "axes_dims_rope": self.axes,
            "rope_theta": self.theta,
        }

    @property
    def pictures(self) -> list[tuple[int, int]]:
        return [self.grid, *self.references]


CASES = {
    "depth 1": Flux2Sizes(2, (4, 4, 4, 4), 1, 1, False, 1, (4, 4), 8),
    "guidance": Flux2Sizes(3, (8, 8, 8, 8), 2, 3, True, 1, (4, 4), 8),
    "two images, wide, uneven axes": Flux2Sizes(3, (2, 4, 6, 4), 2, 2, False, 2, (3, 7), 5),
    "other theta": Flux2Sizes(2, (4, 4, 4, 4), 1, 2, True, 1, (9, 2), 1, theta=300),
    "two references": Flux2Sizes(4, (4, 4, 4, 4), 2, 3, False, 1, (4, 6), 9, ((3, 5), (6, 2))),
    "twelve heads": Flux2Sizes(12, (4, 4, 4, 4), 2, 4, False, 1, (5, 3), 11),
}


def build(case: Flux2Sizes, seed: int = 0) -> tuple[torch.nn.Module, Flux2]:
    oracle = randomize(Flux2Transformer2DModel(**case.oracle_config), seed)
    config = Flux2Config.from_dict(oracle.config)
    flux = Flux2(config)
    load(flux, transformer_tensors(config), oracle)
    return oracle, flux


def inputs(case: Flux2Sizes) -> dict[str, np.ndarray]:
    B, tokens = case.batch, sum(rows * columns for rows, columns in case.pictures)
    ids = [image_positions(*grid, picture) for picture, grid in enumerate(case.pictures)]
    return {
        "img": normal(B, tokens, 16, seed=1),
        "txt": normal(B, case.text, 20, seed=2),
        "t": np.linspace(1.0, 0.13, B, dtype=np.float32),
        "img_ids": np.concatenate(ids),
        "txt_ids": text_positions(case.text),
        "guidance": np.linspace(3.5, 1.25, B, dtype=np.float32),
    }


def run_oracle(oracle: torch.nn.Module, case: Flux2Sizes, x: dict[str, np.ndarray]) -> torch.Tensor:
    return oracle(
        hidden_states=torch.from_numpy(x["img"]),
        encoder_hidden_states=torch.from_numpy(x["txt"]),
        timestep=torch.from_numpy(x["t"]),
        img_ids=torch.from_numpy(x["img_ids"]),
        txt_ids=torch.from_numpy(x["txt_ids"]),
        guidance=torch.from_numpy(x["guidance"]) if case.guidance else None,
    ).sample


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_diffusers(name: str) -> None:
    case = CASES[name]
    oracle, flux = build(case)
    x = inputs(case)
    velocity = flux.forward(
        mx.array(x["img"]),
        mx.array(x["img_ids"]),
        mx.array(x["txt"]),
        mx.array(x["txt_ids"]),
        mx.array(x["t"]),
        mx.array(x["guidance"]) if case.guidance else None,
    )
    error = relative_error(velocity, run_oracle(oracle, case, x))
    print(f"FLUX.2's transformer, {name}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("name", ["guidance", "two references"])
def test_a_request_s_modulations_equal_diffusers_at_every_step(name: str) -> None:
    """The denoising form: modulation and rotary tables once, then one call a time step."""
    case = CASES[name]
    oracle, flux = build(case, seed=7)
    x = inputs(case)
    steps = np.array([1.0, 0.7731, 0.25], dtype=np.float32)
    modulations = flux.modulations(mx.array(steps), 2.5 if case.guidance else None)
    pe = flux.rope(x["txt_ids"], x["img_ids"])
    x["guidance"][:] = 2.5
    for step, t in enumerate(steps):
        x["t"][:] = t
        velocity = flux(mx.array(x["img"]), mx.array(x["txt"]), pe, modulations.at(step))
        assert relative_error(velocity, run_oracle(oracle, case, x)) <= BOUND


def test_remembered_references_equal_diffusers_key_value_cache() -> None:
    """klein 9B KV: the first step computes the references, all later ones reuse them."""
    case = CASES["two references"]
    oracle, flux = build(case, seed=3)
    for block in oracle.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in oracle.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    x = inputs(case)
    own = case.grid[0] * case.grid[1]
    # diffusers puts the references first
    noisy, refs = (torch.from_numpy(part) for part in np.split(x["img"], [own], axis=1))
    noisy_ids, ref_ids = (torch.from_numpy(part) for part in np.split(x["img_ids"], [own]))
    text = {
        "encoder_hidden_states": torch.from_numpy(x["txt"]),
        "txt_ids": torch.from_numpy(x["txt_ids"]),
    }
    first, kept = oracle(
        hidden_states=torch.cat([refs, noisy], 1),
        timestep=torch.tensor([0.9]),
        img_ids=torch.cat([ref_ids, noisy_ids]),
        kv_cache_mode="extract",
        num_ref_tokens=refs.shape[1],
        return_dict=False,
        **text,
    )
    later = oracle(
        hidden_states=noisy,
        timestep=torch.tensor([0.4]),
        img_ids=noisy_ids,
        kv_cache=kept,
        kv_cache_mode="cached",
        return_dict=False,
        **text,
    )[0]
    memory = flux.remember(mx.array(refs.numpy()), ref_ids.numpy(), flux.reference_modulation())
    pe = flux.rope(x["txt_ids"], x["img_ids"][:own])
    modulations = flux.modulations(mx.array([0.9, 0.4]))
    for step, expected in enumerate((first, later)):
        velocity = flux(
            mx.array(x["img"][:, :own]),
            mx.array(x["txt"]),
            pe,
            modulations.at(step),
            memory=memory,
        )
        error = relative_error(velocity, expected[:, -own:])
        print(f"remembered references, step {step}: {error:.1e}")
        assert error <= BOUND


def test_large_positions_rotate_as_diffusers_does() -> None:
    """A tall picture's corner, beside the ninth reference: angles in the hundreds."""
    case = CASES["depth 1"]
    oracle, flux = build(case)
    x = inputs(case)
    x["img_ids"] = x["img_ids"] + np.array([90, 126, 511, 0], dtype=np.int32)
    x["txt_ids"] = x["txt_ids"] + np.array([0, 0, 0, 500], dtype=np.int32)
    pe = flux.rope(x["txt_ids"], x["img_ids"])
    modulation = flux.modulations(mx.array(x["t"])).at(0)
    velocity = flux(mx.array(x["img"]), mx.array(x["txt"]), pe, modulation)
    assert relative_error(velocity, run_oracle(oracle, case, x)) <= BOUND
