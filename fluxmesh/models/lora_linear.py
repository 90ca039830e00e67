"""Linears with an adapter beside them, as every family's layers may hold them.

`LoRALinear` is the common kind. LoKr, LoHa and plain differences lie beside a linear as `Delta`s
(`DeltaLinear`), each kept in the factors that its file has; DoRA gives rows or columns of the
weight another length (`ScaledLinear`). They stand around each other and around plain or quantized
linears, and each can be cut as a linear can (`slicing.py`). `adapters/lora.py` builds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.partition import Cut


class AdaptedLinear(nn.Module):
    """Around a linear, or around another one of these."""

    linear: Any

    def cut(self, cut: Cut, inner: Callable[[Any], Any], *, copy: bool) -> AdaptedLinear:
        """The part of it that holds `cut`, lazily; `inner` cuts what it stands around.

        `copy` as of `slicing.cut_linear`.
        """
        raise NotImplementedError


def innermost(module: Any) -> Any:
    """The plain or quantized linear that adapters stand around."""
    while isinstance(module, AdaptedLinear):
        module = module.linear
    return module


def widened(linear: Any, inputs: int) -> nn.Linear:
    """A linear with more inputs, lazily: those that are new come last, and weigh nothing.

    A quantized one becomes plain.
    """
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        packed = (linear.weight, linear.scales, linear.biases)
        weight = mx.dequantize(*packed, linear.group_size, linear.bits)
    outputs, held = weight.shape
    wide = nn.Linear(1, 1, bias="bias" in linear)
    wide.weight = mx.concatenate([weight, mx.zeros((outputs, inputs - held), weight.dtype)], axis=1)
    if "bias" in linear:
        wide.bias = linear.bias
    return wide


class LoRALinear(AdaptedLinear):
    """A linear with a low-rank correction beside it: `linear(x) + scale * (x @ a) @ b`.

    Activations keep the dtype that comes in, whatever that of `lora_a` and `lora_b`: training
    keeps those in float32 without lifting all that follows.
    """

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float) -> None:
        """`lora_a` is [in, rank], `lora_b` [rank, out]; `linear` may be quantized."""
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        low = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return y + (low if self.scale == 1 else self.scale * low).astype(y.dtype)

    def cut(self, cut: Cut, inner: Callable[[Any], Any], *, copy: bool) -> LoRALinear:
        """As of every `AdaptedLinear`."""
        a, b = self.lora_a, self.lora_b
        if cut.axis == 0:
            b = joined_spans(b, cut, 1, copy=copy)
        else:
            a = joined_spans(a, cut, 0, copy=copy)
        return LoRALinear(inner(self.linear), a, b, self.scale)


class ScaledLinear(AdaptedLinear):
    """A linear whose weight has its rows, or its columns, multiplied: `rows * W * columns`.

    The bias stays as it is. Both are float32, or None for 1.
    """

    def __init__(self, linear: Any, rows: mx.array | None, columns: mx.array | None) -> None:
        """`rows` is [out], `columns` [in]."""
        super().__init__()
        self.linear = linear
        self.rows = rows
        self.columns = columns

    def __call__(self, x: mx.array) -> mx.array:
        if self.columns is not None:
            x = (x * self.columns).astype(x.dtype)
        y: mx.array = self.linear(x)
        if self.rows is None:
            return y
        base, scaled = innermost(self), y * self.rows
        if "bias" in base:
            scaled = scaled + base.bias * (1 - self.rows)
        return scaled.astype(y.dtype)

    def cut(self, cut: Cut, inner: Callable[[Any], Any], *, copy: bool) -> ScaledLinear:
        """As of every `AdaptedLinear`."""
        rows, columns = self.rows, self.columns
        if cut.axis == 0 and rows is not None:
            rows = rows[mx.array(cut.indices)]
        if cut.axis == 1 and columns is not None:
            columns = columns[mx.array(cut.indices)]
        return ScaledLinear(inner(self.linear), rows, columns)


class Delta(nn.Module):
    """A change of a weight: x [..., in] to what the change adds, [..., outputs]."""

    outputs: int

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def of_rows(self, rows: np.ndarray) -> Delta:
        """The same for some of its outputs."""
        raise NotImplementedError

    def of_columns(self, columns: np.ndarray) -> Delta:
        """The same where only these inputs come, in this order; a part of a sum."""
        raise NotImplementedError


class DenseDelta(Delta):
    """The change itself, [out, in]."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight
        self.outputs = weight.shape[0]

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T.astype(x.dtype)

    def of_rows(self, rows: np.ndarray) -> DenseDelta:
        """As of every `Delta`."""
        return DenseDelta(self.weight[mx.array(rows)])

    def of_columns(self, columns: np.ndarray) -> DenseDelta:
        """As of every `Delta`."""
        return DenseDelta(self.weight[:, mx.array(columns)])


class HadamardDelta(Delta):
    """LoHa, `(b1 @ a1) * (b2 @ a2)`: multiplied out at each call, and forgotten after it."""

    def __init__(self, b1: mx.array, a1: mx.array, b2: mx.array, a2: mx.array) -> None:
        """`b1`, `b2` are [out, rank], `a1`, `a2` [rank, in]."""
        super().__init__()
        self.b1, self.a1, self.b2, self.a2 = b1, a1, b2, a2
        self.outputs = b1.shape[0]

    def __call__(self, x: mx.array) -> mx.array:
        weight = (self.b1 @ self.a1) * (self.b2 @ self.a2)
        return x @ weight.T.astype(x.dtype)

    def of_rows(self, rows: np.ndarray) -> HadamardDelta:
        """As of every `Delta`."""
        index = mx.array(rows)
        return HadamardDelta(self.b1[index], self.a1, self.b2[index], self.a2)

    def of_columns(self, columns: np.ndarray) -> HadamardDelta:
        """As of every `Delta`."""
        index = mx.array(columns)
        return HadamardDelta(self.b1, self.a1[:, index], self.b2, self.a2[:, index])


class KroneckerDelta(Delta):
    """LoKr, `kron(w1, w2)`, as two small products: the weight is never made.

    With x as [q, n] for w1 [p, q] and w2 [m, n], `kron(w1, w2) @ x` is `w1 @ x @ w2.T`. No part of
    a Kronecker product is one, so that a cut one computes with zeros for inputs that are missing,
    and lets go the outputs that others have: a fraction of the linear's own work.
    """

    def __init__(
        self,
        w1: mx.array,
        w2: mx.array,
        w2_in: mx.array | None = None,
        gains: mx.array | None = None,
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> None:
        """`w2` is [m, n], or [m, rank] beside `w2_in` [rank, n]; `gains` [out] multiply outputs.

        `rows` and `columns` are the places, of all, of those that are held.
        """
        super().__init__()
        self.w1, self.w2, self.w2_in, self.gains = w1, w2, w2_in, gains
        self.held_rows, self.held_columns = rows, columns
        self.outputs = w1.shape[0] * w2.shape[0] if rows is None else len(rows)

    def __call__(self, x: mx.array) -> mx.array:
        w1, w2 = self.w1.astype(x.dtype), self.w2.astype(x.dtype)
        n = (self.w2 if self.w2_in is None else self.w2_in).shape[1]
        if self.held_columns is not None:
            whole = mx.zeros((*x.shape[:-1], w1.shape[1] * n), dtype=x.dtype)
            whole[..., mx.array(self.held_columns)] = x
            x = whole
        x = x.reshape(*x.shape[:-1], w1.shape[1], n)
        if self.w2_in is not None:
            x = x @ self.w2_in.T.astype(x.dtype)
        y = w1 @ (x @ w2.T)  # [..., p, m]
        y = y.reshape(*y.shape[:-2], -1)
        if self.gains is not None:
            y = (y * self.gains).astype(x.dtype)
        return y if self.held_rows is None else mx.take(y, mx.array(self.held_rows), axis=-1)

    def of_rows(self, rows: np.ndarray) -> KroneckerDelta:
        """As of every `Delta`."""
        held = rows if self.held_rows is None else self.held_rows[rows]
        factors = (self.w1, self.w2, self.w2_in, self.gains)
        return KroneckerDelta(*factors, held, self.held_columns)

    def of_columns(self, columns: np.ndarray) -> KroneckerDelta:
        """As of every `Delta`."""
        held = columns if self.held_columns is None else self.held_columns[columns]
        factors = (self.w1, self.w2, self.w2_in, self.gains)
        return KroneckerDelta(*factors, self.held_rows, held)


class DeltaLinear(AdaptedLinear):
    """A linear with deltas beside it, each for outputs of its own."""

    def __init__(
        self, linear: Any, deltas: Sequence[Delta], places: Sequence[np.ndarray], outputs: int
    ) -> None:
        """Output k of delta i is output `places[i][k]` of the linear's `outputs`."""
        super().__init__()
        self.linear = linear
        self.deltas = list(deltas)
        self._places, self._outputs = tuple(places), outputs
        # Where each output is among those of all deltas, and of a zero behind them.
        sizes = [len(place) for place in places]
        index = np.full(outputs, sum(sizes), np.int32)
        for place, end in zip(places, np.cumsum(sizes), strict=True):
            index[place] = np.arange(end - len(place), end)
        self._index = index

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        parts = [delta(x) for delta in self.deltas]
        if len(parts) == 1 and np.array_equal(self._index, np.arange(self._outputs)):
            return y + parts[0].astype(y.dtype)
        zero = mx.zeros((*x.shape[:-1], 1), dtype=x.dtype)
        added = mx.take(mx.concatenate([*parts, zero], axis=-1), mx.array(self._index), axis=-1)
        return y + added.astype(y.dtype)

    def cut(self, cut: Cut, inner: Callable[[Any], Any], *, copy: bool) -> AdaptedLinear:
        """As of every `AdaptedLinear`."""
        linear = inner(self.linear)
        if cut.axis == 1:
            deltas = [delta.of_columns(cut.indices) for delta in self.deltas]
            return DeltaLinear(linear, deltas, self._places, self._outputs)
        now = np.full(self._outputs, -1)  # where each output is from now on
        now[cut.indices] = np.arange(len(cut.indices))
        deltas, places = [], []
        for delta, place in zip(self.deltas, self._places, strict=True):
            kept = np.flatnonzero(now[place] >= 0)
            if len(kept) == len(place):
                deltas.append(delta)
            elif len(kept):
                deltas.append(delta.of_rows(kept))
            if len(kept):
                places.append(now[place[kept]])
        return DeltaLinear(linear, deltas, places, len(cut.indices))


def joined_spans(array: mx.array, cut: Cut, axis: int, *, copy: bool) -> mx.array:
    """The spans of a cut, along an axis of a matrix, one after another."""
    spans = cut.spans_of(array.shape[axis])
    parts = [array[start:stop] if axis == 0 else array[:, start:stop] for start, stop in spans]
    if len(parts) > 1:
        return mx.concatenate(parts, axis=axis)
    return mx.contiguous(parts[0]) if copy else parts[0]  # a bare slice keeps the whole alive
