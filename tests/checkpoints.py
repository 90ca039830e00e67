"""Random tiny FLUX checkpoints, written in either file layout with NumPy alone.

Every number is random and none is zero by accident: biases and norm scales too, so that a loader
that forgets one is caught. The pictures are noise; tests that look at pictures use the embedded
checkpoint. `make_checkpoint` writes a whole model with its tokenizers in well under a second.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ScheduleConfig,
    T5Config,
)

Arrays = dict[str, np.ndarray]

# head size 32 with BFL's proportions (1/8, 7/16, 7/16): a BFL file does not say how a head is
# divided, so that the same model can be written in both layouts
TRANSFORMER = FluxConfig(
    in_channels=64,
    out_channels=64,
    vec_in_dim=32,
    context_in_dim=32,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 14, 14),
)
T5 = T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
CLIP = ClipConfig(
    vocab_size=0,  # the tokenizer's
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=0,  # the tokenizer's
)
AUTOENCODER = AutoencoderConfig(widths=(32, 32, 64, 64), num_res_blocks=1)

CLIP_MERGES = ("d o", "do g</w>", "c a", "ca t</w>", "t h", "th e</w>", "r e", "re d</w>", "a n")
SENTENCES = """a red apple on a table
two dogs in the park
the quick brown fox jumps over the lazy dog
a photo of a cat, sitting on a green chair
an astronaut riding a horse on the moon
a blue car to the left of a yellow house
mountains and a lake at sunset, very detailed
PAINTING of 12 flowers in a vase (1889)"""


@dataclass(frozen=True)
class TinyCheckpoint:
    """Where a random checkpoint lies and what it is made of."""

    folder: Path
    layout: str  # "diffusers" or "bfl"
    transformer: FluxConfig
    t5: T5Config
    clip: ClipConfig
    autoencoder: AutoencoderConfig
    schedule: ScheduleConfig

    @property
    def path(self) -> Path:
        """What a user would name: the folder, or BFL's single file of the transformer."""
        return self.folder if self.layout == "diffusers" else self.folder / "flux1-test.safetensors"


def make_checkpoint(
    folder: Path | str,
    *,
    seed: int = 0,
    layout: str = "diffusers",
    transformer: FluxConfig = TRANSFORMER,
    t5: T5Config = T5,
    clip: ClipConfig = CLIP,
    autoencoder: AutoencoderConfig = AUTOENCODER,
    schedule: ScheduleConfig | None = None,
    t5_max_length: int = 16,
    dtype: str = "float32",
    shards: int = 1,
    guidance: bool = False,
) -> TinyCheckpoint:
    """Writes a random model under `folder` and says what it wrote.

    The same seed and sizes give the same numbers in both layouts. `layout="bfl"` writes
    `flux1-test.safetensors` and `ae.safetensors` with the text encoders beside them. `dtype` is
    "float32" or "bfloat16"; `shards` above 1 splits the transformer with an index file.
    `guidance` adds a guidance embedding and dev's schedule. A folder's pictures are 32x32 in 2
    steps unless asked otherwise; a single file has no place to say so.
    """
    folder = Path(folder)
    if guidance:
        transformer = dataclasses.replace(transformer, guidance_embed=True)
    schedule = schedule or ScheduleConfig(use_dynamic_shifting=transformer.guidance_embed)
    vocabulary = clip_vocabulary()
    clip = dataclasses.replace(
        clip, vocab_size=len(vocabulary), eos_token_id=vocabulary["<|endoftext|>"]
    )
    made = TinyCheckpoint(folder, layout, transformer, t5, clip, autoencoder, schedule)
    write_tokenizers(folder, t5_max_length, clip.max_position_embeddings)
    tensors = {
        "transformer": tensor_maps.transformer_tensors(transformer),
        "text_encoder": tensor_maps.clip_tensors(clip),
        "text_encoder_2": tensor_maps.t5_tensors(t5),
        "vae": tensor_maps.autoencoder_tensors(autoencoder),
    }
    arrays = {
        name: random_arrays(targets, np.random.default_rng([seed, i]))
        for i, (name, targets) in enumerate(tensors.items())
    }
    write_json(folder / "text_encoder" / "config.json", clip_config_json(clip))
    write_json(folder / "text_encoder_2" / "config.json", t5_config_json(t5))
    for name in ("text_encoder", "text_encoder_2"):
        write_safetensors(folder / name / "model.safetensors", arrays[name], dtype)
    if layout == "bfl":
        write_safetensors(folder / "flux1-test.safetensors", arrays["transformer"], dtype)
        write_safetensors(folder / "ae.safetensors", arrays["vae"], dtype)
        return made
    for name in ("transformer", "vae"):
        arrays[name] = to_diffusers(tensors[name], arrays[name])
    weights = "diffusion_pytorch_model.safetensors"
    write_sharded(folder / "transformer" / weights, arrays["transformer"], dtype, shards)
    write_safetensors(folder / "vae" / weights, arrays["vae"], dtype)
    write_json(folder / "transformer" / "config.json", transformer_config_json(transformer))
    write_json(folder / "vae" / "config.json", autoencoder_config_json(autoencoder))
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", **dataclasses.asdict(schedule)},
    )
    write_json(folder / "model_index.json", MODEL_INDEX)
    defaults = {"steps": 2, "guidance": 4.0, "height": 32, "width": 32}
    write_json(folder / "fluxmesh.json", {"format": 1, "defaults": defaults})
    return made


def random_arrays(targets: tensor_maps.Tensors, rng: np.random.Generator) -> Arrays:
    """Float32 values for every tensor, scaled so that activations stay near 1."""
    arrays = {}
    for name, target in targets.items():
        values = rng.standard_normal(target.shape, dtype=np.float32)
        if name.endswith(".bias"):
            values *= 0.1
        elif len(target.shape) == 1:  # the scale of a norm
            values = 1 + 0.1 * values
        elif "embedding" not in name and name != "shared.weight":
            values /= np.sqrt(np.prod(target.shape[1:]), dtype=np.float32)
        arrays[name] = values.astype(np.float32)
    return arrays


def to_diffusers(targets: tensor_maps.Tensors, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The model's tensors as a diffusers file stores them."""
    out = {}
    for key, rows in tensor_maps.to_diffusers(targets).items():
        parts = [arrays[part.key][part.start : part.stop] for part in rows]
        value = np.concatenate(parts)
        is_linear = ".attentions.0.to_" in key and value.ndim == 4
        out[key] = value[:, :, 0, 0] if is_linear else value
    return out


# --- files -------------------------------------------------------------------------------------


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Writes a safetensors file; "bfloat16" rounds to nearest, ties to even."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs = []
    offset = 0
    for name, array in arrays.items():
        blob, kind = _encoded(array, dtype)
        span = [offset, offset + len(blob)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _encoded(array: np.ndarray, dtype: str) -> tuple[bytes, str]:
    array = np.ascontiguousarray(array, dtype=np.float32)
    if dtype == "float32":
        return array.tobytes(), "F32"
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).tobytes(), "BF16"


def write_sharded(path: Path, arrays: Arrays, dtype: str, shards: int) -> None:
    """One file, or `shards` of them with the index that transformers and diffusers write."""
    if shards == 1:
        write_safetensors(path, arrays, dtype)
        return
    names = list(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"{path.stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: arrays[name] for name in names[i::shards]}
        write_safetensors(path.with_name(file), part, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.size for array in arrays.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path.with_name(path.name + ".index.json"), index)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


# --- config files --------------------------------------------------------------------------------

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def transformer_config_json(config: FluxConfig) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def autoencoder_config_json(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }


def t5_config_json(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        **dataclasses.asdict(config),
    }


def clip_config_json(config: ClipConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": config.eos_token_id - 1,
        **dataclasses.asdict(config),
    }


# --- tokenizers ----------------------------------------------------------------------------------


def clip_vocabulary() -> dict[str, int]:
    """CLIP's real structure: 256 bytes, 256 bytes that end a word, merges, start and end."""
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in CLIP_MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def _byte_letters() -> list[str]:
    """A printable letter for each byte, as byte-level BPE vocabularies spell them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


@functools.cache
def t5_model() -> bytes:
    """A unigram sentencepiece model with T5's special ids: pad 0, end 1, unknown 2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.splitlines()),
        model_writer=out,
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def write_tokenizers(folder: Path, t5_max_length: int, clip_max_length: int) -> None:
    """Writes `tokenizer/` (CLIP) and `tokenizer_2/` (T5) as transformers lays them out."""
    vocabulary = clip_vocabulary()
    write_json(folder / "tokenizer" / "vocab.json", vocabulary)
    merges = "\n".join(["#version: 0.2", *CLIP_MERGES, ""])
    (folder / "tokenizer" / "merges.txt").write_text(merges)
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": clip_max_length,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )
    path = folder / "tokenizer_2" / "spiece.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(t5_model())
    write_json(
        folder / "tokenizer_2" / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "model_max_length": t5_max_length,
            "extra_ids": 100,
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    )
