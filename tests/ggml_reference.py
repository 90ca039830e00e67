"""What ggml's blocks mean, number by number: its `dequantize_row_*` in plain loops.

Slow, and written apart from `storage/numbers/ggml_blocks.py`, which it is the oracle of.
Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import numpy as np


def dequantize(raw: bytes, form: str) -> np.ndarray:
    """float32, flat."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
    size |= {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    out: list[np.float32] = []
    for begin in range(0, len(raw), size[form]):
        block = raw[begin : begin + size[form]]
        numbers = _K[form](block) if form.endswith("_K") else _legacy(block, form)
        out.extend(numbers)
    return np.array(out, dtype=np.float32)


def _f16(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block[at : at + 2], "<f2")[0])


def _i8(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _legacy(block: bytes, form: str) -> list[np.float32]:
    d = _f16(block, 0)
    if form == "Q8_0":
        return [d * np.float32(_i8(byte)) for byte in block[2:]]
    has_minimum = form.endswith("_1")
    at = 4 if has_minimum else 2
    m = _f16(block, 2) if has_minimum else np.float32(0)
    fifth = 0
    if form.startswith("Q5"):
        fifth = int.from_bytes(block[at : at + 4], "little")
        at += 4
    bits = 5 if form.startswith("Q5") else 4
    out = [np.float32(0)] * 32
    for j in range(16):
        for k, q in ((j, block[at + j] & 15), (j + 16, block[at + j] >> 4)):
            if bits == 5:
                q |= (fifth >> k & 1) << 4
            out[k] = d * np.float32(q) + m if has_minimum else d * np.float32(q - (1 << bits - 1))
    return out


def _scale_min(j: int, q: bytes) -> tuple[int, int]:
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


def _q45_k(block: bytes, bits: int) -> list[np.float32]:
    d, dmin, scales = _f16(block, 0), _f16(block, 2), block[4:16]
    qh = block[16:48] if bits == 5 else bytes(32)
    qs = block[48:] if bits == 5 else block[16:]
    out = []
    for part in range(8):
        scale, minimum = _scale_min(part, scales)
        for k in range(32):
            byte = qs[32 * (part // 2) + k]
            q = byte & 15 if part % 2 == 0 else byte >> 4
            q += 16 if qh[k] >> part & 1 else 0
            out.append(d * np.float32(scale) * np.float32(q) - dmin * np.float32(minimum))
    return out


def _q6_k(block: bytes) -> list[np.float32]:
    ql, qh, scales, d = block[:128], block[128:192], block[192:208], _f16(block, 208)
    out = [np.float32(0)] * 256
    for half in range(2):
        low, high, at = ql[64 * half :], qh[32 * half :], 128 * half
        for k in range(32):
            for run, nibble in enumerate(
                (low[k] & 15, low[k + 32] & 15, low[k] >> 4, low[k + 32] >> 4)
            ):
                q = (nibble | (high[k] >> 2 * run & 3) << 4) - 32
                scale = _i8(scales[8 * half + 2 * run + k // 16])
                out[at + 32 * run + k] = d * np.float32(scale) * np.float32(q)
    return out


_K = {
    "Q4_K": lambda block: _q45_k(block, 4),
    "Q5_K": lambda block: _q45_k(block, 5),
    "Q6_K": _q6_k,
}
