"""A checkpoint's four models as tables of stored tensors, checked before a byte of them is read.

`ComponentReader` joins a component's files with the table of what its model holds
(`tensor_maps.py`): it says which tensor is missing or of the wrong shape, and reads any rows of any
tensor, however the file splits it. Imports no mlx, so that a coordinator can check a checkpoint
too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.flux1.tensor_maps import Rows, Tensors
from fluxmesh.storage.safetensors import (
    FLOATS,
    NUMPY,
    Entry,
    numpy_dtype,
    read_each_into,
    read_headers,
)
from fluxmesh.weights.checkpoint import COMPONENTS, Checkpoint


@dataclass(frozen=True)
class Stored:
    """Rows of a model's tensor as the file has them; `dtype` is the file's name for theirs."""

    values: np.ndarray
    dtype: str


def tables(checkpoint: Checkpoint) -> dict[str, Tensors]:
    """What each component's model holds, unquantized. Raises `WeightsError` for absurd sizes."""
    _check_sizes(checkpoint)
    return {
        "transformer": tensor_maps.transformer_tensors(checkpoint.transformer),
        "text_encoder": tensor_maps.clip_tensors(checkpoint.clip),
        "text_encoder_2": tensor_maps.t5_tensors(checkpoint.t5),
        "vae": tensor_maps.autoencoder_tensors(checkpoint.autoencoder),
    }


def quantized_table(component: str, tensors: Tensors, bits: int) -> Tensors:
    """The table of a quantized folder: packed `weight`, `scales` and `biases` for each matrix."""
    out: Tensors = {}
    for name, target in tensor_maps.in_bfl_file(tensors).items():
        group = group_size(component, name, target.shape)
        if group is None:
            out[name] = target
            continue
        rows, columns = target.shape
        module = name.removesuffix(".weight")
        for leaf, width in (
            ("weight", columns * bits // 32),
            ("scales", columns // group),
            ("biases", columns // group),
        ):
            key = f"{module}.{leaf}"
            out[key] = tensor_maps.ModelTensor((rows, width), (Rows(key, 0, rows),))
    return out


class ComponentReader:
    """Reads one component of a checkpoint by the model's own names."""

    def __init__(self, checkpoint: Checkpoint, component: str) -> None:
        """Reads headers alone. Raises `WeightsError` naming the file and the tensor."""
        self.checkpoint, self.component = checkpoint, component
        part = checkpoint.components[component]
        self.targets = tables(checkpoint)[component]
        if checkpoint.bits:
            self.targets = quantized_table(component, self.targets, checkpoint.bits)
        elif part.layout == "bfl":
            self.targets = tensor_maps.in_bfl_file(self.targets)
        self.header = read_headers(part.files)
        self.nbytes = part.nbytes
        self._entries: dict[str, Entry] = {}
        for name, target in self.targets.items():
            self._check(name, target)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Stored:
        """Rows `start` to `stop` of the model's tensor `name`, and not a byte more.

        PyTorch's axis order. A shard of a model is made of such calls. Raises `WeightsError`
        where the file can't be read.
        """
        target = self.targets[name]
        stop = target.shape[0] if stop is None else stop
        dtype = self.dtype(name, start, stop)
        out = np.empty((stop - start, *target.shape[1:]), dtype=NUMPY[dtype])
        self.rows_into(out, name, start)
        return Stored(out, dtype)

    def rows_into(self, out: np.ndarray, name: str, start: int = 0) -> None:
        """As `rows`, into `out`: contiguous, as many rows as are wanted, of NumPy's `dtype`."""
        self.spans_into(out, name, ((start, start + len(out)),))

    def spans_into(self, out: np.ndarray, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """As `rows_into`, the rows of several spans, from and to, one after another."""
        reads = []
        offset = 0
        for start, stop in spans:
            for piece, entry in self._pieces(name, start, stop):
                reads.append((out[offset : offset + piece.count], entry, piece.start))
                offset += piece.count
        read_each_into(reads)

    def dtype(self, name: str, start: int = 0, stop: int | None = None) -> str:
        """The file's name for the dtype of these rows. Raises `WeightsError` where they differ."""
        stop = self.targets[name].shape[0] if stop is None else stop
        entries = [entry for _, entry in self._pieces(name, start, stop)]
        dtypes = {entry.dtype for entry in entries}
        if len(dtypes) > 1:
            raise WeightsError(
                f"{self._where()} stores the parts of {name} in different dtypes "
                f"({', '.join(sorted(dtypes))}); fluxmesh reads files of one dtype."
            )
        numpy_dtype(entries[0])  # raises for one that no weight has
        return entries[0].dtype

    def _pieces(self, name: str, start: int, stop: int) -> list[tuple[Rows, Entry]]:
        pieces = tensor_maps.pieces_between(self.targets[name].pieces, start, stop)
        return [(piece, self._entries[piece.key]) for piece in pieces]

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""
        total = 0
        for piece in self.targets[name].pieces:
            entry = self._entries[piece.key]
            total += entry.nbytes * piece.count // max(entry.shape[0], 1)
        return total

    def _check(self, name: str, target: tensor_maps.ModelTensor) -> None:
        is_packed = bool(self.checkpoint.bits) and f"{name.removesuffix('.weight')}.scales" in (
            self.targets
        )
        allowed = ("U32",) if is_packed and name.endswith(".weight") else FLOATS
        ends = _rows_by_key(target)
        for piece in target.pieces:
            entry = self._find(piece.key)
            expected = (ends[piece.key], *target.shape[1:])
            if not tensor_maps.same_but_for_ones(entry.shape, expected):
                raise WeightsError(
                    f"{entry.path}: {entry.key} has shape {entry.shape} where the model's config "
                    f"asks for {expected}; the file belongs to another model, or is damaged."
                )
            if entry.dtype not in allowed:
                raise WeightsError(
                    f"{entry.path}: {entry.key} has dtype {entry.dtype}; fluxmesh reads "
                    f"{', '.join(allowed)} there."
                )
            self._entries[piece.key] = entry

    def _find(self, key: str) -> Entry:
        for spelling in tensor_maps.spellings(key):
            if spelling in self.header.entries:
                return self.header.entries[spelling]
        raise WeightsError(
            f"{self._where()} lacks {key}, which the model needs; the file is incomplete or of "
            "another model."
        )

    def _where(self) -> str:
        files = self.checkpoint.components[self.component].files
        return str(files[0]) if len(files) == 1 else str(files[0].parent)


def _rows_by_key(target: tensor_maps.ModelTensor) -> dict[str, int]:
    """Rows that each tensor of the file must have: no target leaves any row of it unused."""
    ends: dict[str, int] = {}
    for piece in target.pieces:
        ends[piece.key] = max(ends.get(piece.key, 0), piece.stop)
    return ends


def verify(checkpoint: Checkpoint) -> None:
    """Checks every component's files against its config, reading headers alone.

    Raises `WeightsError` naming the first file and tensor that is truncated, corrupt, missing or
    of the wrong shape or dtype.
    """
    for component in COMPONENTS:
        ComponentReader(checkpoint, component)


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Sizes that no FLUX has would make tables without end, or models that can't compute."""
    for part in ("transformer", "t5", "clip", "autoencoder", "schedule"):
        config = getattr(checkpoint, part)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            low, high = _bounds(field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(
                low <= number <= high for number in numbers if type(number) is int
            ):
                raise WeightsError(
                    f"The {part} config of {checkpoint.name} says {field.name} is {value}; "
                    "the checkpoint is damaged."
                )
    flux = checkpoint.transformer
    if (
        flux.hidden_size % flux.num_heads
        or sum(flux.axes_dim) != flux.head_dim
        or any(dim % 2 for dim in flux.axes_dim)
    ):
        raise WeightsError(
            f"The transformer config of {checkpoint.name} has hidden size {flux.hidden_size}, "
            f"{flux.num_heads} heads and rotary axes {flux.axes_dim}; the axes must be even and "
            "sum to the size of a head."
        )
    for rule, holds in _rules(checkpoint).items():
        if not holds:
            raise WeightsError(f"{checkpoint.name} is damaged: in its configs, {rule}.")


def _bounds(field: str) -> tuple[int, int]:
    """What a whole number of a config may be."""
    if "depth" in field or "layers" in field or "blocks" in field:
        return (0 if field == "depth_single_blocks" else 1), 512
    return (0 if field == "eos_token_id" else 1), 2**24


def _rules(checkpoint: Checkpoint) -> dict[str, bool]:
    """What else must hold before the models can compute, in words."""
    t5, clip, ae = checkpoint.t5, checkpoint.clip, checkpoint.autoencoder
    schedule = checkpoint.schedule
    exact = t5.relative_attention_num_buckets // 4  # distances with a bucket of their own
    return {
        "T5's layer_norm_epsilon must be above 0": t5.layer_norm_epsilon > 0,
        "T5's relative_attention_num_buckets must be at least 4, and "
        "relative_attention_max_distance above a quarter of them": (
            1 <= exact < t5.relative_attention_max_distance
        ),
        "CLIP's layer_norm_eps must be above 0": clip.layer_norm_eps > 0,
        "CLIP's heads must divide its hidden_size": (
            clip.hidden_size % clip.num_attention_heads == 0
        ),
        "the autoencoder's norm groups must divide each of its widths": all(
            width % ae.norm_groups == 0 for width in ae.widths
        ),
        "the autoencoder's scaling factor must not be 0": ae.scale_factor != 0,
        "the scheduler's shift must be above 0": schedule.shift > 0,
        "the scheduler's max_image_seq_len must be above its base_image_seq_len": (
            schedule.max_image_seq_len > schedule.base_image_seq_len
        ),
    }
