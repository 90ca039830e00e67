"""Every spelling of an adapter's keys in the wild, and what of a file is left out."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from fluxmesh.adapters.reading import open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.models.flux1.adapter_names import components
from fluxmesh.models.flux2.adapter_names import components as flux2_components
from fluxmesh.models.flux2.config import Flux2Config
from tests import checkpoints
from tests.adapter_files import normal, write
from tests.paths import ROOT
from tests.unit.adapters.targets import (
    CLIP,
    CLIP_FC1,
    CONFIG,
    FLUX2_4B,
    IMG_QKV,
    MLP,
    TARGETS,
    TEXT,
    D,
    opened,
    pair,
    refusal,
)

T5_WI = ("text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wi_0", 64, TEXT)
T5_Q = ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", TEXT, TEXT)
IMG_Q = ("transformer", "double_blocks.1.img_attn.qkv", D, D)
IMG_PROJ = ("transformer", "double_blocks.1.img_attn.proj", D, D)
TXT_PROJ = ("transformer", "double_blocks.1.txt_attn.proj", D, D)
MLP_IN = ("transformer", "double_blocks.0.img_mlp.0", MLP, D)
TXT_MLP_OUT = ("transformer", "double_blocks.0.txt_mlp.2", D, MLP)
SINGLE_Q = ("transformer", "single_blocks.1.linear1", D, D)
SINGLE_QKV = ("transformer", "single_blocks.1.linear1", 3 * D, D)
SINGLE_OUT = ("transformer", "single_blocks.1.linear2", D, D + MLP)
AB = ("lora_A.weight", "lora_B.weight")
UP = ("lora_down.weight", "lora_up.weight")
# tool -> (a module as it writes it, how its two keys end, what it means)
SPELLINGS = {
    "diffusers": ("transformer.transformer_blocks.1.attn.to_q", AB, IMG_Q),
    "diffusers, single": ("transformer.single_transformer_blocks.1.attn.to_q", AB, SINGLE_Q),
    "diffusers, processors": (
        "transformer.transformer_blocks.1.attn.processor.to_q_lora",
        ("down.weight", "up.weight"),
        IMG_Q,
    ),
    "diffusers, text": (
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        CLIP_FC1,
    ),
    "diffusers, T5": (
        "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wi_0",
        AB,
        T5_WI,
    ),
    "PEFT": ("base_model.model.transformer_blocks.1.attn.to_q", AB, IMG_Q),
    "PEFT, named": (
        "base_model.model.single_transformer_blocks.1.attn.to_q",
        ("lora_A.default.weight", "lora_B.default.weight"),
        SINGLE_Q,
    ),
    "PEFT, a text encoder": ("base_model.model.text_model.encoder.layers.1.mlp.fc1", AB, CLIP_FC1),
    "kohya": ("lora_unet_double_blocks_1_img_attn_qkv", UP, IMG_QKV),
    "kohya, diffusers' names": ("lora_unet_single_transformer_blocks_1_attn_to_q", UP, SINGLE_Q),
    "kohya, CLIP": ("lora_te1_text_model_encoder_layers_1_mlp_fc1", UP, CLIP_FC1),
    "kohya, CLIP alone": ("lora_te_text_model_encoder_layers_1_mlp_fc1", UP, CLIP_FC1),
    "kohya, T5": ("lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0", UP, T5_WI),
    "OneTrainer": ("lora_transformer_single_transformer_blocks_1_attn_to_q", UP, SINGLE_Q),
    "OneTrainer, CLIP": ("lora_te1_text_model_encoder_layers_1_mlp_fc1", UP, CLIP_FC1),
    "OneTrainer, T5": ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", UP, T5_Q),
    "OMI": ("transformer.double_blocks.1.img_attn.qkv", UP, IMG_QKV),
    "OMI, CLIP": ("clip_l.text_model.encoder.layers.1.mlp.fc1", UP, CLIP_FC1),
    "OMI, T5": ("t5.encoder.block.0.layer.0.SelfAttention.q", UP, T5_Q),
    "ComfyUI": ("diffusion_model.double_blocks.1.img_attn.qkv", UP, IMG_QKV),
    "ComfyUI, whole": ("model.diffusion_model.single_blocks.1.linear2", UP, SINGLE_OUT),
    "ComfyUI, CLIP": (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
        UP,
        CLIP_FC1,
    ),
    "ComfyUI, T5": (
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        UP,
        T5_Q,
    ),
    "ai-toolkit": ("transformer.single_transformer_blocks.1.proj_out", AB, SINGLE_OUT),
    "ai-toolkit, ComfyUI's": ("diffusion_model.single_blocks.1.linear2", AB, SINGLE_OUT),
    "SimpleTuner": ("transformer.transformer_blocks.0.ff.net.0.proj", AB, MLP_IN),
    "SimpleTuner, LyCORIS": ("lycoris_transformer_blocks_0_ff_net_0_proj", UP, MLP_IN),
    "mflux": ("transformer_blocks.0.ff.linear1", ("lora_A", "lora_B"), MLP_IN),
    "mflux, text": ("transformer_blocks.0.ff_context.linear2", ("lora_A", "lora_B"), TXT_MLP_OUT),
    "mflux, out": (
        "transformer.transformer_blocks.1.attn.to_out.0",
        ("lora_A", "lora_B"),
        IMG_PROJ,
    ),
    "x-flux, image": (
        "double_blocks.1.processor.qkv_lora1",
        ("down.weight", "up.weight"),
        IMG_QKV,
    ),
    "x-flux, text": (
        "double_blocks.1.processor.proj_lora2",
        ("down.weight", "up.weight"),
        TXT_PROJ,
    ),
    "x-flux, single": (
        "single_blocks.1.processor.qkv_lora",
        ("down.weight", "up.weight"),
        SINGLE_QKV,
    ),
    "x-flux, ComfyUI's": (
        "diffusion_model.single_blocks.1.processor.proj_lora",
        ("down.weight", "up.weight"),
        SINGLE_OUT,
    ),
    "InvokeAI, Replicate, fal": ("unet.double_blocks.1.img_attn.proj", AB, IMG_PROJ),
    "a prefix cut twice": ("diffusion_model.sformer_blocks.1.attn.to_q", AB, IMG_Q),
    "without a prefix": ("transformer_blocks.1.attn.to_out", AB, IMG_PROJ),
    "te1_": ("te1_text_model_encoder_layers_1_mlp_fc1", UP, CLIP_FC1),
    "t5xxl": ("t5xxl.encoder.block.0.layer.0.SelfAttention.q", AB, T5_Q),
    "lora.down": (
        "transformer.transformer_blocks.1.attn.to_q",
        ("lora.down.weight", "lora.up.weight"),
        IMG_Q,
    ),
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_spelling_is_read(tmp_path, tool):
    module, (down, up), (component, name, out, into) = SPELLINGS[tool]
    a, b = pair(out, into)
    path = write(tmp_path / "a.safetensors", {f"{module}.{down}": a, f"{module}.{up}": b})
    file = opened(path)
    assert file.linears(component) == [name] and not file.notes
    (piece,) = file.change(component, name).pieces
    np.testing.assert_array_equal(piece.term.product(), b @ a)
    assert len(piece.rows) == out


def test_the_page_names_every_spelling():
    """docs/adapters.md shows an example key of each tool, as these tests read it."""
    page = (ROOT / "docs" / "adapters.md").read_text()
    keys = re.findall(r"`([\w.]+\.(?:weight|lora_[aAbB]|alpha|diff(?:_b)?|dora_scale|"
                      r"lokr_w\d(?:_[ab])?|hada_w\d_[ab]))`", page)  # fmt: skip
    sizes = dataclasses.replace(CONFIG, depth=19, depth_single_blocks=38)
    families = (AdapterTargets(components(sizes)), FLUX2_4B)
    from fluxmesh.adapters.keys import role_of

    assert len(keys) > 35
    read = [0, 0]
    for key in keys:
        named = role_of(key)
        assert named is not None, key
        matches = [targets.match(named[0]) is not None for targets in families]
        assert any(matches), key
        read = [count + match for count, match in zip(read, matches, strict=True)]
    assert read[0] > 25 and read[1] > 9


def test_mlx_layout_is_told_by_its_shapes(tmp_path):
    """[in, rank] and [rank, out], as MLX has them, under names of the other layout."""
    a, b = pair(MLP, D)
    module = "transformer_blocks.0.ff.linear1"
    write(tmp_path / "a.safetensors", {f"{module}.lora_A": a.T, f"{module}.lora_B": b.T})
    change = opened(tmp_path / "a.safetensors").change("transformer", MLP_IN[1])
    np.testing.assert_array_equal(change.joined().product(), b @ a)


def test_text_encoders_beside_the_transformer(tmp_path):
    arrays = {}
    for module, (_, _, out, into) in (
        ("lora_unet_double_blocks_1_img_attn_qkv", IMG_QKV),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", CLIP_FC1),
        ("lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0", T5_WI),
        ("lora_te2_text_model_encoder_layers_1_mlp_fc1", CLIP_FC1),  # CLIP-G's
    ):
        a, b = pair(out, into)
        arrays |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}
    file = opened(write(tmp_path / "a.safetensors", arrays))
    assert [file.linears(part) for part in TARGETS.shapes] == [
        [IMG_QKV[1]],
        [CLIP_FC1[1]],
        [T5_WI[1]],
    ]
    (note,) = file.notes
    assert note.startswith("2 keys of ") and "lora_te2_text_model_encoder_layers_1" in note


def test_what_this_model_lacks_and_its_family_has_is_left_out(tmp_path):
    schnell = AdapterTargets(components(checkpoints.TRANSFORMER, CLIP, checkpoints.T5))
    a, b = pair(D, 256)
    arrays = {f"lora_unet_guidance_in_in_layer.lora_{x}.weight": y
              for x, y in (("down", a), ("up", b))}  # fmt: skip
    a, b = pair(D, D)
    arrays |= {"lora_unet_img_in.lora_down.weight": a, "lora_unet_img_in.lora_up.weight": b}
    path = write(tmp_path / "a.safetensors", arrays)
    assert not opened(path).notes
    file = opened(path, schnell)
    assert file.linears("transformer") == ["img_in"]
    assert "no lora_unet_guidance_in_in_layer" in file.notes[0]


def test_bundled_embeddings_are_named_and_left_out(tmp_path):
    a, b = pair(D, D)
    path = write(
        tmp_path / "a.safetensors",
        {
            "lora_unet_img_in.lora_down.weight": a,
            "lora_unet_img_in.lora_up.weight": b,
            "bundle_emb.sks.clip_l": np.zeros((2, 768), np.float32),
            "bundle_emb.sks.t5": np.zeros((2, 4096), np.float32),
        },
    )
    (note,) = opened(path).notes
    assert note.startswith("2 keys") and "sks" in note and "textual inversion" in note


def test_one_linear_under_two_spellings_counts_once(tmp_path):
    a, b = pair(3 * D, D)
    fused = {
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": a,
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": b,
    }
    split = {}
    for k, part in enumerate("qkv"):
        module = f"transformer.transformer_blocks.1.attn.to_{part}"
        split |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b[k * D : (k + 1) * D]}
    file = opened(write(tmp_path / "a.safetensors", fused | split))
    change = file.change("transformer", IMG_QKV[1])
    assert [piece.source for piece in change.pieces] == ["lora_unet_double_blocks_1_img_attn_qkv"]
    np.testing.assert_array_equal(change.joined().product(), b @ a)
    split["transformer.transformer_blocks.1.attn.to_k.lora_B.weight"] = b[:D]
    text = refusal(tmp_path / "b.safetensors", fused | split)
    assert "adapts one linear twice" in text and "to_k" in text


def test_another_family_brings_its_own_names(tmp_path):
    """FLUX.2's tables and prefixes are all that it takes to read its adapters."""
    config = Flux2Config(
        in_channels=128, context_in_dim=64, hidden_size=64, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=(8, 8, 8, 8),
    )  # fmt: skip
    targets = AdapterTargets(flux2_components(config))
    for module in (
        "transformer.transformer_blocks.0.attn.to_q",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "diffusion_model.single_blocks.0.linear1",
        "diffusion_model.sformer_blocks.0.attn.to_q",
        "lycoris_transformer_blocks_0_attn_to_q",
        "lora_unet_double_stream_modulation_img_lin",
        "base_model.model.double_blocks.0.img_attn.qkv",
        "final_layer.adaLN_modulation.1",
        "diffusion_model.transformer_blocks.0.ff.linear_in",
        "transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.0.attn.to_out",
        "lora_transformer_transformer_blocks_0_attn_to_add_out",
    ):
        target = targets.match(module)
        assert target is not None and target.name, module
    out, into = targets.shapes["transformer"]["double_blocks.0.img_attn.qkv"]
    rng = np.random.default_rng(0)
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    arrays = {
        f"{key}.lokr_w1": normal(rng, 4, 4),
        f"{key}.lokr_w2": normal(rng, out // 4, into // 4),
    }
    file = open_adapter(write(tmp_path / "a.safetensors", arrays), targets)
    assert file.kinds == ["LoKr"]
    assert file.change("transformer", "double_blocks.0.img_attn.qkv").pieces[0].term.shape == (
        out,
        into,
    )
