"""Takes a part out of a model that is in memory whole. Knows no collective and no family.

Any linear that a model may hold can be cut: plain, quantized (whole groups), with an adapter
beside it. A family's `partition.py` says where; `loading.py` does the same from files, without the
whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import copy as shallow_copy
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.models.layers import RMSNorm
from fluxmesh.models.lora_linear import AdaptedLinear, joined_spans
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut, Shard

T = TypeVar("T")


def shard_of(flux: T, shard: Shard) -> T:
    """Part `shard` of a transformer, which shares the weights of `flux`: none is held twice.

    Raises `UsageError` where heads or quantization groups don't divide.
    """
    whole: Any = flux
    whole.partition.check(shard.size, is_quantized(whole), shard.shares)
    part = type(whole)(whole.config)
    if whole.modulation_released:
        part.release_modulation()
    cuts = whole.partition.cuts(shard)
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            taken = module_at(whole, name)
            if name in cuts:
                taken = cut_linear(taken, cuts[name], copy=False)
                mx.eval(taken.parameters())
            replace_module(part, name, taken)
    part.hold(shard)
    sharded: T = part
    return sharded


def is_quantized(model: nn.Module) -> bool:
    """Whether any linear of a model is."""
    return any(isinstance(module, nn.QuantizedLinear) for module in model.modules())


def cut_linear(linear: Any, cut: Cut, *, copy: bool = True) -> Any:
    """A linear of the same kind that holds `cut` of it, lazily.

    Cut along its inputs it gives a part of a sum; its bias, to be added once and to the whole sum,
    is then called `sum_bias`. Without `copy` it shares the buffers of `linear`, if need be as a
    `LentLinear`.
    """
    if isinstance(linear, AdaptedLinear):
        return linear.cut(cut, lambda inner: cut_linear(inner, cut, copy=copy), copy=copy)
    if len(cut.spans) > 1 and not copy:
        return LentLinear(functools.partial(cut_linear, linear, cut))
    part = shallow_copy(linear)
    for leaf in ("weight", "scales", "biases"):
        if leaf in linear:
            part[leaf] = joined_spans(linear[leaf], cut, cut.axis, copy=copy)
    if "bias" in linear and cut.axis == 0:
        part.bias = joined_spans(linear.bias, cut, 0, copy=copy)
    elif "bias" in linear:
        part.sum_bias = part.pop("bias")
    return part


class LentLinear(nn.Module):
    """A cut, in several spans, of a linear that stays whole beside it.

    A product takes one matrix: the spans are joined for each call, and let go after it. That moves
    a shard's weights once more in a step, little beside what thousands of tokens do with them, and
    holds those of one linear in the place of all.
    """

    def __init__(self, take: Callable[[], Any]) -> None:
        """`take` gives the cut, lazily."""
        super().__init__()
        self.take = take
        part = take()
        for name in ("bias", "sum_bias"):
            if name in part:
                self[name] = part[name]

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], of the cut."""
        product: mx.array = self.take()(x)
        return product
