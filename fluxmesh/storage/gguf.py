"""Headers of GGUF files: tensors by name, type, shape and place. Imports no mlx.

llama.cpp's file format, in which ComfyUI-GGUF publishes FLUX and T5: a header, and then tensors
whose numbers are packed in blocks (`numbers/ggml_blocks.py` reads those). A tensor's type is called
here what ggml calls it, and the plain ones (F32, F16, BF16, ...) mean what they mean in safetensors
files, so that `Entry` and all that reads rows serve both. Dimensions are stored innermost first,
and are turned around here.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import MAX_HEADER, Entry, Header

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors' bytes, where the header does not say
# A converter's note: the shape of a tensor whose numbers it laid into rows of another length.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
MAX_DIMENSIONS, MAX_NESTING = 8, 4


@dataclass(frozen=True)
class BlockSize:
    """How many numbers a block holds, and in how many bytes."""

    numbers: int
    nbytes: int


# ggml's types by their number in a file (ggml.h, `enum ggml_type`)
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
BLOCKS = {name: BlockSize(numbers, nbytes) for name, numbers, nbytes in _TYPES.values()}
# The header's own values: sizes of its types 0 to 12, of which 8 is a string and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS[12] = "d"
_STRING, _ARRAY = 8, 9


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one. Raises `OSError`."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Reads and checks a file's header. Raises `WeightsError` naming the file and what is wrong."""
    try:
        stat = path.stat()
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_header(path: Path, size: int, _mtime: int) -> Header:
    """Parsed once while the file stays the same, as safetensors headers are."""
    try:
        with open(path, "rb") as file:
            return _Parser(path, file, size).header()
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{path} has a corrupt header; download it again.") from error


class _Parser:
    """Walks through a header once."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def header(self) -> Header:
        if self.file.read(len(MAGIC)) != MAGIC:
            raise WeightsError(f"{self.path} is not a GGUF file; download it again.")
        version = self.value("I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise WeightsError(
                f"{self.path} is a GGUF file for big-endian machines; take the usual one, which is "
                "little endian."
            )
        if version not in VERSIONS:
            raise WeightsError(
                f"{self.path} is a GGUF file of version {version}; fluxmesh reads versions 2 and "
                "3: download a newer file of the model."
            )
        tensor_count, value_count = self.value("Q"), self.value("Q")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            values[key] = self.typed(self.value("I"))
        infos = [self.info() for _ in range(tensor_count)]
        alignment = values.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError("no alignment")
        begin = -(-self.file.tell() // alignment) * alignment
        entries = {}
        for key, dtype, shape, offset in infos:
            shape = self.original_shape(values.get(ORIGINAL_SHAPE + key), shape)
            entries[key] = self.entry(key, dtype, shape, begin + offset)
        metadata = {key: value for key, value in values.items() if isinstance(value, str)}
        return Header(entries, metadata)

    def info(self) -> tuple[str, str, tuple[int, ...], int]:
        """(name, type, shape, offset) of the next tensor."""
        key = self.string()
        count = self.value("I")
        if count > MAX_DIMENSIONS:
            raise ValueError("no tensor has so many dimensions")
        shape = tuple(reversed([self.value("Q") for _ in range(count)]))
        number, offset = self.value("I"), self.value("Q")
        if number not in _TYPES:
            raise WeightsError(
                f"{self.path} stores {key} in ggml's type {number}, which fluxmesh doesn't know; "
                "take a Q8_0 or Q4_K file of the model."
            )
        return key, _TYPES[number][0], shape, offset

    def entry(self, key: str, dtype: str, shape: tuple[int, ...], begin: int) -> Entry:
        block, numbers = BLOCKS[dtype], math.prod(shape)
        if numbers % block.numbers:
            raise WeightsError(
                f"{self.path} has a corrupt header: {key} of shape {shape} is no whole number of "
                f"{dtype} blocks; download it again."
            )
        end = begin + numbers // block.numbers * block.nbytes
        if end > self.size:
            raise WeightsError(
                f"{self.path} is truncated: {key} ends at byte {end} and the file at {self.size}; "
                "download it again."
            )
        return Entry(self.path, key, dtype, shape, begin, end)

    def original_shape(self, note: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(note, list):
            return shape
        if not all(type(side) is int and side >= 0 for side in note):
            raise ValueError("no shape")
        if math.prod(note) != math.prod(shape):
            raise ValueError("not the shape of as many numbers")
        return tuple(note)

    def typed(self, kind: int, depth: int = 0) -> Any:
        """A value of a type. Of an array, its numbers; one of strings is passed over."""
        if kind == _STRING:
            return self.string()
        if kind in _FORMATS:
            return self.value(_FORMATS[kind])
        if kind != _ARRAY or depth == MAX_NESTING:
            raise ValueError("no such type")
        inner, count = self.value("I"), self.value("Q")
        if inner not in _FORMATS:
            for _ in range(count):
                self.typed(inner, depth + 1)
            return None
        item = struct.Struct(f"<{_FORMATS[inner]}")
        return [value for (value,) in item.iter_unpack(self.bytes(count * item.size))]

    def value(self, form: str) -> Any:
        item = struct.Struct(f"<{form}")
        return item.unpack(self.bytes(item.size))[0]

    def string(self) -> str:
        return self.bytes(self.value("Q")).decode("utf-8")

    def bytes(self, count: int) -> bytes:
        end = self.file.tell() + count
        if end > MAX_HEADER:
            raise ValueError("too long for a header")
        if end > self.size:
            raise WeightsError(f"{self.path} is truncated inside its header; download it again.")
        return self.file.read(count)
