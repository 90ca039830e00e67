"""The transformer against diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from fluxmesh.models.flux1 import positions
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.tensor_maps import in_bfl_file, transformer_tensors
from fluxmesh.models.flux1.transformer import Flux
from tests.parity.oracles import BOUND, load, normal, randomize, relative_error


@dataclass(frozen=True)
class ParityCase:
    heads: int
    axes: tuple[int, int, int]
    double: int
    single: int
    guidance: bool
    batch: int
    grid: tuple[int, int]  # rows and columns of image tokens
    text: int  # text tokens
    channels: int = 16

    @property
    def oracle_config(self) -> dict:
        return {
            "in_channels": self.channels,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": sum(self.axes),
            "num_attention_heads": self.heads,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 12,
            "guidance_embeds": self.guidance,
            "axes_dims_rope": self.axes,
        }


CASES = {
    "depth 1": ParityCase(2, (4, 6, 6), 1, 1, False, 1, (4, 4), 8),
    "guidance": ParityCase(3, (4, 10, 10), 2, 3, True, 1, (4, 4), 8),
    "three images, wide": ParityCase(3, (2, 4, 6), 2, 2, False, 3, (3, 7), 5),
    "two images, tall, guidance": ParityCase(4, (4, 4, 8), 1, 2, True, 2, (9, 2), 1),
    "one head, one token": ParityCase(1, (8, 8, 8), 1, 1, True, 1, (1, 1), 1, channels=64),
    "twelve heads": ParityCase(12, (4, 6, 6), 2, 4, False, 1, (5, 3), 11, channels=64),
}


def build(case: ParityCase, seed: int = 0) -> tuple[torch.nn.Module, Flux]:
    oracle = randomize(FluxTransformer2DModel(**case.oracle_config), seed)
    config = FluxConfig.from_dict(oracle.config)
    flux = Flux(config)
    load(flux, transformer_tensors(config), oracle)
    return oracle, flux


def inputs(case: ParityCase) -> dict[str, np.ndarray]:
    B, (rows, columns) = case.batch, case.grid
    return {
        "img": normal(B, rows * columns, case.channels, seed=1),
        "txt": normal(B, case.text, 20, seed=2),
        "y": normal(B, 12, seed=3),
        "t": np.linspace(1.0, 0.13, B, dtype=np.float32),
        "img_ids": positions.image_positions(rows, columns),
        "txt_ids": positions.text_positions(case.text),
        "guidance": np.linspace(3.5, 1.25, B, dtype=np.float32),
    }


def run_oracle(oracle: torch.nn.Module, case: ParityCase, x: dict[str, np.ndarray]) -> torch.Tensor:
    return oracle(
        hidden_states=torch.from_numpy(x["img"]),
        encoder_hidden_states=torch.from_numpy(x["txt"]),
        pooled_projections=torch.from_numpy(x["y"]),
        timestep=torch.from_numpy(x["t"]),
        img_ids=torch.from_numpy(x["img_ids"]).float(),
        txt_ids=torch.from_numpy(x["txt_ids"]).float(),
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
        mx.array(x["y"]),
        mx.array(x["guidance"]) if case.guidance else None,
    )
    error = relative_error(velocity, run_oracle(oracle, case, x))
    print(f"transformer, {name}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("name", ["guidance", "three images, wide"])
def test_a_request_s_modulations_equal_diffusers_at_every_step(name: str) -> None:
    """The denoising form: modulation and rotary tables once, then one call a time step."""
    case = CASES[name]
    oracle, flux = build(case, seed=7)
    x = inputs(case)
    steps = np.array([1.0, 0.7731, 0.25], dtype=np.float32)
    guidance = 2.5 if case.guidance else None
    modulations = flux.modulations(mx.array(steps), mx.array(x["y"]), guidance)
    pe = flux.rope(x["txt_ids"], x["img_ids"])
    x["guidance"][:] = 2.5
    for step, t in enumerate(steps):
        x["t"][:] = t
        velocity = flux(mx.array(x["img"]), mx.array(x["txt"]), pe, modulations.at(step))
        assert relative_error(velocity, run_oracle(oracle, case, x)) <= BOUND


def test_large_positions_rotate_as_diffusers_does() -> None:
    """A 2048-pixel image's corner: angles in the hundreds, where float32 products drift."""
    case = ParityCase(2, (4, 6, 6), 1, 1, False, 1, (2, 2), 3)
    oracle, flux = build(case)
    x = inputs(case)
    x["img_ids"] = x["img_ids"] + np.array([0, 126, 511], dtype=np.int32)
    pe = flux.rope(x["txt_ids"], x["img_ids"])
    modulation = flux.modulations(mx.array(x["t"]), mx.array(x["y"])).at(0)
    velocity = flux(mx.array(x["img"]), mx.array(x["txt"]), pe, modulation)
    assert relative_error(velocity, run_oracle(oracle, case, x)) <= BOUND


def test_bfl_layout_names_are_the_module_s_own() -> None:
    """A BFL file needs no renaming: its tensors are the parameters, name by name."""
    case = CASES["guidance"]
    _, flux = build(case)
    names = in_bfl_file(transformer_tensors(flux.config))
    assert all(target.pieces[0].key == name for name, target in names.items())
    assert "double_blocks.1.txt_mlp.2.bias" in names
    assert "final_layer.adaLN_modulation.1.weight" in names
