"""Random tiny checkpoints of FLUX.2 in diffusers' folders, written with NumPy alone.

As `checkpoints.py`, which makes FLUX.1's: every number is random and none is zero by accident, the
pictures are noise. The language models have as many layers as are read; their heads times head
size is not the hidden size, as in Qwen3 4B.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.config import (
    STATES,
    Flux2AutoencoderConfig,
    Flux2Config,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.files.folder import Flux2Folder, defaults_of
from fluxmesh.storage.safetensors import read_header, read_tensor, write_tensors
from tests.checkpoints import Arrays, random_arrays, to_diffusers, write_json, write_safetensors

Kind = Literal["klein", "base", "dev"]

TRANSFORMER = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=96,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4, 4),
)
TEXT_TOKENS = 128  # that klein's tokenizer declares, in the place of 512: 4 times less to compute
# 12 heads divide by 2, 3 and 4
TWELVE_HEADS = replace(
    TRANSFORMER, hidden_size=96, num_heads=12, axes_dim=(2, 2, 2, 2), depth_single_blocks=2
)
TEXT = TextEncoderConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
MISTRAL = replace(TEXT, rms_norm_eps=1e-5, rope_theta=1e9, qk_norm=False, states=STATES["mistral3"])
AUTOENCODER = Flux2AutoencoderConfig(
    widths=(8, 8, 16, 16),
    decoder_widths=(8, 8, 16, 16),
    num_res_blocks=1,
    z_channels=4,
    norm_groups=4,
)
SPECIALS = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "mistral3": [
        *("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "[IMG]",
    ],
}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def architecture_of(
    kind: Kind,
    transformer: Flux2Config = TRANSFORMER,
    autoencoder: Flux2AutoencoderConfig = AUTOENCODER,
) -> Flux2Architecture:
    """What `make_flux2` writes."""
    transformer = replace(transformer, guidance_embed=kind == "dev")
    return Flux2Architecture(
        transformer,
        MISTRAL if kind == "dev" else TEXT,
        autoencoder,
        defaults_of(transformer, is_distilled=kind == "klein"),
        is_distilled=kind == "klein",
    )


def make_flux2(
    folder: Path,
    kind: Kind = "klein",
    *,
    seed: int = 0,
    transformer: Flux2Config = TRANSFORMER,
    text_length: int | None = TEXT_TOKENS,
    autoencoder: Flux2AutoencoderConfig = AUTOENCODER,
) -> Path:
    """Writes a random model under `folder`, float32, and returns that.

    Its pictures are 32x32 in 2 steps unless asked otherwise. `text_length` is what its tokenizer
    declares: a prompt's tokens; dev's, whose frame alone is longer here, declares none, nor does
    one for which it is None.
    """
    model, form = architecture_of(kind, transformer, autoencoder), Flux2Folder()
    for i, component in enumerate(form.components):
        targets = model.tensors_in(component)
        arrays = random_arrays(targets, np.random.default_rng([seed, i]))
        path = folder / component / WEIGHTS[component]
        if component == "vae":
            _write_autoencoder(path, to_diffusers(targets, arrays))
        elif component == "text_encoder":
            before = "language_model.model." if kind == "dev" else "model."
            write_safetensors(path, {f"{before}{key}": value for key, value in arrays.items()})
        else:
            write_safetensors(path, to_diffusers(targets, arrays))
        write_json(folder / component / "config.json", form.config(model, component))
    (folder / "tokenizer").mkdir()
    tokenizer(model.text.kind).save(str(folder / "tokenizer" / "tokenizer.json"))
    if text_length is not None and kind != "dev":
        declared = {"model_max_length": text_length}
        write_json(folder / "tokenizer" / "tokenizer_config.json", declared)
    schedule = {"use_dynamic_shifting": True, "shift": 3.0}
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / "model_index.json", form.index(model))
    defaults = {"steps": 2, "height": 32, "width": 32}
    write_json(folder / "fluxmesh.json", {"format": 1, "defaults": defaults})
    return folder


def make_single_file(folder: Path, file: Path, component: str = "transformer") -> Path:
    """The transformer of such a folder, or another component, as BFL's single file."""
    from fluxmesh.weights.checkpoint import from_folder
    from fluxmesh.weights.reader import ComponentReader

    reader = ComponentReader(from_folder(folder, "made"), component)
    write_safetensors(file, {name: reader.rows(name).values for name in reader.targets})
    return file


def make_comfy_set(folder: Path, models: Path, lender: Path, kind: Kind) -> Path:
    """Such a folder as ComfyUI has it below its `models`; returns the transformer's file.

    The vocabulary, and what no shape of so small models tells, lies in `lender`.
    """
    name = {"klein": "flux-2-klein-4b", "base": "flux-2-klein-base-4b", "dev": "flux2_dev"}[kind]
    (file, encoder, vae) = (
        models / "diffusion_models" / f"{name}.safetensors",
        models / "text_encoders" / ("mistral_3_small_flux2_bf16" if kind == "dev" else "qwen_3_4b"),
        models / "vae" / "flux2-vae.safetensors",
    )
    make_single_file(folder, file)
    make_single_file(folder, vae, "vae")
    header = read_header(folder / "text_encoder" / WEIGHTS["text_encoder"])
    tensors = {
        f"model.{key.rpartition('model.')[2]}": (read_tensor(entry), "F32")
        for key, entry in header.entries.items()
    }
    if kind == "dev":
        vocabulary = np.frombuffer(b'{"config": {}}', dtype=np.uint8)
        tensors["tekken_model"] = (vocabulary, "U8")
    encoder.parent.mkdir(parents=True)
    write_tensors(encoder.with_suffix(".safetensors"), tensors, {})
    shutil.copytree(folder / "tokenizer", lender / "tokenizer")
    for component in ("transformer", "text_encoder", "vae"):
        (lender / component).mkdir()
        shutil.copy(folder / component / "config.json", lender / component)
    return file


def _write_autoencoder(path: Path, arrays: Arrays) -> None:
    """With the count of batches that PyTorch saves, which is no float and is not read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = {"bn.num_batches_tracked": (np.array(7, dtype=np.int64), "I64")}
    write_tensors(path, {key: (value, "F32") for key, value in arrays.items()} | count, {})


def tokenizer(kind: str) -> Tokenizer:
    """Single bytes, a merge, and the tokens of the frame."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"ca": len(letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("c", "a")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(SPECIALS[kind])
    return made
