"""What becomes of one linear of a model: adapters beside it, or in its weight.

Below `lora.py`, which goes from linear to linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from fluxmesh.adapters.changes import (
    Change,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Piece,
    Term,
    stack,
)
from fluxmesh.kernels.ops import HEADROOM
from fluxmesh.models.double_stream import ends_branch
from fluxmesh.models.lora_linear import (
    DeltaLinear,
    DenseDelta,
    HadamardDelta,
    KroneckerDelta,
    LoRALinear,
    ScaledLinear,
    innermost,
)
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut

ReadWeight = Callable[[str], np.ndarray]  # a linear's whole weight, float32 [out, in], by its name
Changes = Sequence[tuple[Change, float]]  # of one linear, in order, with their strengths


class LinearToAdapt:
    """One linear of a model, and what becomes of it."""

    def __init__(
        self, model: Any, name: str, dtype: mx.Dtype, cut: Cut | None, weight_of: ReadWeight
    ) -> None:
        self.model, self.name, self.dtype, self.cut = model, name, dtype, cut
        self.weight_of = weight_of

    @property
    def module(self) -> Any:
        return module_at(self.model, self.name)

    def add_low_rank(self, low: LowRank, fuse: bool) -> None:
        """A plain LoRA, of scale 1, on the linear as it is."""
        if self.cut is not None:
            low = part_of(low, self.cut)
        if fuse:
            fused(innermost(self.module), low)
        else:
            replace_module(self.model, self.name, beside(self.module, low, self.dtype))

    def fuse(self, changes: Changes) -> None:
        """Adds changes into the weight, the sum taken in float32 and rounded once."""
        shape = changes[0][0].outputs, self._inputs()
        if any(change.has_magnitude for change, _ in changes):
            before = self.weight_of(self.name)
            delta = before.copy()
        else:
            before, delta = None, np.zeros(shape, np.float32)
        for change, strength in changes:
            change.add_to(delta, strength)
            self._add_bias(change, strength)
        if before is not None:
            delta -= before
        if self.cut is not None:
            indices = self.cut.indices
            delta = delta[indices] if self.cut.axis == 0 else delta[:, indices]
        _add_to_weight(innermost(self.module), mx.array(delta))

    def put_beside(self, changes: Changes) -> None:
        """Puts changes around the linear, one after another, in their own factors."""
        weight = None
        if any(change.has_magnitude for change, _ in changes):
            weight = self.weight_of(self.name)
        for change, strength in changes:
            if weight is not None and change.has_magnitude:
                self._put_scales(change, strength, weight)
            self._put_terms(change, strength, weight)
            self._add_bias(change, strength)
            if weight is not None:
                change.add_to(weight, strength)

    def is_finite(self, fused: bool) -> bool:
        """Whether no strength made numbers that the dtype can't hold."""
        arrays = [
            array
            for key, array in tree_flatten(self.module.parameters())
            if mx.issubdtype(array.dtype, mx.floating)
            and (fused or not key.endswith("linear.weight"))
        ]
        return all(bool(mx.isfinite(array).all()) for array in arrays)

    def _inputs(self) -> int:
        if self.cut is not None and self.cut.axis == 1:
            return self.cut.length
        linear = innermost(self.module)
        if isinstance(linear, nn.QuantizedLinear):
            return int(linear.weight.shape[1] * 32 // linear.bits)
        return int(linear.weight.shape[1])

    def _put_scales(self, change: Change, strength: float, weight: np.ndarray) -> None:
        """What DoRA does to the weight that is there: rows, or columns, of another length."""
        rows = np.ones(weight.shape[0], np.float32)
        columns = np.ones(weight.shape[1], np.float32)
        for piece in change.pieces:
            if piece.magnitude is None or _isdense(piece, change.outputs):
                continue
            factors = 1 + np.float32(strength) * (piece.factors(weight) - 1)
            if piece.magnitude.of_inputs:
                columns *= factors
            else:
                rows[piece.rows] = factors
        scaled = ScaledLinear(
            self.module,
            None if (rows == 1).all() else self._part(rows, 0),
            None if (columns == 1).all() else self._part(columns, 1),
        )
        replace_module(self.model, self.name, scaled)

    def _part(self, values: np.ndarray, axis: int) -> mx.array:
        if self.cut is not None and self.cut.axis == axis:
            values = values[self.cut.indices]
        return mx.array(values)

    def _put_terms(self, change: Change, strength: float, weight: np.ndarray | None) -> None:
        low: list[Piece] = []
        deltas, places = [], []
        for piece in change.pieces:
            term: Term = piece.term
            rows = np.full(len(piece.rows), strength, np.float32)  # what outputs are multiplied by
            if piece.magnitude is not None:
                assert weight is not None
                if _isdense(piece, change.outputs):
                    term = Dense(piece.change_of(weight))
                else:
                    factors = piece.factors(weight)
                    if isinstance(term, LowRank) and piece.magnitude.of_inputs:
                        term = LowRank(term.a * factors, term.b, term.scale)
                    else:
                        rows = rows * factors
            if isinstance(term, LowRank):
                low.append(Piece(piece.rows, LowRank(term.a, rows[:, None] * term.b, term.scale)))
            else:
                deltas.append(self._delta(term, rows))
                places.append(piece.rows)
        if deltas:
            whole = DeltaLinear(self.module, deltas, places, change.outputs)
            if self.cut is not None:  # the linear is cut already
                whole = whole.cut(self.cut, lambda inner: inner, copy=True)
            mx.eval(whole.deltas)
            replace_module(self.model, self.name, whole)
        if low:
            self.add_low_rank(stack([Change(change.outputs, tuple(low)).joined()]), False)

    def _delta(self, term: Term, rows: np.ndarray) -> Any:
        def held(values: np.ndarray) -> mx.array:
            return mx.array(values).astype(self.dtype)

        gains = (np.float32(term.scale) * rows)[:, None]
        if isinstance(term, Dense):
            return DenseDelta(held(gains * term.values))
        if isinstance(term, Hadamard):
            return HadamardDelta(*map(held, (gains * term.b1, term.a1, term.b2, term.a2)))
        assert isinstance(term, Kronecker)
        w2_in = None if term.w2_in is None else held(term.w2_in)
        if (rows == rows[0]).all():
            return KroneckerDelta(held(gains[0, 0] * term.w1), held(term.w2), w2_in)
        w1 = np.float32(term.scale) * term.w1
        return KroneckerDelta(held(w1), held(term.w2), w2_in, mx.array(rows))

    def _add_bias(self, change: Change, strength: float) -> None:
        if change.bias is None:
            return
        linear, values = innermost(self.module), np.float32(strength) * change.bias
        leaf = "sum_bias" if self.cut is not None and self.cut.axis == 1 else "bias"
        if self.dtype == mx.float16 and ends_branch(self.name):
            values = values / HEADROOM  # as `make_room` has its bias
        added = self._part(values, 0)
        before = linear[leaf].astype(mx.float32) if leaf in linear else mx.zeros_like(added)
        linear[leaf] = (before + added).astype(self.dtype)
        mx.eval(linear[leaf])


def _isdense(piece: Piece, outputs: int) -> bool:
    """Whether a magnitude is of columns that no single factor an input can stand for."""
    if piece.magnitude is None or not piece.magnitude.of_inputs:
        return False
    return not (isinstance(piece.term, LowRank) and piece.is_whole(outputs))


def part_of(low: LowRank, cut: Cut) -> LowRank:
    """What a shard that holds `cut` of a linear needs of its adapter."""
    if cut.axis == 0:
        return LowRank(low.a, low.b[cut.indices], low.scale)
    return LowRank(low.a[:, cut.indices], low.b, low.scale)


def beside(module: Any, low: LowRank, dtype: mx.Dtype) -> LoRALinear:
    """`module` with `low`, of scale 1, beside it, in `dtype`; joins an adapter that is there."""
    a, b = mx.array(low.a.T).astype(dtype), mx.array(low.b.T).astype(dtype)
    linear = module
    if isinstance(module, LoRALinear):
        linear = module.linear
        a = mx.concatenate([module.lora_a, a.astype(module.lora_a.dtype)], axis=1)
        b = mx.concatenate([module.scale * module.lora_b, b.astype(module.lora_b.dtype)], axis=0)
    mx.eval(a, b)
    return LoRALinear(linear, a, b, 1.0)


def fused(linear: Any, low: LowRank) -> None:
    """Adds `low` to the weight of `linear`, in place; the sum is taken in float32."""
    _add_to_weight(linear, low.scale * (mx.array(low.b) @ mx.array(low.a)))


def _add_to_weight(linear: Any, delta: mx.array) -> None:
    if isinstance(linear, nn.QuantizedLinear):
        group, bits = linear.group_size, linear.bits
        total = (dense(linear) + delta).astype(linear.scales.dtype)
        linear.weight, linear.scales, linear.biases = mx.quantize(total, group, bits)
        mx.eval(linear.weight, linear.scales, linear.biases)
        return
    weight = linear.weight
    linear.weight = (weight.astype(mx.float32) + delta).astype(weight.dtype)
    mx.eval(linear.weight)


def dense(module: Any) -> mx.array:
    """A linear's weight, float32 [out, in]."""
    if isinstance(module, nn.QuantizedLinear):
        packed = (module.weight, module.scales, module.biases)
        return mx.dequantize(*packed, module.group_size, module.bits).astype(mx.float32)
    if isinstance(module, nn.Linear):
        return module.weight.astype(mx.float32)
    base = innermost(module)
    columns = dense(base).shape[1]
    y = module(mx.eye(columns))  # float32 in, float32 out
    if "bias" in base:
        y = y - base.bias
    return y.astype(mx.float32).T
