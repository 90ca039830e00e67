"""What no adapter of the model at hand is: another model's, another kind of file."""

from __future__ import annotations

import numpy as np
import pytest

from fluxmesh.adapters.convert import convert_adapter, known_models
from fluxmesh.adapters.describe import describe
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.errors import AdapterError
from tests.adapter_files import write
from tests.unit.adapters.targets import (
    FLUX2_4B,
    TEXT,
    D,
    pair,
    refusal,
)


@pytest.mark.parametrize(
    ("model", "key", "shape"),
    [
        ("SDXL", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (4, 2048)),
        ("Stable Diffusion 1.5", "lora_unet_down_blocks_0_attentions_0_attn2_to_k", (4, 768)),
        ("Stable Diffusion", "unet.up_blocks.0.attentions.0.proj_in", (4, 64)),
        ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", (4, 1536)),
        ("Wan", "diffusion_model.blocks.0.cross_attn.k", (4, 5120)),
        ("Wan", "lora_unet_blocks_0_ffn_0", (4, 5120)),
        ("FLUX.2", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", (4, 64)),
        ("FLUX.2", "diffusion_model.double_stream_modulation_img.lin", (4, 64)),
        ("HunyuanVideo", "lora_unet_double_blocks_0_img_mlp_fc1", (4, 64)),
        ("Qwen-Image", "transformer.transformer_blocks.0.img_mlp.net.0.proj", (4, 64)),
        ("Z-Image", "diffusion_model.layers.0.attention.to_q", (4, 64)),
        ("Chroma", "diffusion_model.distilled_guidance_layer.layers.0.in_layer", (4, 64)),
        ("HiDream", "diffusion_model.double_stream_blocks.0.block.attn1.to_q", (4, 64)),
        ("a language model", "base_model.model.model.layers.0.self_attn.q_proj", (4, 64)),
    ],
)  # fmt: skip
def test_another_models_file_is_told_as_such(tmp_path, model, key, shape):
    a, b = pair(D, shape[1])
    arrays = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    a, b = pair(64, TEXT)  # SDXL's CLIP-L is FLUX's, to the last name
    te1 = "lora_te1_text_model_encoder_layers_1_mlp_fc1"
    arrays |= {f"{te1}.lora_down.weight": a, f"{te1}.lora_up.weight": b}
    text = refusal(tmp_path / "a.safetensors", arrays)
    assert "another model" in text and model in text and "remove" not in text


def test_a_model_of_the_same_names_is_told_by_its_width(tmp_path):
    a, b = pair(3 * 6144, 6144)
    key = "lora_unet_double_blocks_1_img_attn_qkv"
    text = refusal(
        tmp_path / "a.safetensors", {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    )
    assert "FLUX.2 dev" in text and "18432x6144" in text


@pytest.mark.parametrize(
    ("model", "key", "out", "into"),
    [
        ("FLUX.1", "transformer.single_transformer_blocks.0.proj_mlp", 12288, 3072),
        ("FLUX.1", "lora_unet_double_blocks_0_img_mod_lin", 18432, 3072),
        ("FLUX.1", "diffusion_model.single_blocks.0.modulation.lin", 9216, 3072),
        ("FLUX.2 klein 9B", "transformer.transformer_blocks.0.attn.to_q", 4096, 4096),
        ("FLUX.2 dev", "diffusion_model.double_blocks.0.img_attn.qkv", 18432, 6144),
    ],
)
def test_on_flux2_too_another_model_s_file_is_told_as_such(tmp_path, model, key, out, into):
    a, b = np.zeros((1, into), np.float32), np.zeros((out, 1), np.float32)
    ends = ("lora_down.weight", "lora_up.weight")
    path = write(
        tmp_path / "a.safetensors", {f"{key}.{end}": x for end, x in zip(ends, (a, b), strict=True)}
    )
    with pytest.raises(AdapterError, match="another model") as caught:
        open_adapter(path, FLUX2_4B)
    assert model in str(caught.value)


@pytest.mark.parametrize(
    ("module", "out", "into", "family"),
    [
        ("double_blocks.18.img_attn.proj", 3072, 3072, "FLUX.1"),
        ("single_blocks.19.linear2", 3072, 3072 + 9216, "FLUX.2"),  # klein 4B
        ("double_blocks.7.txt_mlp.0", 2 * 12288, 4096, "FLUX.2"),  # klein 9B
        ("guidance_in.in_layer", 6144, 256, "FLUX.2"),  # dev
    ],
)
def test_a_published_model_s_adapter_is_known_without_naming_it(
    tmp_path, module, out, into, family
):
    key = f"diffusion_model.{module}"
    path = write(
        tmp_path / "a.safetensors",
        {
            f"{key}.lora_A.weight": np.ones((1, into), np.float32),
            f"{key}.lora_B.weight": np.ones((out, 1), np.float32),
        },
    )
    models = known_models()
    about = describe(path, models)
    assert (about.family, about.adapts, about.problem) == (family, {"transformer": 1}, "")
    done = convert_adapter(path, tmp_path / "b.safetensors", "diffusers", models)
    assert done.linears == 1
    assert describe(tmp_path / "b.safetensors", models).family == family


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("OFT", "lora_unet_img_in.oft_blocks"),
        ("OFT", "transformer.x_embedder.oft_R.weight"),
        ("BOFT", "transformer.x_embedder.boft_R.weight"),
        ("IA3", "transformer.x_embedder.ia3_l"),
        ("GLoRA", "lora_unet_img_in.a1.weight"),
        ("VeRA", "base_model.model.x_embedder.vera_lambda_b"),
        ("IP-Adapter", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
        ("ControlNet", "controlnet_x_embedder.weight"),
        ("Redux", "redux_up.weight"),
        ("textual inversion", "clip_l"),
        ("textual inversion", "<a-dog>"),
        ("modules_to_save", "base_model.model.x_embedder.modules_to_save.weight"),
        ("replaces whole weights", "diffusion_model.img_in.set_weight"),
        ("a model's own weights", "double_blocks.0.img_attn.qkv.weight"),
    ],
)
def test_other_kinds_are_called_by_their_names(tmp_path, name, key):
    assert name in refusal(tmp_path / "a.safetensors", {key: np.ones((4, 4), np.float32)})
