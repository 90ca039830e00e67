"""Control LoRAs, which widen the input and replace norms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fluxmesh.adapters.formats import low_ranks
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError
from fluxmesh.models.flux1.adapter_names import components
from tests.adapter_files import write
from tests.unit.adapters.targets import (
    CONFIG,
    D,
    opened,
    pair,
    refusal,
)


def control_lora(names: str = "bfl") -> dict[str, np.ndarray]:
    """As BFL's for Canny and Depth, or under diffusers' names."""
    a, b = pair(D, 2 * D)
    into, norm = "img_in", "double_blocks.0.img_attn.norm.query_norm.scale"
    if names == "diffusers":
        into, norm = "transformer.x_embedder", "transformer.transformer_blocks.0.attn.norm_q.weight"
    return {
        f"{into}.lora_A.weight": a,
        f"{into}.lora_B.weight": b,
        f"{into}.lora_B.bias": np.ones(D, np.float32),
        norm: np.full(32, 2, np.float32),
    }


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_a_control_lora_widens_the_input_and_replaces_norms(tmp_path, names):
    file = opened(write(tmp_path / "a.safetensors", control_lora(names)))
    assert file.inputs == {("transformer", "img_in"): 2 * D}
    change = file.change("transformer", "img_in")
    assert change.joined().shape == (D, 2 * D) and np.array_equal(change.bias, np.ones(D))
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    assert {name: x.tolist() for name, x in file.replacements("transformer").items()} == {
        norm: [2.0] * 32
    }
    assert file.norms("transformer") == {}  # nothing is added


def test_the_last_modulation_of_a_control_lora_keeps_its_ranks_in_order(tmp_path):
    """diffusers swaps the halves of A's ranks too when it converts BFL's file, which is another
    product: here the file's own is what is added."""
    a, b = pair(2 * D, D)
    key = "final_layer.adaLN_modulation.1"
    arrays = control_lora() | {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    change = opened(write(tmp_path / "a.safetensors", arrays)).change("transformer", key)
    assert np.allclose(change.joined().product(), b @ a, atol=1e-6)
    theirs = "transformer.norm_out.linear"  # the halves of its rows are the other way round
    arrays = {f"{theirs}.lora_A.weight": a, f"{theirs}.lora_B.weight": b}
    change = opened(write(tmp_path / "b.safetensors", arrays)).change("transformer", key)
    assert np.allclose(change.joined().product(), np.roll(b, D, axis=0) @ a, atol=1e-6)


def test_a_norm_of_another_size_is_no_replacement(tmp_path):
    arrays = control_lora()
    arrays["double_blocks.0.img_attn.norm.query_norm.scale"] = np.ones(16, np.float32)
    assert "32" in refusal(tmp_path / "a.safetensors", arrays)


def test_a_control_lora_is_refused_where_the_input_cannot_grow(tmp_path):
    wide = AdapterTargets(
        components(dataclasses.replace(CONFIG, in_channels=2 * D, out_channels=D))
    )
    arrays = {"img_in.lora_A.weight": pair(D, 4 * D)[0], "img_in.lora_B.weight": pair(D, D)[1]}
    path = write(tmp_path / "a.safetensors", arrays)
    with pytest.raises(AdapterError, match="control LoRA: it widens img_in to 256 channels"):
        open_adapter(path, wide)


def test_a_control_lora_can_not_be_converted(tmp_path):
    file = opened(write(tmp_path / "a.safetensors", control_lora()))
    with pytest.raises(AdapterError, match="no other format"):
        low_ranks(file, "transformer")
