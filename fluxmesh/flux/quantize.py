"""Writes fluxmesh's own quantized folder: half, a third or a quarter of a checkpoint's size.

The folder is shaped like diffusers' (config files, tokenizers, one folder a model), with the
weights under the model's own names and a `fluxmesh.json` that says how many bits. It appears under
its name only when it is whole. `checkpoint.py` and `weights.py` read it like any other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh import __version__
from fluxmesh.errors import OutputError, UsageError
from fluxmesh.flux.checkpoint import COMPONENTS, FORMAT, MANIFEST, Checkpoint
from fluxmesh.flux.components import Reader, verify
from fluxmesh.flux.tensorfile import cannot_write, write_tensors
from fluxmesh.flux.weights import tensors
from fluxmesh.request import BITS

SHARD_BYTES = 1 << 30  # a file of the folder; also what is held in memory before it is written
NAMES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32"}


def quantize_checkpoint(
    source: Checkpoint,
    folder: Path,
    bits: int,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `source` into the new `folder` with its large matrices in `bits` (3|4|5|6|8).

    What is not quantized is bfloat16. `on_bytes` hears (bytes read, bytes in all). Raises
    `OutputError` where `folder` exists or can't be written, `UsageError` for other bits or a
    source that is quantized already, `WeightsError` for a broken source.
    """
    if bits not in BITS:
        raise UsageError(f"--bits is {bits}; choose 3, 4, 5, 6 or 8.")
    if source.bits:
        raise UsageError(
            f"{source.name} is quantized to {source.bits} bits already; name the model that it "
            "was made from."
        )
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists already; name another folder, or remove it.")
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"The folder {folder.absolute().parent} does not exist; make it first.")
    verify(source)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        _write(source, partial, bits, on_bytes or (lambda done, total: None))
        _flush_folders(partial)
        os.rename(partial, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well


def _write(
    source: Checkpoint, folder: Path, bits: int, on_bytes: Callable[[int, int], None]
) -> None:
    total = sum(part.nbytes for part in source.components.values())
    before = 0
    for component in COMPONENTS:
        (folder / component).mkdir()
        reader = Reader(source, component)
        done = before

        def tell(read: int, _of: int, start: int = done) -> None:
            on_bytes(start + read, total)

        _write_component(reader, folder / component, bits, tell)
        before += reader.nbytes
        _write_json(folder / component / "config.json", _config(source, component))
    for name, tokenizer in (
        ("tokenizer", source.tokenizer),
        ("tokenizer_2", source.tokenizer_2),
    ):
        (folder / name).mkdir()
        for file in ("vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json"):
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / name / file)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", dataclasses.asdict(source.schedule))
    _write_json(folder / "model_index.json", {"_class_name": "FluxPipeline"})
    defaults = dataclasses.asdict(source.defaults)
    del defaults["t5_max_length"]  # the tokenizer says
    manifest = {
        "format": FORMAT,
        "quantization": {"bits": bits},
        "defaults": defaults,
        "source": {"name": source.name, "revision": source.revision},
        "fluxmesh": __version__,
    }
    _write_json(folder / MANIFEST, manifest)


def _write_component(
    reader: Reader, folder: Path, bits: int, on_bytes: Callable[[int, int], None]
) -> None:
    """Files of about SHARD_BYTES, each written as soon as it is full, and their index."""
    weight_map: dict[str, str] = {}
    shard: dict[str, tuple[np.ndarray, str]] = {}
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        number += 1
        name = f"model-{number:05}.safetensors"
        write_tensors(folder / name, shard, {"format": "mlx"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, array in tensors(reader, mx.bfloat16, bits, on_bytes):
        kind = NAMES[array.dtype]
        shard[name] = (np.array(array.view(mx.uint16) if kind == "BF16" else array), kind)
        size += array.nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    _write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _config(source: Checkpoint, component: str) -> dict[str, Any]:
    """The component's config.json, spelled as `config.py` reads it back."""
    if component == "text_encoder":
        return dataclasses.asdict(source.clip)
    if component == "text_encoder_2":
        return dataclasses.asdict(source.t5)
    if component == "vae":
        ae = source.autoencoder
        return {
            "in_channels": ae.in_channels,
            "out_channels": ae.out_ch,
            "block_out_channels": ae.widths,
            "layers_per_block": ae.num_res_blocks,
            "latent_channels": ae.z_channels,
            "norm_num_groups": ae.norm_groups,
            "mid_block_add_attention": ae.mid_attention,
            "scaling_factor": ae.scale_factor,
            "shift_factor": ae.shift_factor,
        }
    flux = source.transformer
    return {
        "in_channels": flux.in_channels,
        "out_channels": flux.out_channels,
        "num_layers": flux.depth,
        "num_single_layers": flux.depth_single_blocks,
        "attention_head_dim": flux.head_dim,
        "num_attention_heads": flux.num_heads,
        "joint_attention_dim": flux.context_in_dim,
        "pooled_projection_dim": flux.vec_in_dim,
        "guidance_embeds": flux.guidance_embed,
        "axes_dims_rope": flux.axes_dim,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _flush_folders(root: Path) -> None:
    """So that the names of the files survive a power cut as well as their bytes."""
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
