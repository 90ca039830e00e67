"""Writes a checkpoint with adapters fused into it: a diffusers folder that needs them no more.

Any unquantized checkpoint goes in; its transformer is written in diffusers' names and in the dtype
that it is stored in, each sum taken in float32 and rounded once. What no adapter touches is copied.
The folder appears under its name only when it is whole (`writer.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fluxmesh.adapters.lora import Adapter, Paths, find_adapter, join_adapters
from fluxmesh.errors import UsageError
from fluxmesh.machine.awake import kept_awake
from fluxmesh.models.flux1.tensor_maps import Rows, to_diffusers
from fluxmesh.storage import bfloat16
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.storage.safetensors import write_tensors
from fluxmesh.weights.checkpoint import COMPONENTS, Checkpoint
from fluxmesh.weights.reader import ComponentReader, Stored, tables, verify
from fluxmesh.weights.writer import (
    SHARD_BYTES,
    config_of,
    new_folder,
    write_json,
    write_surroundings,
)

OnBytes = Callable[[int, int], None]  # bytes done, and in all
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@kept_awake()
def fuse_checkpoint(
    source: Checkpoint, folder: Path, adapters: Paths, on_bytes: OnBytes | None = None
) -> None:
    """Writes `source` into the new `folder` with LoRA files, by their strengths, in its weights.

    `on_bytes` hears (bytes read, bytes in all). Raises `UsageError` for a quantized source,
    `OutputError` where `folder` exists or can't be written, `WeightsError` for a broken source,
    and `AdapterError` or `ModelNotFoundError` for an adapter that is not one of this model.
    """
    if source.bits:
        raise UsageError(
            f"{source.name} is quantized, so that fusing would round it twice; fuse into the model "
            "that it was made from, and quantize the result with `fluxmesh models quantize`."
        )
    verify(source)
    joined = join_adapters(adapters, source.transformer)
    tell = on_bytes or (lambda done, total: None)
    total = sum(part.nbytes for part in source.components.values())
    with new_folder(folder) as partial:
        done = 0
        for name in COMPONENTS:
            (partial / name).mkdir()
            changed: Adapter = joined if name == "transformer" else {}
            if changed or source.components[name].layout != "diffusers":
                steps = _write_component(source, name, partial / name, changed)
            else:
                steps = _copy_component(source, name, partial / name)
            for step in steps:
                done += step
                tell(done, total)
        fused = [
            {"name": Path(path).name, "sha256": sha256_of(find_adapter(path)), "scale": strength}
            for path, strength in adapters
        ]
        write_surroundings(source, partial, {"fused": fused})


def _copy_component(source: Checkpoint, name: str, folder: Path) -> Iterator[int]:
    """Files as they are, with their config and index. Yields bytes as they are done."""
    files = source.components[name].files
    for file in files:
        shutil.copyfile(file, folder / file.name)
        yield file.stat().st_size
    for other in ("config.json", f"{STEMS.get(name, 'model')}.safetensors.index.json"):
        if (files[0].parent / other).is_file():
            shutil.copyfile(files[0].parent / other, folder / other)


def _write_component(
    source: Checkpoint, name: str, folder: Path, adapter: Adapter
) -> Iterator[int]:
    """The component in diffusers' names, in files of about SHARD_BYTES. Yields bytes as done."""
    reader = ComponentReader(source, name)
    shards = _shards(reader)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{STEMS[name]}{many}.safetensors"
        arrays = {}
        for key, rows in keys.items():
            stored = _fused(reader, rows, adapter)
            # BFL keeps the autoencoder's attention as 1x1 convolutions, diffusers as linears.
            flat = stored.values.ndim == 4 and ".attentions." in key
            values = stored.values[:, :, 0, 0] if flat else stored.values
            arrays[key] = (values, stored.dtype)
            yield stored.values.nbytes
        write_tensors(folder / file, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": reader.nbytes}, "weight_map": weight_map}
        write_json(folder / f"{STEMS[name]}.safetensors.index.json", index)
    classes = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}
    write_json(folder / "config.json", {"_class_name": classes[name]} | config_of(source, name))


def _shards(reader: ComponentReader) -> list[dict[str, tuple[Rows, ...]]]:
    """diffusers' tensors with the model's rows that each is made of, file by file."""
    table = to_diffusers(tables(reader.checkpoint)[reader.component])
    shards: list[dict[str, tuple[Rows, ...]]] = [{}]
    size = 0
    for key, rows in table.items():
        nbytes = sum(
            reader.stored_bytes(piece.key) * piece.count // reader.targets[piece.key].shape[0]
            for piece in rows
        )
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = rows
        size += nbytes
    return shards


def _fused(reader: ComponentReader, rows: tuple[Rows, ...], adapter: Adapter) -> Stored:
    """One of diffusers' tensors with the adapter's part added, in the dtype of the file."""
    stored = [reader.rows(piece.key, piece.start, piece.stop) for piece in rows]
    dtype = stored[0].dtype
    values = []
    for piece, block in zip(rows, stored, strict=True):
        module, _, leaf = piece.key.rpartition(".")
        low = adapter.get(module) if leaf == "weight" else None
        if low is None:
            values.append(block.values)
            continue
        delta = (low.scale * low.b[piece.start : piece.stop]) @ low.a
        values.append(_rounded(_float32(block) + delta.reshape(block.values.shape), dtype))
    return Stored(values[0] if len(values) == 1 else np.concatenate(values), dtype)


def _float32(stored: Stored) -> np.ndarray:
    if stored.dtype == "BF16":
        return bfloat16.to_float32(stored.values)
    return stored.values.astype(np.float32)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the file's dtype stores it, to the nearest and ties to even."""
    if dtype == "BF16":
        return bfloat16.of_float32(values)
    return values.astype(np.float16 if dtype == "F16" else np.float32)
