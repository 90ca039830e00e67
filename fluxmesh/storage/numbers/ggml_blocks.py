"""ggml's blocks of quantized numbers, as float32. Imports no mlx.

A block is 32 or 256 numbers of a few bits each, with float16 scales that they share; the K types
give each 16 or 32 of their 256 a small scale (and minimum) of its own. The arithmetic is that of
ggml's `dequantize_row_*`, in float32:
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, layouts in ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

F16, U8, I8 = "<f2", "u1", "i1"
LAYOUTS = {
    "Q4_0": np.dtype([("d", F16), ("qs", U8, 16)]),
    "Q4_1": np.dtype([("d", F16), ("m", F16), ("qs", U8, 16)]),
    "Q5_0": np.dtype([("d", F16), ("qh", U8, 4), ("qs", U8, 16)]),
    "Q5_1": np.dtype([("d", F16), ("m", F16), ("qh", U8, 4), ("qs", U8, 16)]),
    "Q8_0": np.dtype([("d", F16), ("qs", I8, 32)]),
    "Q4_K": np.dtype([("d", F16), ("dmin", F16), ("scales", U8, 12), ("qs", U8, (4, 32))]),
    "Q5_K": np.dtype(
        [("d", F16), ("dmin", F16), ("scales", U8, 12), ("qh", U8, 32), ("qs", U8, (4, 32))]
    ),
    "Q6_K": np.dtype([("ql", U8, (2, 2, 32)), ("qh", U8, (2, 32)), ("scales", I8, 16), ("d", F16)]),
}


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of whole blocks, flat: `raw` is their bytes (uint8), `dtype` one of LAYOUTS."""
    return _READ[dtype](raw.view(LAYOUTS[dtype])).reshape(-1)


def _scale(field: np.ndarray) -> np.ndarray:
    """A block's float16 as float32 [blocks, 1]."""
    return field.astype(np.float32)[:, None]


def _halves(qs: np.ndarray) -> np.ndarray:
    """The lower four bits of each byte of a last axis, and after them all upper ones; uint8."""
    return np.concatenate([qs & 0x0F, qs >> 4], axis=-1)


def _fifth_bits(qh: np.ndarray) -> np.ndarray:
    """Bit k of 32 in four bytes is number k's fifth: 0 or 16, uint8 [blocks, 32]."""
    return np.unpackbits(qh, axis=-1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _scale(b["d"]) * (_halves(b["qs"]).view(np.int8) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _scale(b["d"]) * _halves(b["qs"]) + _scale(b["m"])


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _scale(b["d"]) * ((_halves(b["qs"]) | _fifth_bits(b["qh"])).view(np.int8) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _scale(b["d"]) * (_halves(b["qs"]) | _fifth_bits(b["qh"])) + _scale(b["m"])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _scale(b["d"]) * b["qs"]


def _scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a Q4_K or Q5_K block, its eight parts' scales and minima, float32 [blocks, 8, 1].

    Twelve bytes hold eight of either, of six bits: the first four in the lower bits of bytes 0-3
    (4-7 for minima), the others' lower halves in bytes 8-11, their upper bits on top of 0-7.
    """
    scales, minima, low = (b["scales"][:, i : i + 4] for i in (0, 4, 8))
    six = np.concatenate([scales & 63, (low & 15) | (scales >> 6 << 4)], axis=1)
    six_minima = np.concatenate([minima & 63, (low >> 4) | (minima >> 6 << 4)], axis=1)
    return (_scale(b["d"]) * six)[:, :, None], (_scale(b["dmin"]) * six_minima)[:, :, None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(b)
    return scales * _halves(b["qs"]).reshape(-1, 8, 32) - minima


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(b)
    part = np.arange(8, dtype=np.uint8)[:, None]  # whose fifth bits are bit `part` of each byte
    fifth = (b["qh"][:, None, :] >> part & 1) << 4
    return scales * (_halves(b["qs"]).reshape(-1, 8, 32) | fifth) - minima


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = np.stack([b["ql"] & 15, b["ql"] >> 4], axis=2).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (b["qh"][:, :, None, :] >> shift & 3) << 4
    scales = _scale(b["d"]) * b["scales"]
    return scales[:, :, None] * ((low | high).view(np.int8) - 32).reshape(-1, 16, 16)


_READ: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
