"""Files as people have them, made here: fp8 with scales, GGUF, MLX's triples. NumPy alone.

Encoders are simple: each number's nearest code by its group's largest. What they lose is theirs;
tests compare what is read with what the codes mean (`tests/ggml_reference.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fluxmesh.storage.numbers import float8
from fluxmesh.storage.safetensors import write_tensors
from tests.checkpoints import Arrays

Stored = tuple[np.ndarray, str]  # an array and what safetensors calls its dtype
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 127.0}


# --- bytes by a table ------------------------------------------------------------------------


def to_bytes(values: np.ndarray, dtype: str = "F8_E4M3") -> np.ndarray:
    """The code of the nearest number that the table has, uint8 of the same shape."""
    numbers = float8.table(dtype)
    codes = np.flatnonzero(np.isfinite(numbers))
    codes = codes[np.argsort(numbers[codes], kind="stable")]
    ladder = numbers[codes]
    right = np.clip(np.searchsorted(ladder, values), 1, len(ladder) - 1)
    is_left = np.abs(values - ladder[right - 1]) <= np.abs(ladder[right] - values)
    return codes[right - is_left].astype(np.uint8)


def from_bytes(codes: np.ndarray, dtype: str = "F8_E4M3") -> np.ndarray:
    return float8.table(dtype)[codes]


def float8_tensors(
    arrays: Arrays,
    dtype: str = "F8_E4M3",
    scale: str = "",
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: (),
    everything: bool = False,
) -> tuple[dict[str, Stored], Arrays]:
    """(the tensors of such a file, the same numbers in float32).

    Matrices become bytes; with `everything`, vectors too. With `scale`, the name of one, each has
    it beside it, of the `shape` that is made of the matrix's.
    """
    stored: dict[str, Stored] = {}
    exact: Arrays = {}
    for name, values in arrays.items():
        if values.ndim != 2 and not everything:
            stored[name] = (values, "F32")
            exact[name] = values
            continue
        scales = np.ones((), np.float32)
        if scale and name.endswith(".weight"):
            scales = _scales(values, shape(values.shape), LARGEST[dtype])
            stored[f"{name.removesuffix('.weight')}.{scale}"] = (scales, "F32")
        spread = _spread(scales, values.shape)
        codes = to_bytes(values / spread, dtype)
        stored[name] = (codes, dtype)
        exact[name] = (from_bytes(codes, dtype) * spread).astype(np.float32)
    return stored, exact


def _scales(values: np.ndarray, shape: tuple[int, ...], largest: float) -> np.ndarray:
    """Scales of a shape, such that each block's largest number becomes the form's largest."""
    rng = np.random.default_rng(values.size)
    if not shape:
        return np.float32(np.abs(values).max() / largest).reshape(())
    flat = np.abs(values).max() / largest * rng.uniform(1, 2, size=shape)
    return flat.astype(np.float32)


def _spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales as an array that the matrix can be multiplied with."""
    if scales.size == 1:
        return scales.reshape(())
    rows = scales.reshape(scales.shape[0], -1)
    blocks = (-(-shape[0] // rows.shape[0]), -(-shape[1] // rows.shape[1]))
    if rows.shape == (-(-shape[0] // 128), -(-shape[1] // 128)):
        blocks = (128, 128)
    spread = np.repeat(np.repeat(rows, blocks[0], axis=0), blocks[1], axis=1)
    return spread[: shape[0], : shape[1]]


def comfy_note(form: str, **more: object) -> Stored:
    """A layer's `comfy_quant`."""
    text = json.dumps({"format": form, **more}).encode()
    return np.frombuffer(text, dtype=np.uint8), "U8"


def write_stored(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> Path:
    path.unlink(missing_ok=True)
    write_tensors(path, tensors, metadata or {})
    return path


# --- GGUF ------------------------------------------------------------------------------------

GGML_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "BF16": 30,
}  # fmt: skip


def to_blocks(values: np.ndarray, form: str) -> np.ndarray:
    """Numbers, flat and a multiple of the block, as ggml's bytes (uint8)."""
    return _ENCODE[form](np.ascontiguousarray(values, dtype=np.float32).reshape(-1))


def _legacy(x: np.ndarray, bits: int, has_minimum: bool) -> np.ndarray:
    x = x.reshape(-1, 32)
    top = (1 << bits) - 1
    low = x.min(axis=1, keepdims=True) if has_minimum else -np.abs(x).max(axis=1, keepdims=True)
    high = x.max(axis=1, keepdims=True) if has_minimum else -low
    d = _half((high - low) / top)
    m = _half(low)
    base = m if has_minimum else -d * (1 << (bits - 1))
    q = np.clip(np.rint((x - base) / np.where(d == 0, 1, d)), 0, top).astype(np.uint8)
    parts = [_bytes_of(d), *([_bytes_of(m)] if has_minimum else [])]
    if bits == 5:
        parts.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    parts.append((q[:, :16] & 15) | ((q[:, 16:] & 15) << 4))
    return np.concatenate(parts, axis=1).reshape(-1)


def _q8_0(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 32)
    d = _half(np.abs(x).max(axis=1, keepdims=True) / 127)
    q = np.clip(np.rint(x / np.where(d == 0, 1, d)), -127, 127).astype(np.int8)
    return np.concatenate([_bytes_of(d), q.view(np.uint8)], axis=1).reshape(-1)


def _q45_k(x: np.ndarray, bits: int) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    top = (1 << bits) - 1
    low = np.minimum(x.min(axis=2), 0)
    d = _half(((x.max(axis=2) - low) / top).max(axis=1, keepdims=True) / 63)
    dmin = _half((-low).max(axis=1, keepdims=True) / 63)
    scale = np.clip(np.ceil((x.max(axis=2) - low) / top / np.where(d == 0, 1, d)), 0, 63)
    minimum = np.clip(np.rint(-low / np.where(dmin == 0, 1, dmin)), 0, 63)
    step = (d * scale)[:, :, None]
    q = np.rint((x + (dmin * minimum)[:, :, None]) / np.where(step == 0, 1, step))
    q = np.clip(q, 0, top).astype(np.uint8)
    s, m = scale.astype(np.uint8), minimum.astype(np.uint8)
    packed = [
        (s[:, :4] & 63) | (s[:, 4:] >> 4 << 6),
        (m[:, :4] & 63) | (m[:, 4:] >> 4 << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ]
    parts = [_bytes_of(d), _bytes_of(dmin), *packed]
    if bits == 5:
        shifts = np.arange(8, dtype=np.uint8)[:, None]
        parts.append(np.bitwise_or.reduce((q >> 4) << shifts, axis=1))
    low_bits = (q & 15).reshape(-1, 4, 2, 32)
    parts.append((low_bits[:, :, 0] | (low_bits[:, :, 1] << 4)).reshape(len(x), -1))
    return np.concatenate(parts, axis=1).reshape(-1)


def _q6_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 16, 16)
    largest = np.abs(x).max(axis=2) / 31
    d = _half(largest.max(axis=1, keepdims=True) / 127)
    scale = np.clip(np.ceil(largest / np.where(d == 0, 1, d)), 0, 127)
    step = (d * scale)[:, :, None]
    q = np.clip(np.rint(x / np.where(step == 0, 1, step)), -32, 31).astype(np.int8) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)  # half, run of 32 within it
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, 0:2] | (low[:, :, 2:4] << 4)], axis=2).reshape(len(x), -1)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    qh = np.bitwise_or.reduce(high << shifts, axis=2).reshape(len(x), -1)
    scales = scale.astype(np.int8).view(np.uint8)
    return np.concatenate([ql, qh, scales, _bytes_of(d)], axis=1).reshape(-1)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _bytes_of(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8).reshape(len(x), -1)


def _plain(form: str) -> Callable[[np.ndarray], np.ndarray]:
    def encode(x: np.ndarray) -> np.ndarray:
        if form == "BF16":
            return (x.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return x.astype("<f2" if form == "F16" else "<f4").view(np.uint8)

    return encode


_ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": lambda x: _legacy(x, 4, False),
    "Q4_1": lambda x: _legacy(x, 4, True),
    "Q5_0": lambda x: _legacy(x, 5, False),
    "Q5_1": lambda x: _legacy(x, 5, True),
    "Q8_0": _q8_0,
    "Q4_K": lambda x: _q45_k(x, 4),
    "Q5_K": lambda x: _q45_k(x, 5),
    "Q6_K": _q6_k,
    **{form: _plain(form) for form in ("F32", "F16", "BF16")},
}


def gguf_tensors(arrays: Arrays, form: str) -> dict[str, tuple[np.ndarray, str]]:
    """Arrays with the type that each is stored in: matrices in `form`, where blocks fit."""
    return {
        name: (array, form if array.ndim > 1 and array.size % 256 == 0 else "F32")
        for name, array in arrays.items()
    }


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    architecture: str = "flux",
    more: bytes = b"",
    more_count: int = 0,
) -> Path:
    """A GGUF file as ComfyUI-GGUF's converter writes it.

    Rows that are no whole number of blocks are laid into rows of 256, with a note of the shape.
    `more` are `more_count` further values of the header, as bytes.
    """
    values = [_text_value("general.architecture", architecture), more]
    infos, blobs = [], []
    count, offset = 1 + more_count, 0
    for name, (array, form) in tensors.items():
        block = 256 if form.endswith("_K") else 32 if form.startswith("Q") else 1
        shape = array.shape
        if array.ndim > 1 and shape[-1] % block:
            head = _text(f"comfy.gguf.orig_shape.{name}")
            values.append(head + struct.pack(f"<IIQ{len(shape)}i", 9, 5, len(shape), *shape))
            count += 1
            shape = (array.size // 256, 256)
        blob = to_blocks(array, form).tobytes() if form in _ENCODE else array.tobytes()
        dims = tuple(reversed(shape))
        info = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        infos.append(_text(name) + info + struct.pack("<IQ", GGML_TYPES[form], offset))
        blob += bytes(-len(blob) % 32)
        blobs.append(blob)
        offset += len(blob)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), count) + b"".join([*values, *infos])
    path.write_bytes(head + bytes(-len(head) % 32) + b"".join(blobs))
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _text_value(key: str, text: str) -> bytes:
    return _text(key) + struct.pack("<I", 8) + _text(text)


def list_of_texts(key: str, texts: list[str]) -> bytes:
    """A header's value that is an array of strings, as a tokenizer's words are."""
    return _text(key) + struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(map(_text, texts))
