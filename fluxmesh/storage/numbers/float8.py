"""Numbers of eight bits, by a table of 256, times scales that stand beside them. No mlx.

Three kinds of byte: F8_E4M3 (e4m3fn: 448 at most, no infinity, 0x7F and 0xFF are NaN) and F8_E5M2
(the upper half of a float16) of Micikevicius et al. 2022, "FP8 formats for deep learning"
(https://arxiv.org/abs/2209.05433), and I8. A scale belongs to the whole matrix, to a row of it, or
to a block of rows and columns; the number is the product.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from fluxmesh.storage import bfloat16

DTYPES = ("F8_E4M3", "F8_E5M2", "I8")
LARGEST_SCALE = 1e33  # with which every number of a table is finite in float32
USUAL_BLOCK = 128  # rows and columns, of DeepSeek's form


@functools.cache
def table(dtype: str) -> np.ndarray:
    """The number of each byte, float32 [256]."""
    codes = np.arange(256, dtype=np.uint8)
    if dtype == "I8":
        return codes.view(np.int8).astype(np.float32)
    if dtype == "F8_E5M2":
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal).astype(np.float32)
    values[[0x7F, 0xFF]] = np.nan
    return np.where(codes >> 7, -values, values)


def holds_no_number(raw: np.ndarray, dtype: str) -> bool:
    """Whether any of the bytes is NaN or infinity."""
    if dtype == "I8" or not raw.size:
        return False
    first = 0x7F if dtype == "F8_E4M3" else 0x7C  # of those, and of the negative ones 0x80 on top
    return bool(raw.view(np.int8).max() >= first or raw.max() >= first + 0x80)


class ByteReader:
    """Bytes to numbers of one dtype, by a table of the products with one scale.

    Two bytes are looked up at a time, which on a CPU is more than twice as fast.
    """

    def __init__(self, dtype: str, scale: float, out: np.dtype) -> None:
        """`out`: float32, float16, or uint16 for bfloat16."""
        with np.errstate(invalid="ignore"):  # the table's own NaN and infinity
            values = table(dtype) * np.float32(scale)
        self._table = rounded(values, out)
        wide = np.uint64 if self._table.itemsize == 4 else np.uint32
        low, high = np.arange(65536) & 255, np.arange(65536) >> 8
        pairs = np.stack([self._table[low], self._table[high]], axis=1)
        self._pairs = np.ascontiguousarray(pairs).view(wide).reshape(-1)

    def read_into(self, out: np.ndarray, raw: np.ndarray) -> None:
        """Fills `out`, flat, with the numbers of `raw`, flat and as many."""
        even = raw.size & ~1
        np.take(
            self._pairs,
            raw[:even].view("<u2"),
            out=out[:even].view(self._pairs.dtype),
            mode="wrap",  # no index is out of bounds; "raise" would copy through a buffer
        )
        if even < raw.size:
            out[even:] = self._table[raw[even:]]


def rounded(values: np.ndarray, out: np.dtype) -> np.ndarray:
    """float32 to the nearest of `out`: float32, float16 or, as uint16, bfloat16."""
    if out == np.uint16:
        return bfloat16.of_float32(values)
    with np.errstate(over="ignore"):  # who asked for float16 looks for infinities
        return values.astype(out, copy=False)


def block_of(size: int, count: int) -> int | None:
    """How many of `size` rows share each of `count` scales; None where that can't be.

    The last block may be smaller. Where the two numbers leave a choice, 128 is taken, then a power
    of two.
    """
    if count == 1:
        return size
    for block in (USUAL_BLOCK, *(1 << k for k in range(12, -1, -1))):
        if math.ceil(size / block) == count:
            return block
    return size // count if count and size % count == 0 else None
