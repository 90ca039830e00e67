"""Scales that stand in tensors of their own beside a weight of eight bits. Imports no mlx.

Three names are in the wild, and all of them multiply: `scale_weight` (ComfyUI's files with a mark
`scaled_fp8`), `weight_scale` (ComfyUI's later ones, compressed-tensors, ModelOpt) and
`weight_scale_inv` (DeepSeek, transformers), for a whole matrix, each of its rows, or blocks of it.
What scales the *inputs* (`scale_input`, `input_scale`) is for products taken in eight bits, which
are not taken here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.storage.numbers import float8, foreign
from fluxmesh.storage.numbers.finite import not_finite
from fluxmesh.storage.numbers.rows import rows_of
from fluxmesh.storage.safetensors import FLOATS, Entry, Header, read_tensor

NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
COMFY_READ = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")


@dataclass(frozen=True)
class Scale:
    """What the numbers of blocks of a matrix are multiplied by: one number a block."""

    entry: Entry
    rows: int  # of a block
    columns: int

    @functools.cached_property
    def values(self) -> np.ndarray:
        """float32 [blocks of rows, blocks of columns]. Raises `WeightsError`."""
        values = rows_of(self.entry, 0, _rows(self.entry.shape))
        if not np.isfinite(values).all():
            raise not_finite(self.entry)
        return values

    @property
    def is_single(self) -> bool:
        return math.prod(self.entry.shape) == 1

    def multiply(self, numbers: np.ndarray, start: int) -> None:
        """Scales rows [rows, columns], of which the first is `start` of the matrix, in place."""
        blocks = self.values[np.arange(start, start + len(numbers)) // self.rows]
        if blocks.shape[1] > 1:
            blocks = np.repeat(blocks, self.columns, axis=1)[:, : numbers.shape[1]]
        numbers *= blocks


def scale_of(header: Header, entry: Entry) -> Scale | None:
    """The scale that stands beside a weight. Raises `WeightsError` for one of another form."""
    if not entry.key.endswith(".weight"):
        return None
    module = entry.key.removesuffix(".weight")
    _check_comfy_form(header, entry, module)
    for leaf in NAMES:
        scale = header.entries.get(f"{module}.{leaf}")
        if scale is not None:
            break
    else:
        return None
    if scale.dtype not in (*FLOATS, "F64"):
        form = "mxfp8" if scale.dtype in ("U8", "F8_E8M0") else f"{scale.dtype}-scaled"
        raise foreign.unread(entry.path, form, entry.key)
    rows, columns = _rows(entry.shape), math.prod(entry.shape[1:])
    by_rows, by_columns = _rows(scale.shape), math.prod(scale.shape[1:])
    row_block, column_block = float8.block_of(rows, by_rows), float8.block_of(columns, by_columns)
    if row_block is None or column_block is None:
        raise WeightsError(
            f"{entry.path}: {scale.key} has shape {scale.shape}, which are no scales of a matrix "
            f"of shape {entry.shape}; the file is damaged, or of a form that fluxmesh doesn't read."
        )
    return Scale(scale, row_block, column_block)


def _rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape; a scalar is one row."""
    return shape[0] if shape else 1


def _check_comfy_form(header: Header, entry: Entry, module: str) -> None:
    """Refuses a form of ComfyUI's that needs more than a table and a scale."""
    layers = header.metadata.get("_quantization_metadata")
    form = _form_of(module, _comfy_layers(layers)) if isinstance(layers, str) else None
    note = header.entries.get(f"{module}.comfy_quant")
    if note is not None and note.dtype == "U8":
        form = _json_object(read_tensor(note).tobytes().rstrip(b"\0"))
    if not isinstance(form, Mapping):
        return
    name = str(form.get("format"))
    params = form.get("params")
    is_rotated = form.get("convrot") or (isinstance(params, Mapping) and params.get("convrot"))
    if name not in COMFY_READ or is_rotated:
        turned = " rotated (convrot)" if is_rotated else ""
        raise foreign.unread(entry.path, f"ComfyUI's{turned} {name}", entry.key)


def _form_of(module: str, layers: Mapping[str, Any]) -> Any:
    """What is said of a module, which may be named without what stands before a model's names."""
    parts = module.split(".")
    names = (".".join(parts[i:]) for i in range(len(parts)))
    return next((layers[name] for name in names if name in layers), None)


@functools.lru_cache(maxsize=4)
def _comfy_layers(text: str) -> Mapping[str, Any]:
    layers = _json_object(text.encode()).get("layers")
    return layers if isinstance(layers, Mapping) else {}


def _json_object(text: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}
