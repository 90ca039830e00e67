"""Adapters of every kind, made with NumPy, each beside the weights that it should lead to.

What a kind does is written down here a second time, in float64 and by the formulas of its paper or
of LyCORIS, so that reader and model are held against something that shares no line with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]  # by the ending of a key: "lora_down.weight"
Made = tuple[Arrays, np.ndarray]  # what is stored, and the weight that it makes of another
Maker = Callable[[np.random.Generator, np.ndarray], Made]

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file, each array in its own dtype; `dtypes` names others of the same size."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    blobs, offset = [], 0
    for key, array in arrays.items():
        blob = np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(key) or DTYPES[array.dtype.name]
        span = [offset, offset + len(blob)]
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def normal(rng: np.random.Generator, *shape: int, size: float = 0.2) -> np.ndarray:
    return (size * rng.standard_normal(shape)).astype(np.float32)


def alpha(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def product(*factors: np.ndarray) -> np.ndarray:
    """In float64."""
    total = factors[0].astype(np.float64)
    for factor in factors[1:]:
        total = total @ factor.astype(np.float64)
    return total


def by_rows(weight: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return weight * (lengths.reshape(-1) / np.linalg.norm(weight, axis=1))[:, None]


def by_columns(weight: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return weight * (lengths.reshape(-1) / np.linalg.norm(weight, axis=0))[None, :]


def lora(rng: np.random.Generator, weight: np.ndarray) -> Made:
    out, into = weight.shape
    a, b = normal(rng, 4, into), normal(rng, out, 4)
    stored = {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha(2)}
    return stored, weight + 0.5 * product(b, a)


def lokr_full(rng: np.random.Generator, weight: np.ndarray) -> Made:
    """Both factors whole: whatever alpha says, the scale is 1."""
    out, into = weight.shape
    w1, w2 = normal(rng, 4, 4), normal(rng, out // 4, into // 4)
    stored = {"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha(9999)}
    return stored, weight + np.kron(w1.astype(np.float64), w2)


def lokr_half(rng: np.random.Generator, weight: np.ndarray) -> Made:
    out, into = weight.shape
    w1, w2_a, w2_b = normal(rng, 4, 2), normal(rng, out // 4, 3), normal(rng, 3, into // 2)
    stored = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha(6)}
    return stored, weight + 6 / 3 * np.kron(w1.astype(np.float64), product(w2_a, w2_b))


def lokr_both(rng: np.random.Generator, weight: np.ndarray) -> Made:
    out, into = weight.shape
    w1_a, w1_b = normal(rng, 2, 3), normal(rng, 3, 4)
    w2_a, w2_b = normal(rng, out // 2, 3), normal(rng, 3, into // 4)
    stored = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b,
              "alpha": alpha(1)}  # fmt: skip
    return stored, weight + 1 / 3 * np.kron(product(w1_a, w1_b), product(w2_a, w2_b))


def lokr_w1_alone(rng: np.random.Generator, weight: np.ndarray) -> Made:
    """Only the small factor is stored in two; the rank is then its own."""
    out, into = weight.shape
    w1_a, w1_b, w2 = normal(rng, 4, 2), normal(rng, 2, 4), normal(rng, out // 4, into // 4)
    stored = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2": w2, "alpha": alpha(1)}
    return stored, weight + 1 / 2 * np.kron(product(w1_a, w1_b), w2.astype(np.float64))


def lokr_tucker(rng: np.random.Generator, weight: np.ndarray) -> Made:
    out, into = weight.shape
    w1, core = normal(rng, 2, 2), normal(rng, 3, 3, 1, 1)
    w2_a, w2_b = normal(rng, 3, out // 2), normal(rng, 3, into // 2)
    stored = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b,
              "alpha": alpha(3)}  # fmt: skip
    w2 = np.einsum("ijkl,ip,jr->pr", core.astype(np.float64), w2_a, w2_b)
    return stored, weight + np.kron(w1.astype(np.float64), w2)


def _loha(rng: np.random.Generator, weight: np.ndarray, rank: int) -> Made:
    out, into = weight.shape
    w1_a, w2_a = normal(rng, out, rank), normal(rng, out, rank)
    w1_b, w2_b = normal(rng, rank, into), normal(rng, rank, into)
    stored = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b,
              "alpha": alpha(2 * rank)}  # fmt: skip
    return stored, weight + 2 * product(w1_a, w1_b) * product(w2_a, w2_b)


def loha(rng: np.random.Generator, weight: np.ndarray) -> Made:
    """Small enough to become a LoRA of all pairs of ranks."""
    return _loha(rng, weight, 3)


def loha_large(rng: np.random.Generator, weight: np.ndarray) -> Made:
    """Kept in its factors."""
    return _loha(rng, weight, 9)


def loha_tucker(rng: np.random.Generator, weight: np.ndarray) -> Made:
    out, into = weight.shape
    t1, t2 = normal(rng, 3, 3, 1, 1), normal(rng, 3, 3, 1, 1)
    w1_a, w2_a = normal(rng, 3, out), normal(rng, 3, out)
    w1_b, w2_b = normal(rng, 3, into), normal(rng, 3, into)
    stored = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": w1_a, "hada_w1_b": w1_b,
              "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": alpha(3)}  # fmt: skip
    m1 = np.einsum("ijkl,ip,jr->pr", t1.astype(np.float64), w1_a, w1_b)
    m2 = np.einsum("ijkl,ip,jr->pr", t2.astype(np.float64), w2_a, w2_b)
    return stored, weight + m1 * m2


def difference(rng: np.random.Generator, weight: np.ndarray) -> Made:
    values = normal(rng, *weight.shape, size=0.05)
    return {"diff": values}, weight + values


def dora(rng: np.random.Generator, weight: np.ndarray) -> Made:
    stored, changed = lora(rng, weight)
    lengths = 1 + normal(rng, weight.shape[0], 1)
    return stored | {"dora_scale": lengths}, by_rows(changed, lengths)


def dora_of_inputs(rng: np.random.Generator, weight: np.ndarray) -> Made:
    stored, changed = lora(rng, weight)
    lengths = 1 + normal(rng, 1, weight.shape[1])
    return stored | {"dora_scale": lengths}, by_columns(changed, lengths)


def dora_lokr(rng: np.random.Generator, weight: np.ndarray) -> Made:
    stored, changed = lokr_half(rng, weight)
    lengths = 1 + normal(rng, weight.shape[0], 1)
    return stored | {"dora_scale": lengths}, by_rows(changed, lengths)


def dora_lokr_of_inputs(rng: np.random.Generator, weight: np.ndarray) -> Made:
    stored, changed = lokr_full(rng, weight)
    lengths = 1 + normal(rng, 1, weight.shape[1])
    return stored | {"dora_scale": lengths}, by_columns(changed, lengths)


def dora_loha(rng: np.random.Generator, weight: np.ndarray) -> Made:
    stored, changed = loha_large(rng, weight)
    lengths = 1 + normal(rng, weight.shape[0], 1)
    return stored | {"dora_scale": lengths}, by_rows(changed, lengths)


KINDS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        *(lora, lokr_full, lokr_half, lokr_both, lokr_w1_alone, lokr_tucker),
        *(loha, loha_large, loha_tucker, difference),
        *(dora, dora_of_inputs, dora_lokr, dora_lokr_of_inputs, dora_loha),
    )
}
