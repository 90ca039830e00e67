"""One tensor of a file as numbers, in whatever form the file stores them. Imports no mlx.

`source_of` finds the form from the header alone; a source then fills any rows of an array in
float32, float16 or bfloat16, reading those rows and no others, and a million numbers a thread at a
time, so that a tensor is never in memory in a second form. Forms: plain floats; bytes by a table,
with or without scales (`float8.py`); blocks of GGUF files (`ggml_blocks.py`); MLX's quantized
triples (`affine.py`). What is not read is refused by its name.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.storage.gguf import BLOCKS
from fluxmesh.storage.numbers import affine, float8, ggml_blocks
from fluxmesh.storage.numbers.finite import not_finite
from fluxmesh.storage.numbers.rows import rows_of
from fluxmesh.storage.numbers.scales import Scale, scale_of
from fluxmesh.storage.safetensors import (
    FLOATS,
    Entry,
    Header,
    in_threads,
    read_bytes_into,
    read_rows_into,
    read_tensor,
    row_bytes,
)

CHUNK = 1 << 20  # numbers that a thread has in float32 at a time
WHOLE = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


@dataclass(frozen=True)
class TensorSource(ABC):
    """A tensor of a file: its shape, and its numbers by rows."""

    entry: Entry  # what errors name
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """In which the numbers are given to who does not choose: F32, F16, BF16."""
        return "BF16"

    @property
    def is_plain(self) -> bool:
        """Whether the file's bytes are the numbers, in `dtype`."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.entry.nbytes

    @abstractmethod
    def float32(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as float32 [rows, numbers of a row]. Raises `WeightsError`."""

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` with the rows from `start` on, to the nearest of its dtype.

        `out`: contiguous, float32, float16, or uint16 for the bits of bfloat16. Raises
        `WeightsError` for a file that can't be read and for numbers that are none.
        """
        step = max(1, CHUNK // max(1, self.row_numbers))
        pieces = [(out[i : i + step], start + i) for i in range(0, len(out), step)]
        in_threads(self._fill, pieces, out.nbytes)

    @property
    def row_numbers(self) -> int:
        return math.prod(self.shape[1:])

    def _fill(self, piece: tuple[np.ndarray, int]) -> None:
        out, start = piece
        with np.errstate(invalid="ignore", over="ignore"):  # which is told below
            values = self.float32(start, start + len(out))
        if not np.isfinite(values).all():
            raise not_finite(self.entry)
        out[...] = float8.rounded(values, out.dtype).reshape(out.shape)


@dataclass(frozen=True)
class PlainSource(TensorSource):
    """float32, float16 or bfloat16: what is read byte for byte, where its dtype is wanted."""

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def is_plain(self) -> bool:
        return True

    def float32(self, start: int, stop: int) -> np.ndarray:
        return rows_of(self.entry, start, stop)


@dataclass(frozen=True)
class PackedSource(PlainSource):
    """Whole numbers that stay what they are: the words of MLX's quantized form."""

    def float32(self, start: int, stop: int) -> np.ndarray:
        raise TypeError(f"{self.entry.key} is packed: its numbers need scales")


@dataclass(frozen=True)
class ScaledSource(TensorSource):
    """Bytes by a table, or floats, times a scale where there is one."""

    scale: Scale | None = None

    @property
    def dtype(self) -> str:
        return "BF16" if self.entry.dtype in (*float8.DTYPES, "BF16") else "F32"

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes + (self.scale.entry.nbytes if self.scale else 0)

    def float32(self, start: int, stop: int) -> np.ndarray:
        numbers = rows_of(self.entry, start, stop)
        if self.scale is not None:
            self.scale.multiply(numbers, start)
        return numbers

    def _fill(self, piece: tuple[np.ndarray, int]) -> None:
        scale = self._one_scale
        if self.entry.dtype not in float8.DTYPES or scale is None:
            super()._fill(piece)
            return
        out, start = piece
        raw = np.empty(out.size, dtype=np.uint8)
        read_bytes_into(raw.data, self.entry, self.entry.begin + start * row_bytes(self.entry))
        if float8.holds_no_number(raw, self.entry.dtype):
            raise not_finite(self.entry)
        _byte_reader(self.entry.dtype, scale, out.dtype).read_into(out.reshape(-1), raw)

    @property
    def _one_scale(self) -> float | None:
        """What all of the tensor is multiplied by; None for several scales, or an absurd one."""
        if self.scale is None:
            return 1.0
        value = float(self.scale.values.item()) if self.scale.is_single else math.inf
        return value if abs(value) < float8.LARGEST_SCALE else None


@functools.lru_cache(maxsize=8)
def _byte_reader(dtype: str, scale: float, out: np.dtype) -> float8.ByteReader:
    return float8.ByteReader(dtype, scale, out)


@dataclass(frozen=True)
class BlockSource(TensorSource):
    """ggml's blocks, one after another without regard to rows."""

    def float32(self, start: int, stop: int) -> np.ndarray:
        block = BLOCKS[self.entry.dtype]
        first, last = start * self.row_numbers, stop * self.row_numbers
        low, high = first // block.numbers, -(-last // block.numbers)
        raw = np.empty((high - low) * block.nbytes, dtype=np.uint8)
        read_bytes_into(raw.data, self.entry, self.entry.begin + low * block.nbytes)
        flat = ggml_blocks.to_float32(raw, self.entry.dtype)
        offset = low * block.numbers
        return flat[first - offset : last - offset].reshape(stop - start, -1)


@dataclass(frozen=True)
class AffineSource(TensorSource):
    """MLX's packed matrix; `triple` and `packing` serve who keeps it as it is."""

    triple: affine.Triple
    packing: affine.Packing

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.triple.entries)

    def float32(self, start: int, stop: int) -> np.ndarray:
        words = np.empty((stop - start, self.triple.weight.shape[1]), dtype=np.uint32)
        read_rows_into(words, self.triple.weight, start)
        scales, biases = (
            rows_of(entry, start, stop) for entry in (self.triple.scales, self.triple.biases)
        )
        return affine.to_float32(words, scales, biases, self.packing)


def source_of(header: Header, key: str, shape: tuple[int, ...] | None = None) -> TensorSource:
    """The tensor that a file calls `key`, from its header alone.

    `shape` is the one that the model expects, which tells bits from group size in MLX's form.
    Raises `WeightsError` naming a form or dtype that is not read.
    """
    entry = header.entries[key]
    triple = affine.triple_of(header, key)
    if triple is not None:
        return _affine_source(header, triple, shape)
    if entry.dtype in ggml_blocks.LAYOUTS:
        return BlockSource(entry, entry.shape)
    if BLOCKS.get(entry.dtype) is not None and BLOCKS[entry.dtype].numbers > 1:
        raise WeightsError(
            f"{entry.path} stores {key} as {entry.dtype}, which fluxmesh doesn't read; take the "
            f"model's file in {', '.join(reversed(ggml_blocks.LAYOUTS))}, F16 or BF16."
        )
    scale = scale_of(header, entry)
    if entry.dtype in FLOATS and scale is None:
        return PlainSource(entry, entry.shape)
    is_byte = entry.dtype in float8.DTYPES and not (entry.dtype == "I8" and scale is None)
    if is_byte or entry.dtype in (*FLOATS, "F64"):
        return ScaledSource(entry, entry.shape, scale)
    raise WeightsError(
        f"{entry.path}: {key} has dtype {entry.dtype}; fluxmesh reads {', '.join(FLOATS)}, F64, "
        "F8_E4M3 and F8_E5M2 there."
    )


def read_float32(header: Header, key: str) -> np.ndarray:
    """A whole tensor as float32 in its shape: floats of any width, fp8 with its scale, integers.

    For small tensors of files that are no model's: an adapter's matrices and alphas. Raises
    `WeightsError`.
    """
    entry = header.entries[key]
    if entry.dtype in WHOLE and affine.triple_of(header, key) is None:
        return read_tensor(entry).astype(np.float32)
    source = source_of(header, key)
    out = np.empty(source.shape, dtype=np.float32)
    source.read_into(out.reshape(1) if not source.shape else out)
    return out


def _affine_source(
    header: Header, triple: affine.Triple, shape: tuple[int, ...] | None
) -> TensorSource:
    rows, words = triple.weight.shape
    if shape is not None:
        is_matrix = len(shape) >= 2 and math.prod(shape[2:]) == 1  # a 1x1 convolution is one
        packing = triple.packing(shape[1]) if is_matrix else None
    else:
        packing = triple.likely_packing(header.metadata)
    if packing is None:
        wanted = "" if shape is None else f" where the model's config asks for {shape}"
        raise WeightsError(
            f"{triple.weight.path}: {triple.weight.key} has shape {(rows, words)} and "
            f"{triple.scales.shape[1]} scales a row{wanted}; the file belongs to another model, or "
            "is damaged."
        )
    columns = triple.scales.shape[1] * packing.group
    return AffineSource(triple.weight, (rows, columns), triple, packing)
