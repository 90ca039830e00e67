"""Of one module of an adapter's file: whether its tensors make an adapter, and which.

Below `reading.py`. Shapes are checked by the header alone; `term_of` and `magnitude_of` read the
numbers. Imports no mlx.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fluxmesh.adapters import values
from fluxmesh.adapters.changes import Dense, Hadamard, Kronecker, LowRank, Magnitude, Term
from fluxmesh.adapters.keys import ModuleKeys
from fluxmesh.errors import AdapterError

PAIRS = (  # roles of which a module has both or none
    ("a", "b"),
    ("a_transposed", "b_transposed"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
)


def check_complete(path: Path, module: str, part: ModuleKeys) -> None:
    """Raises `AdapterError` where a factor is missing, or is of two kinds at once."""
    roles = part.entries.keys()
    lone = next((pair for pair in PAIRS if len(roles & set(pair)) == 1), None)
    if lone is not None:
        raise AdapterError(
            f"{path}: {module} has one of a pair of matrices and lacks the other "
            f"({' or '.join(lone)}); the file is incomplete."
        )
    kinds = [
        bool(roles & {"a", "a_transposed"}),
        any(role.startswith("lokr") for role in roles),
        any(role.startswith("hada") for role in roles),
        "diff" in roles,
    ]
    lokr = kinds[1] and not all(roles & {f"lokr_{w}", f"lokr_{w}_a"} for w in ("w1", "w2"))
    loha = kinds[2] and not roles >= {"hada_w1_a", "hada_w2_a"}
    if sum(kinds) != 1 or lokr or loha:
        raise AdapterError(
            f"{path}: {module} has {', '.join(sorted(roles))}, which make no adapter; the file is "
            "incomplete."
        )


def shape_of(
    path: Path, module: str, part: ModuleKeys, expected: tuple[int, int]
) -> tuple[int, int]:
    """[out, in] of the product, by the header alone. Raises `AdapterError` for factors of none."""
    shapes = {
        role: _flat(entry.shape)
        for role, entry in part.entries.items()
        if role not in ("alpha", "bias", "magnitude")
    }
    damaged = AdapterError(
        f"{path}: {module} has matrices {_shapes_text(part)}, which are no adapter's; the file is "
        "damaged."
    )
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise damaged
    s = {role: (shape[0], shape[1]) for role, shape in shapes.items()}
    fits = True
    if "a" in s:
        a, b = s["a"], s["b"]
        if (a[1], b[0]) != (expected[1], expected[0]) and (a[0], b[1]) == (
            expected[1], expected[0],
        ) and a[1] == b[0]:  # fmt: skip
            # Stored as MLX has them, [in, rank] and [rank, out].
            part.entries["a_transposed"] = part.entries.pop("a")
            part.entries["b_transposed"] = part.entries.pop("b")
            return expected
        fits, result = a[0] == b[1], (b[0], a[1])
    elif "a_transposed" in s:
        a, b = s["a_transposed"], s["b_transposed"]
        fits, result = a[1] == b[0], (b[1], a[0])
    elif "diff" in s:
        result = s["diff"]
    elif "hada_w1_a" in s:
        result = _hadamard_shape(s)
        fits = result == _hadamard_shape(s, "2") and result[0] > 0
    else:
        w1, w2 = _kronecker_side(s, "w1"), _kronecker_side(s, "w2")
        fits, result = min(*w1, *w2) > 0, (w1[0] * w2[0], w1[1] * w2[1])
    if not fits:
        raise damaged
    magnitude = part.entries.get("magnitude")
    if magnitude is not None and int(np.prod(magnitude.shape)) not in result:
        raise damaged
    bias = part.entries.get("bias")
    if bias is not None and int(np.prod(bias.shape)) != result[0]:
        raise damaged
    return result


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's factor is a linear's."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _shapes_text(part: ModuleKeys) -> str:
    entries = part.entries.items()
    return " and ".join(str(e.shape) for role, e in entries if role not in ("alpha", "bias"))


def _hadamard_shape(s: dict[str, tuple[int, int]], number: str = "1") -> tuple[int, int]:
    """[out, in] of one of LoHa's two products; (0, 0) where its factors don't fit."""
    w_a, w_b, t = s[f"hada_w{number}_a"], s[f"hada_w{number}_b"], s.get(f"hada_t{number}")
    if t is None:
        return (w_a[0], w_b[1]) if w_a[1] == w_b[0] else (0, 0)
    return (w_a[1], w_b[1]) if (w_a[0], w_b[0]) == t else (0, 0)


def _kronecker_side(s: dict[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """The shape of `w1` or `w2`; (0, 0) where its factors don't fit."""
    if f"lokr_{name}" in s:
        return s[f"lokr_{name}"]
    w_a, w_b = s[f"lokr_{name}_a"], s[f"lokr_{name}_b"]
    t = s.get("lokr_t2") if name == "w2" else None
    if t is None:
        return (w_a[0], w_b[1]) if w_a[1] == w_b[0] else (0, 0)
    return (w_a[1], w_b[1]) if (w_a[0], w_b[0]) == t else (0, 0)


def rank_of(keys: ModuleKeys) -> int:
    """The rank by which an alpha is divided; 0 where the kind has none and the scale is 1.

    LyCORIS divides by the rank only where a factor of LoKr is stored in two.
    """
    entries = keys.entries
    for role, axis in (
        ("a", 0), ("a_transposed", 1), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0),
    ):  # fmt: skip
        if role in entries:
            return entries[role].shape[axis]
    return 0


def _matrices(keys: ModuleKeys) -> Iterator[tuple[str, np.ndarray]]:
    for role, entry in keys.entries.items():
        if role not in ("alpha", "bias", "magnitude"):
            matrix = values.floats(entry, keys.float8.get(role))
            yield role, matrix.reshape(matrix.shape[:2])


def term_of(keys: ModuleKeys, scale: float) -> Term:
    """The factors of one module, read. Raises `AdapterError` where one is not finite."""
    m = dict(_matrices(keys))
    if "a" in m:
        return LowRank(m["a"], m["b"], scale, _dtype(keys, "a", "b"))
    if "a_transposed" in m:
        a, b = m["a_transposed"].T, m["b_transposed"].T
        return LowRank(a, b, scale, _dtype(keys, "a_transposed", "b_transposed"))
    if "diff" in m:
        return Dense(m["diff"])
    if "hada_w1_a" in m:
        first, second = (
            (_outer(m[f"hada_w{k}_a"], m.get(f"hada_t{k}")), m[f"hada_w{k}_b"]) for k in (1, 2)
        )
        product = Hadamard(*first, *second, scale)
        return product.low_rank() or product
    w1 = m["lokr_w1"] if "lokr_w1" in m else m["lokr_w1_a"] @ m["lokr_w1_b"]
    if "lokr_w2" in m:
        return Kronecker(w1, m["lokr_w2"], None, scale)
    return Kronecker(w1, _outer(m["lokr_w2_a"], m.get("lokr_t2")), m["lokr_w2_b"], scale)


def _outer(factor: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """A left factor [out, rank], of a Tucker form's [rank, out] and core [rank, rank] too."""
    return factor if core is None else factor.T @ core


def _dtype(keys: ModuleKeys, *roles: str) -> str:
    dtypes = {keys.entries[role].dtype for role in roles}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def magnitude_of(keys: ModuleKeys, outputs: int) -> Magnitude | None:
    """DoRA's lengths; [1, in] are those of columns, [out], [out, 1] those of rows."""
    entry = keys.entries.get("magnitude")
    if entry is None:
        return None
    shape = _flat(entry.shape)
    of_rows = len(shape) == 1 or (shape[0] == outputs and shape[1] == 1)
    return Magnitude(values.floats(entry).reshape(-1), of_inputs=not of_rows)
