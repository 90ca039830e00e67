"""Writes fluxmesh's own quantized folder: half, a third or a quarter of a checkpoint's size.

The folder is shaped like diffusers' (config files, tokenizers, one folder a model), with the
weights under the model's own names and a `fluxmesh.json` that says how many bits. It appears under
its name only when it is whole. `checkpoint.py` and `loading.py` read it like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.machine.awake import kept_awake
from fluxmesh.models.numpy_bits import to_numpy
from fluxmesh.request import BITS
from fluxmesh.storage.safetensors import write_tensors
from fluxmesh.storage.writable import check_new, check_room
from fluxmesh.weights.checkpoint import Checkpoint, Quantization
from fluxmesh.weights.loading import tensors
from fluxmesh.weights.reader import ComponentReader, stored_bits, verify
from fluxmesh.weights.writer import (
    SHARD_BYTES,
    config_of,
    new_folder,
    write_json,
    write_surroundings,
)

NAMES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32"}


@kept_awake()
def quantize_checkpoint(
    source: Checkpoint,
    folder: Path,
    bits: int,
    on_bytes: Callable[[int, int], None] | None = None,
    text_bits: int | None = None,
) -> None:
    """Writes `source` into the new `folder` with its large matrices in `bits` (3|4|5|6|8).

    `text_bits` are those of the text encoders, where they shall have others. What is not quantized
    is bfloat16. `on_bytes` hears (bytes read, bytes in all). Raises `OutputError` where `folder`
    exists or can't be written, `UsageError` for other bits or a source that is quantized already,
    `WeightsError` for a broken source.
    """
    check_new(folder)
    for name, number in (("bits", bits), ("text_bits", text_bits or bits)):
        if number not in BITS:
            raise UsageError.about(name, f"is {number}", "choose 3, 4, 5, 6 or 8")
    if quantized_to := stored_bits(source):
        raise UsageError(
            f"{source.name} is quantized to {quantized_to} bits already; name the model that it "
            "was made from."
        )
    verify(source)
    # Of a matrix, so many bits of the 32 that it is stored in at most are left, and a little more.
    quantization = Quantization(bits, None if text_bits == bits else text_bits)
    least = min(bits, text_bits or bits)
    check_room(folder, sum(part.nbytes for part in source.components.values()) * least // 32)
    with new_folder(folder) as partial:
        _write(source, partial, quantization, on_bytes or (lambda done, total: None))


def _write(
    source: Checkpoint,
    folder: Path,
    quantization: Quantization,
    on_bytes: Callable[[int, int], None],
) -> None:
    quantized = dataclasses.replace(source, quantization=quantization)
    total = sum(part.nbytes for part in source.components.values())
    before = 0
    for component in source.components:
        (folder / component).mkdir()
        reader = ComponentReader(source, component)
        done = before

        def tell(read: int, _of: int, start: int = done) -> None:
            on_bytes(start + read, total)

        bits = quantized.bits_of(component)
        assert bits is not None
        _write_component(reader, folder / component, bits, tell)
        before += reader.nbytes
        write_json(folder / component / "config.json", config_of(source, component))
    said = {name: value for name, value in vars(quantization).items() if value is not None}
    write_surroundings(source, folder, {"quantization": said})


def _write_component(
    reader: ComponentReader, folder: Path, bits: int, on_bytes: Callable[[int, int], None]
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
        shard[name] = (to_numpy(array), kind)
        size += array.nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
