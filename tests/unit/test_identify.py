"""What a file is, told by its header: every kind by name, with what to do, in one sentence."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, WeightsError
from fluxmesh.models.files.kinds import OTHER_FAMILY
from fluxmesh.models.flux1.single_file import NAME
from fluxmesh.models.registry import FAMILIES
from fluxmesh.storage.safetensors import write_tensors
from fluxmesh.weights import hub, identify
from fluxmesh.weights.foreign_files import MODELS
from fluxmesh.weights.reader import verify
from tests.checkpoints import make_checkpoint

Shapes = dict[str, tuple[int, ...]]

FLUX1: Shapes = {
    "img_in.weight": (8, 64),
    "final_layer.linear.weight": (64, 8),
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "single_blocks.0.linear1.weight": (56, 8),
    "vector_in.in_layer.weight": (8, 4),
}
T5: Shapes = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (8, 8),
    "shared.weight": (16, 8),
}
CLIP: Shapes = {
    "text_model.embeddings.token_embedding.weight": (16, 8),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "text_model.final_layer_norm.weight": (8,),
}
AE: Shapes = {
    "decoder.conv_in.weight": (8, 16, 3, 3),
    "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
}
UNET = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def behind(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


# (what the file holds, words of the sentence that says what it is, words that say what to do)
OTHER_FILES: dict[str, tuple[Shapes, str, str]] = {
    "kohya's LoRA": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)},
        "LoRA",
        "--adapter",
    ),
    "diffusers' LoRA": (
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)},
        "LoRA",
        "--adapter",
    ),
    "a LoRA of text encoders": ({"lora_te1_x.lora_up.weight": (8, 4)}, "LoRA", "--adapter"),
    "LoKr": ({"lycoris_single_blocks_0_linear1.lokr_w1": (4, 4)}, "LoRA", "--adapter"),
    "LoHa": ({"single_blocks.0.linear1.hada_w1_a": (4, 4)}, "LoRA", "--adapter"),
    "mflux's LoRA": ({"transformer_blocks.0.ff.linear1.lora_A": (4, 8)}, "LoRA", "--adapter"),
    "T5": (T5, "the text encoder T5", "name the file of the transformer"),
    "T5 in GGUF's names": (
        {
            "enc.blk.0.attn_q.weight": (8, 8),
            "enc.blk.0.ffn_gate.weight": (8, 8),
            "token_embd.weight": (16, 8),
        },
        "the text encoder T5",
        "transformer",
    ),
    "UMT5": (
        T5 | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8)},
        "UMT5",
        "t5xxl",
    ),
    "CLIP": (CLIP, "the text encoder CLIP", "transformer"),
    "CLIP of transformers 5": (
        {name.removeprefix("text_model."): shape for name, shape in CLIP.items()},
        "the text encoder CLIP",
        "transformer",
    ),
    "the autoencoder": (AE, "the autoencoder", "transformer"),
    "Stable Diffusion's autoencoder": (
        AE | {"quant_conv.weight": (8, 8, 1, 1)},
        "an autoencoder of Stable Diffusion",
        "FLUX.1",
    ),
    "a diffusers folder's autoencoder": (
        {
            "decoder.conv_in.weight": (8, 16, 3, 3),
            "encoder.conv_in.weight": (8, 3, 3, 3),
            "encoder.conv_norm_out.weight": (8,),
            "encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        },
        "the autoencoder of a diffusers folder",
        "model_index.json",
    ),
    "a diffusers folder's transformer": (
        {
            "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
            "single_transformer_blocks.0.proj_mlp.weight": (32, 8),
        },
        "diffusers folder of FLUX.1",
        "folder above",
    ),
    "mflux's transformer": (
        {"transformer_blocks.0.ff.linear1.weight": (32, 8)},
        "mflux",
        "folder above",
    ),
    "SDXL": (
        behind(
            "model.diffusion_model.",
            {"input_blocks.0.0.weight": (8, 4, 3, 3), "label_emb.0.0.weight": (8, 8)},
        )
        | behind("first_stage_model.", AE),
        "SDXL",
        "FLUX.1",
    ),
    "Stable Diffusion 1.5": (
        behind(
            "model.diffusion_model.",
            {"input_blocks.0.0.weight": (8, 4, 3, 3), UNET: (8, 768)},
        )
        | behind("cond_stage_model.transformer.", CLIP),
        "Stable Diffusion 1.5",
        "FLUX.1",
    ),
    "Stable Diffusion 3": (
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (8, 8)},
        "Stable Diffusion 3",
        "FLUX.1",
    ),
    "a ControlNet": ({"controlnet_x_embedder.weight": (8, 64)}, "ControlNet", "from text"),
    "Redux": (
        {"redux_up.weight": (8, 8), "redux_down.weight": (8, 8)},
        "Redux",
        "beside dev or schnell",
    ),
    "an IP-Adapter": (
        {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (8, 8)},
        "IP-Adapter",
        "from text",
    ),
    "Chroma": (
        FLUX1 | {"distilled_guidance_layer.in_proj.weight": (8, 8)},
        "Chroma",
        "FLUX.1",
    ),
    "FLUX.2's autoencoder": (
        AE | {"bn.running_mean": (128,)},
        "the autoencoder of FLUX.2",
        "name the file of the transformer",
    ),
    "a diffusers folder's autoencoder of FLUX.2": (
        {"decoder.conv_in.weight": (8, 32, 3, 3), "bn.running_mean": (128,)},
        "the autoencoder of a diffusers folder of FLUX.2",
        "folder above",
    ),
    "a diffusers folder's transformer of FLUX.2": (
        {
            "transformer_blocks.0.attn.to_q.weight": (8, 8),
            "single_stream_modulation.linear.weight": (24, 8),
        },
        "the transformer of a diffusers folder of FLUX.2",
        "folder above",
    ),
    "Mistral": (
        {"language_model.model.layers.0.self_attn.q_proj.weight": (8, 8)},
        "Mistral",
        "name the file of the transformer",
    ),
    "Qwen3": (
        {
            "model.layers.0.self_attn.q_proj.weight": (8, 8),
            "model.layers.0.self_attn.q_norm.weight": (8,),
        },
        "Qwen3",
        "name the file of the transformer",
    ),
    "a language model": (
        {"model.layers.0.self_attn.q_proj.weight": (8, 8)},
        "a language model",
        "FLUX.1",
    ),
    "a language model of llama.cpp": (
        {"token_embd.weight": (8, 8), "blk.0.attn_q.weight": (8, 8)},
        "a language model",
        "FLUX.1",
    ),
    "a picture encoder of llama.cpp": (
        {"v.blk.0.attn_q.weight": (8, 8), "mm.0.weight": (8, 8)},
        "a picture encoder",
        "FLUX.1",
    ),
    "Qwen-Image": (
        {"transformer_blocks.0.img_mod.1.weight": (8, 8), "txt_norm.weight": (8,)},
        "Qwen-Image",
        "FLUX.1",
    ),
    "DiffusionKit's": (
        {"multimodal_transformer_blocks.0.image_transformer_block.mlp.fc1.weight": (8, 8)},
        "DiffusionKit",
        "bfloat16",
    ),
    "an embedding": ({"emb_params": (4, 8)}, "textual inversion", "trained for"),
    "an upscaler": ({"body.0.rdb1.conv1.weight": (8, 8, 3, 3)}, "upscaler", "FLUX.1"),
}


def file_of(folder: Path, shapes: Shapes, name: str = "file.safetensors") -> Path:
    arrays = {key: (np.zeros(shape, np.float32), "F32") for key, shape in shapes.items()}
    write_tensors(folder / name, arrays, {})
    return folder / name


@pytest.fixture(autouse=True)
def nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(__import__("sys").modules, "fluxmesh.weights.download", None)
    monkeypatch.delenv("AE", raising=False)


def refusal(path: Path) -> str:
    """What a user reads who names the file as a model; importing what fetches would fail."""
    from fluxmesh_coordinator.console.option_names import in_options

    with pytest.raises(FluxmeshError) as caught:
        hub.resolve(str(path))
    sentence = in_options(str(caught.value))
    assert "\n" not in sentence and sentence.count(str(path)) == 1 and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_that_is_no_model_is_told_by_what_it_is(kind: str, tmp_path: Path) -> None:
    shapes, what, remedy = OTHER_FILES[kind]
    sentence = refusal(file_of(tmp_path, shapes))
    assert what in sentence and remedy in sentence
    assert "models pull" not in sentence


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_folder_with_that_file_alone_is_told_the_same(kind: str, tmp_path: Path) -> None:
    shapes, what, _ = OTHER_FILES[kind]
    (tmp_path / "folder").mkdir()
    file = file_of(tmp_path / "folder", shapes)
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(str(file.parent))
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__fp4", "bitsandbytes"),
        ("double_blocks.0.img_attn.qkv.SCB", "bitsandbytes"),
        ("transformer_blocks.0.qkv_proj.wscales", "nunchaku"),
        ("double_blocks.0.img_attn.qkv.qweight", "GPTQ"),
        ("double_blocks.0.img_attn.qkv.float8_data", "flux-fp8-api"),
    ],
)
def test_numbers_in_a_form_of_others_are_told_by_its_name(
    key: str, form: str, tmp_path: Path
) -> None:
    assert form in refusal(file_of(tmp_path, FLUX1 | {key: (4,)}))


def test_a_file_that_nobody_knows_is_told_by_what_it_holds(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"frobnicator.weight": (4,), "a.b.c.d": (1,)})
    with pytest.raises(WeightsError, match="frobnicator.weight"):
        hub.resolve(str(file))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return path


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x.pth", "x.safetensors"])
def test_a_pickle_is_refused_as_one_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    for path in (zipped(tmp_path / name), write(tmp_path / name, pickle.dumps({"a": 1}))):
        sentence = refusal(path)
        assert "pickle" in sentence and ".safetensors" in sentence


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.ckpt", b"anything", "pickle"),
        ("x.safetensors", b"", "empty"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        ("x.safetensors", b"<!DOCTYPE html><html>Log in", "web page"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("x.onnx", b"\x08\x07\x12", "no other format"),
        ("x.safetensors", b"\xef\xbb\xbf\n <!DOCTYPE html><html>Log in", "web page"),
        ("x.safetensors", b"/annex/objects/SHA256E-s238--0a1b.safetensors\n", "git annex get"),
        ("x.safetensors", b"Entry not found", "begins 'Entry not found'"),
        ("x.safetensors", b'{"error":"Access is restricted"}\n', "text that begins"),
        ("x.gguf", b"Invalid username or password.", "called .gguf"),
        ("x.safetensors", b"bplist00\xd4\x01", "iCloud"),
        ("x.safetensors", b"\x1f\x8b\x08\x00abcdefgh", "archive (gzip)"),
        ("x.safetensors", b"7z\xbc\xaf\x27\x1c\x00\x04abcd", "archive (7z)"),
        ("x.png", b"\x89PNG\r\n\x1a\nabcdefgh", "picture (PNG)"),
        ("model.safetensors.index.json", b'{"metadata": {}}', "name the folder that it is in"),
    ],
)
def test_another_format_is_told_by_its_name(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    assert said in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 3\n", "git lfs pull"),
        (b"Entry not found", "Entry not found"),
        (b"", "is empty"),
    ],
)
def test_in_a_folder_too_a_file_is_told_by_what_lies_in_its_place(
    content: bytes, said: str, tmp_path: Path
) -> None:
    """As where git cloned a repository without LFS."""
    folder = Path(make_checkpoint(tmp_path).path)
    (file,) = (folder / "vae").glob("*.safetensors")
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(file))) as caught:
        verify(hub.resolve(str(folder)))
    assert said in str(caught.value)


def test_a_header_whose_length_looks_like_another_format_is_one(tmp_path: Path) -> None:
    """Its first bytes are a number: 640 begins as a pickle does."""
    for length in (0x0280, 0x3C, 0x043C):
        body = b'{"x.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        if len(body) > length:
            continue
        text = body.ljust(length)
        path = write(tmp_path / "x.safetensors", length.to_bytes(8, "little") + text + bytes(4))
        assert list(identify.contents(path).shapes) == ["x.weight"]


def test_all_that_a_file_holds_is_known_with_its_prefixes(tmp_path: Path) -> None:
    shapes = behind("model.diffusion_model.", FLUX1) | behind("vae.", AE)
    shapes |= behind("text_encoders.t5xxl.transformer.", T5)
    shapes |= behind("text_encoders.clip_l.transformer.", CLIP)
    file = identify.contents(file_of(tmp_path, shapes))
    assert identify.parts(file, NAME) == {
        "transformer": "model.diffusion_model.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
        "text_encoder": "text_encoders.clip_l.transformer.text_model.",
        "vae": "vae.",
    }


def test_a_second_family_needs_a_table_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxmesh.models.files.kinds import FileKind

    new = FileKind("a NEW transformer", names=("new_in.weight",), family="new", component="new")
    monkeypatch.setattr(identify, "KINDS", (new, *identify.KINDS))
    file = identify.contents(file_of(tmp_path, {"x.new_in.weight": (4,)}))
    assert identify.parts(file, "new") == {"new": "x."}


def test_whoever_names_another_model_is_told_every_family(tmp_path: Path) -> None:
    kind = next(kind for kind in MODELS if kind.remedy == OTHER_FAMILY)
    told = str(identify.refusal(tmp_path / "other.safetensors", kind))
    assert all(family.name in told for family in FAMILIES) and "{" not in told
