"""Every spelling of an adapter's keys in the wild, and what no adapter of FLUX.1 is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.convert import convert_adapter, known_models
from fluxmesh.adapters.describe import describe
from fluxmesh.adapters.formats import low_ranks
from fluxmesh.adapters.reading import AdapterFile, open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError
from fluxmesh.models.flux1.adapter_names import components
from fluxmesh.models.flux2.adapter_names import components as flux2_components
from fluxmesh.models.flux2.config import KLEIN_4B, Flux2Config
from tests import checkpoints
from tests.adapter_files import alpha, normal, write
from tests.paths import ROOT

CONFIG = dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True)
CLIP = dataclasses.replace(checkpoints.CLIP, vocab_size=64)
TARGETS = AdapterTargets(components(CONFIG, CLIP, checkpoints.T5))
D, MLP, TEXT = 64, 256, 32

CLIP_FC1 = ("text_encoder", "encoder.layers.1.mlp.fc1", 64, TEXT)
T5_WI = ("text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wi_0", 64, TEXT)
T5_Q = ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", TEXT, TEXT)
IMG_QKV = ("transformer", "double_blocks.1.img_attn.qkv", 3 * D, D)
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


def pair(out: int, into: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return normal(rng, 4, into), normal(rng, out, 4)


def opened(path: Path, targets: AdapterTargets = TARGETS) -> AdapterFile:
    return open_adapter(path, targets)


def refusal(path: Path, arrays: dict[str, np.ndarray], **how) -> str:
    write(path, arrays, **how)
    with pytest.raises(AdapterError) as caught:
        opened(path).check_values()
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".")
    return text


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


FLUX2_4B = AdapterTargets(flux2_components(KLEIN_4B), "FLUX.2")


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
        ("modules_to_save", "base_model.model.x_embedder.modules_to_save.weight"),
        ("replaces whole weights", "diffusion_model.img_in.set_weight"),
        ("a model's own weights", "double_blocks.0.img_attn.qkv.weight"),
    ],
)
def test_other_kinds_are_called_by_their_names(tmp_path, name, key):
    assert name in refusal(tmp_path / "a.safetensors", {key: np.ones((4, 4), np.float32)})


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


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16])
def test_an_alpha_may_be_of_any_dtype(tmp_path, dtype):
    a, b = pair(D, D)
    arrays = {
        "lora_unet_img_in.lora_down.weight": a,
        "lora_unet_img_in.lora_up.weight": b,
        "lora_unet_img_in.alpha": np.array(8, dtype),
    }
    change = opened(write(tmp_path / "a.safetensors", arrays)).change("transformer", "img_in")
    assert change.joined().scale == 2
    wide = {key: x.astype(np.float64) for key, x in arrays.items()}
    change = opened(write(tmp_path / "b.safetensors", wide)).change("transformer", "img_in")
    np.testing.assert_array_equal(change.joined().product(), 2 * (b @ a))


def test_fp8_factors_are_read_with_their_scales(tmp_path):
    """Against the formats' own definitions, bit by bit."""

    def value(byte: int, exponent_bits: int) -> float:
        mantissa_bits = 7 - exponent_bits
        exponent = (byte >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = byte & (2**mantissa_bits - 1)
        bias = 2 ** (exponent_bits - 1) - 1
        if exponent:
            size = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        else:
            size = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
        return -size if byte & 0x80 else size

    for dtype, exponent_bits, nans in (("F8_E4M3", 4, {0x7F, 0xFF}), ("F8_E5M2", 5, set())):
        bytes_ = [x for x in range(256) if x not in nans]
        if exponent_bits == 5:
            bytes_ = [x for x in bytes_ if (x & 0x7F) < 0x7C]  # infinity and NaN above
        a = np.resize(np.array(bytes_, np.uint8), (4, D))
        b = np.resize(np.array(bytes_[::-1], np.uint8), (D, 4))
        keys = ("diffusion_model.img_in.lora_A.weight", "diffusion_model.img_in.lora_B.weight")
        arrays = {
            **dict(zip(keys, (a, b), strict=True)),
            "diffusion_model.img_in.lora_A.scale_weight": np.array(0.5, np.float32),
            "scaled_fp8": np.zeros(2, np.uint8),
        }
        dtypes = dict.fromkeys((*keys, "scaled_fp8"), dtype)
        path = write(tmp_path / f"{dtype}.safetensors", arrays, dtypes=dtypes)
        term = opened(path).change("transformer", "img_in").joined()
        lifted = np.vectorize(lambda byte: value(int(byte), exponent_bits))  # noqa: B023
        np.testing.assert_array_equal(term.a, 0.5 * lifted(a))
        np.testing.assert_array_equal(term.b, lifted(b))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_what_is_not_finite_is_named(tmp_path, bad, where):
    a, b = pair(D, D)
    arrays = {
        "lora_unet_img_in.lora_down.weight": a,
        "lora_unet_img_in.lora_up.weight": b,
        "lora_unet_img_in.alpha": alpha(4),
    }
    arrays[f"lora_unet_img_in.{where}"].reshape(-1)[-1] = bad
    text = refusal(tmp_path / "a.safetensors", arrays)
    assert f"lora_unet_img_in.{where} holds NaN or infinity" in text


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


def test_a_file_that_changes_nothing_is_told(tmp_path):
    zero = {"diffusion_model.img_in.diff": np.zeros((D, D), np.float32)}
    assert "changes nothing" in refusal(tmp_path / "a.safetensors", zero)


# --- PEFT's settings -----------------------------------------------------------------------------


def folder_of_peft(folder: Path, modules: dict[str, int], **settings: object) -> Path:
    """A folder as `save_pretrained` leaves it, factors of ones in ranks of their own."""
    arrays = {}
    for module, rank in modules.items():
        key = f"base_model.model.{module}"
        arrays[f"{key}.lora_A.weight"] = np.ones((rank, D), np.float32)
        arrays[f"{key}.lora_B.weight"] = np.ones((D, rank), np.float32)
    folder.mkdir()
    path = write(folder / "adapter_model.safetensors", arrays)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2, 2, 4)),
        ({"use_rslora": True}, (4, 4, 8 / 2**0.5)),
        ({"alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_k": 2}}, (0.5, 2, 4)),
        ({"alpha_pattern": {"transformer_blocks.1.attn.to_q": 4}}, (1, 2, 4)),
        ({"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_[qv]": 4}}, (1, 1, 4)),
        ({"alpha_pattern": {r"^transformer_blocks\.1\.attn\.to_q$": 4}}, (1, 2, 4)),
        ({"alpha_pattern": {"q": 4, "o_q": 4}}, (2, 2, 4)),  # no name's end
        ({"lora_alpha": None}, (1, 1, 1)),
    ],
)
def test_pefts_settings_beside_the_file_scale_it(tmp_path, settings, scales):
    modules = {f"transformer_blocks.1.attn.to_{x}": r for x, r in (("q", 4), ("v", 4), ("k", 2))}
    path = folder_of_peft(tmp_path / "peft", modules, **settings)
    terms = {p.source: p.term for p in opened(path).change("transformer", IMG_QKV[1]).pieces}
    for module, scale in zip(modules, scales, strict=True):
        term = terms[f"base_model.model.{module}"]
        assert isinstance(term, LowRank) and term.scale == pytest.approx(scale), module


@pytest.mark.parametrize("pattern", ["(a+)+b", "x" * 600 + "*"])
def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path, pattern):
    modules = {"transformer_blocks.1.attn.to_q": 4}
    path = folder_of_peft(tmp_path / "peft", modules, alpha_pattern={pattern: 1})
    with pytest.raises(AdapterError, match="repeats a repetition"):
        opened(path).check_values()


def test_settings_that_are_none_are_an_error(tmp_path):
    path = folder_of_peft(tmp_path / "peft", {"x_embedder": 4}, lora_alpha="much")
    with pytest.raises(AdapterError, match=r"adapter_config\.json .* can't be read"):
        opened(path).check_values()
    path.with_name("adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is no JSON"):
        opened(path)


# --- the seam ------------------------------------------------------------------------------------


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
