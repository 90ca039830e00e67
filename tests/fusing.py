"""Every operation of `ops.py` beside its plain form, on random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fluxmesh.kernels import ops as fused
from fluxmesh.models.flux1 import positions
from fluxmesh.models.layers import rope_tables

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class FusingCase:
    """Both forms take `inputs` and give arrays; inputs beyond `moving` have no gradient."""

    fused: Callable[..., Arrays]
    plain: Callable[..., Arrays]
    inputs: Arrays
    moving: int


@dataclass(frozen=True)
class Shape:
    """B pictures of S tokens, L of them text; H heads of hd channels."""

    B: int
    S: int
    L: int
    H: int
    hd: int

    @property
    def hidden(self) -> int:
        return self.H * self.hd


NAMES = (
    *("modulated_norm", "gated_sum", "gated_norm", "turned_heads", "turned", "turned_one"),
    *(
        "gelu",
        "gelu_beside",
        "swiglu",
        "swiglu_beside",
        "group_norm",
        "group_norm_silu",
        "offset_sum",
    ),
)
AUTOENCODERS = ("group_norm", "group_norm_silu", "offset_sum")  # which are never in float16


def make(name: str, shape: Shape, dtype: mx.Dtype, seed: int = 1) -> FusingCase:
    """An operation's case; numbers are normal, and float32 or bfloat16."""
    B, S, L, hd = shape.B, shape.S, shape.L, shape.hd
    D = shape.hidden
    keys = iter(mx.random.split(mx.random.key(seed), 16))

    def drawn(*size: int) -> mx.array:
        return mx.random.normal(size, key=next(keys)).astype(dtype)

    def scale() -> mx.array:
        return 1 + drawn(hd) / 10

    tokens, vector = (B, S, D), (B, 1, D)
    match name:
        case "modulated_norm":
            return _same(name, (drawn(*tokens), drawn(*vector), drawn(*vector)))
        case "gated_sum":
            return _same(name, (drawn(*tokens), drawn(*vector), drawn(*tokens)))
        case "gated_norm":
            inputs = (drawn(*tokens), drawn(*vector), drawn(*tokens))
            return _same(name, (*inputs, drawn(*vector), drawn(*vector)))
        case "turned_heads" | "turned":
            streams = (drawn(B, L, 3 * D), scale(), scale(), drawn(B, S - L, 3 * D))
            return _turned(name, shape, 3, (*streams, scale(), scale()))
        case "turned_one":  # of a single block, which goes on past its queries, keys and values
            return _turned("turned", shape, 2, (drawn(B, S, 7 * D), scale(), scale()))
        case "gelu":
            return _same(name, (4 * drawn(*tokens),))
        case "gelu_beside":
            return _same(name, (drawn(*tokens), 4 * drawn(B, S, 7 * D)), start=3 * D)
        case "swiglu":
            return _same(name, (4 * drawn(B, S, 2 * D),))
        case "swiglu_beside":
            return _same(name, (drawn(*tokens), 4 * drawn(B, S, 9 * D)), start=3 * D)
        case "group_norm" | "group_norm_silu":
            x = 3 * drawn(B, 6, 7, 64) + 5
            weights = (drawn(64), drawn(64), drawn(64))
            return _same("group_norm", (x, *weights), groups=32, silu=name != "group_norm")
        case "offset_sum":
            return _same(name, (drawn(*tokens), drawn(*tokens), drawn(D)))
    raise ValueError(name)


def _same(name: str, inputs: Arrays, **fixed: int | bool) -> FusingCase:
    function = functools.partial(getattr(fused, name), **fixed)
    plain = functools.partial(fused.PLAIN[name], **fixed)
    return FusingCase(_listing(function), _listing(plain), inputs, len(inputs))


def _turned(name: str, shape: Shape, groups: int, streams: Arrays) -> FusingCase:
    hd, rows = shape.hd, 5
    places = shape.S - shape.L
    image = np.stack([np.zeros(places), np.arange(places) // rows, np.arange(places) % rows], -1)
    ids = np.concatenate([positions.text_positions(shape.L), image])
    side = 2 * (hd // 6)
    pe = rope_tables(ids, (hd - 2 * side, side, side), 10_000)

    def function(*arrays: mx.array) -> Arrays:
        *flat, table = arrays
        pairs = [(flat[i], flat[i + 1 : i + 3]) for i in range(0, len(flat), 3)]
        return _listed(getattr(fused, name)(pairs, table, shape.H, groups))

    def plain(*arrays: mx.array) -> Arrays:
        *flat, table = arrays
        return _listed(fused.PLAIN[name](table, *flat, heads=shape.H, groups=groups, normed=2))

    return FusingCase(function, plain, (*streams, pe), len(streams))


def _listing(function: Callable[..., mx.array | Arrays]) -> Callable[..., Arrays]:
    return lambda *arrays: _listed(function(*arrays))


def _listed(out: mx.array | Arrays) -> Arrays:
    return (out,) if isinstance(out, mx.array) else tuple(out)


def values_and_gradients(
    form: Callable[..., Arrays], case: FusingCase, dtype: mx.Dtype | None = None
) -> list[np.ndarray]:
    """What `form` gives, and the gradients of a sum of it with weights of its own; float32.

    `dtype`: what the inputs are cast to before.
    """
    inputs = [x if dtype is None else x.astype(dtype) for x in case.inputs]

    def total(*moving: mx.array) -> tuple[mx.array, Arrays]:
        outs = form(*moving, *inputs[case.moving :])
        weighed = (
            mx.sum(out.astype(mx.float32) * (2 + mx.cos(mx.arange(out.size))).reshape(out.shape))
            for out in outs
        )
        return sum(weighed, mx.array(0.0)), outs

    places = list(range(case.moving))
    (_, outs), slopes = mx.value_and_grad(total, argnums=places)(*inputs[: case.moving])
    return [np.array(x.astype(mx.float32)) for x in (*outs, *slopes)]


def worst(actual: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> float:
    """The largest relative distance of two lists of arrays."""
    return max(
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        for a, b in zip(actual, wanted, strict=True)
    )
