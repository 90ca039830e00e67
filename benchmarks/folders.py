"""FLUX.1-dev, schnell and FLUX.2 klein 4B with random weights, as folders that fluxmesh loads.

The 12 B transformer (shaped as dev and as schnell), T5-XXL, CLIP-L and the autoencoder are written
once as diffusers folders in bfloat16, with tokenizers made on the spot; `write_klein` does
the same of klein 4B. The pictures that come of
them are noise: only time and memory are real. Needs fluxmesh's own dependencies and nothing else.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.randomfile import RandomValues, write_random
from benchmarks.sizes import Sizes
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import ClipConfig, FluxConfig, ScheduleConfig
from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.family import FLUX2
from fluxmesh.models.flux2.files.folder import Flux2Folder
from tests import checkpoints, flux2_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
GUIDANCE = "time_text_embed.guidance_embedder"  # what dev has and schnell lacks


def scratch() -> str | None:
    """Memory is the fastest disk, where it is large enough; else the usual temporary folder."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 40e9:
        return str(shared)
    return None


def temporary(prefix: str, folder: Path | None) -> Path:
    """A new folder in `folder`, which is made where it is missing, or in `scratch`."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder or scratch()))


def write_models(folder: Path, sizes: Sizes) -> int:
    """Writes `folder/dev`, and `folder/schnell` that shares its weights; returns the bytes."""
    dev, schnell = folder / "dev", folder / "schnell"
    vocabulary = checkpoints.clip_vocabulary()
    clip = dataclasses.replace(sizes.clip, eos_token_id=vocabulary["<|endoftext|>"])
    write_configs(dev, sizes.transformer, clip, sizes, sizes.text_tokens)
    plain = dataclasses.replace(sizes.transformer, guidance_embed=False)
    write_configs(schnell, plain, clip, sizes, sizes.text_tokens // 2)

    values = RandomValues()
    transformer = file_shapes(tensor_maps.transformer_tensors(sizes.transformer))
    rest = [name for name in transformer if not name.startswith(GUIDANCE)]
    shards = [rest[i::3] for i in range(3)]
    shards.append([name for name in transformer if name.startswith(GUIDANCE)])
    written = 0
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = WEIGHTS.replace(".safetensors", f"-{i:05}-of-{len(shards):05}.safetensors")
        shapes = {name: transformer[name] for name in names}
        written += write_random(dev / "transformer" / file, shapes, values)
        weight_map |= dict.fromkeys(names, file)
    write_index(dev, weight_map)
    write_index(schnell, {name: weight_map[name] for name in rest})
    for file in set(weight_map.values()):  # also what it has no use for: "4 of 4" is looked for
        share(dev, schnell, f"transformer/{file}")
    parts = {
        "text_encoder": tensor_maps.clip_tensors(clip),
        "text_encoder_2": tensor_maps.t5_tensors(sizes.t5),
        "vae": tensor_maps.autoencoder_tensors(sizes.autoencoder),
    }
    for part, tensors in parts.items():
        file = f"{part}/{WEIGHTS if part == 'vae' else 'model.safetensors'}"
        shapes = file_shapes(tensors)
        if part != "vae":
            shapes = {name: target.shape for name, target in tensors.items()}
        written += write_random(dev / file, shapes, values)
        share(dev, schnell, file)
    return written


def klein(sizes: Sizes) -> Flux2Architecture:
    """klein 4B, or the tiny one that stands for it at small sizes."""
    if sizes.transformer == Sizes().transformer:
        published = FLUX2.published["klein-4b"].architecture
        assert isinstance(published, Flux2Architecture)
        return published
    return flux2_checkpoint.architecture_of("klein")


def write_klein(folder: Path, sizes: Sizes) -> int:
    """Writes FLUX.2 klein 4B as `folder`; returns the bytes."""
    architecture, form, values, written = klein(sizes), Flux2Folder(), RandomValues(), 0
    for part in form.components:
        targets = architecture.tensors_in(part)
        if part == "text_encoder":
            shapes = {f"model.{name}": target.shape for name, target in targets.items()}
        else:
            shapes = file_shapes(targets)
        written += write_random(folder / part / flux2_checkpoint.WEIGHTS[part], shapes, values)
        checkpoints.write_json(folder / part / "config.json", form.config(architecture, part))
    (folder / "tokenizer").mkdir()
    tokenizer = flux2_checkpoint.tokenizer(architecture.text.kind)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    length = {"model_max_length": max(sizes.text_tokens, flux2_checkpoint.TEXT_TOKENS)}
    schedule = {"use_dynamic_shifting": True, "shift": 3.0}
    checkpoints.write_json(folder / "tokenizer" / "tokenizer_config.json", length)
    checkpoints.write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    checkpoints.write_json(folder / "model_index.json", form.index(architecture))
    return written


def file_shapes(tensors: tensor_maps.Tensors) -> dict[str, tuple[int, ...]]:
    """The tensors that a diffusers file holds, and their shapes."""
    shapes = {}
    for key, rows in tensor_maps.to_diffusers(tensors).items():
        rest = tensors[rows[0].key].shape[1:]
        if ".attentions.0.to_" in key:  # 1x1 convolutions here, linears there
            rest = rest[:1]
        shapes[key] = (sum(row.count for row in rows), *rest)
    return shapes


def write_configs(
    folder: Path, transformer: FluxConfig, clip: ClipConfig, sizes: Sizes, t5_max_length: int
) -> None:
    schedule = ScheduleConfig(use_dynamic_shifting=transformer.guidance_embed)
    files = {
        "model_index.json": checkpoints.MODEL_INDEX,
        "transformer/config.json": checkpoints.transformer_config_json(transformer),
        "text_encoder/config.json": checkpoints.clip_config_json(clip),
        "text_encoder_2/config.json": checkpoints.t5_config_json(sizes.t5),
        "vae/config.json": checkpoints.autoencoder_config_json(sizes.autoencoder),
        "scheduler/scheduler_config.json": dataclasses.asdict(schedule),
    }
    for name, content in files.items():
        checkpoints.write_json(folder / name, content)
    checkpoints.write_tokenizers(folder, t5_max_length, clip.max_position_embeddings)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    checkpoints.write_json(folder / "transformer" / f"{WEIGHTS}.index.json", index)


def share(dev: Path, schnell: Path, file: str) -> None:
    """The same bytes under a second name."""
    (schnell / file).parent.mkdir(parents=True, exist_ok=True)
    os.link(dev / file, schnell / file)
