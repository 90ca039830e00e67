"""Takes a part out of a model that is in memory whole. Knows no collective and no family.

Any linear that a model may hold can be cut: plain, quantized (whole groups), with an adapter
beside it. A family's `partition.py` says where; `loading.py` does the same from files, without the
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels.packed_linear import PackedLinear
from fluxmesh.models.layers import RMSNorm
from fluxmesh.models.lora_linear import AdaptedLinear, joined_spans
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut, Shard

T = TypeVar("T")


def shard_of(flux: T, shard: Shard) -> T:
    """Part `shard` of a transformer, evaluated; `flux` keeps all of its own.

    What is not cut is shared between the two. Raises `UsageError` where heads or quantization
    groups don't divide.
    """
    whole: Any = flux
    whole.partition.check(shard.size, is_quantized(whole), shard.shares)
    part = type(whole)(whole.config)
    if whole.modulation_released:
        part.release_modulation()
    take_cuts(part, whole, whole.partition.cuts(shard))
    part.hold(shard)
    sharded: T = part
    return sharded


def take_cuts(part: Any, whole: Any, cuts: Mapping[str, Cut]) -> None:
    """Gives `part`, a new model like `whole`, the linears of `whole`, cut and evaluated.

    What is not cut is shared between the two; `whole` keeps all of its own.
    """
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            taken = module_at(whole, name)
            if name in cuts:
                taken = cut_linear(taken, cuts[name])
                mx.eval(taken.parameters())
            replace_module(part, name, taken)
    mx.clear_cache()


def is_quantized(model: nn.Module) -> bool:
    """Whether any linear of a model is."""
    return any(isinstance(module, nn.QuantizedLinear) for module in model.modules())


def cut_linear(linear: Any, cut: Cut, *, copy: bool = True) -> Any:
    """A linear of the same kind that holds `cut` of it, lazily.

    Cut along its inputs it gives a part of a sum; its bias, to be added once and to the whole sum,
    is then called `sum_bias`. Without `copy` and with one span, it shares the buffers of `linear`.
    """
    if isinstance(linear, AdaptedLinear):
        return linear.cut(cut, lambda inner: cut_linear(inner, cut, copy=copy), copy=copy)
    part: Any
    if isinstance(linear, nn.QuantizedLinear):
        group, bits = linear.group_size, linear.bits
        part = PackedLinear(group, 1, bias=False, group_size=group, bits=bits)
        leaves = ["weight", "scales", "biases"]
    else:
        part = nn.Linear(1, 1, bias=False)  # its random weight is never computed
        leaves = ["weight"]
    for leaf in leaves:
        part[leaf] = joined_spans(linear[leaf], cut, cut.axis, copy=copy)
    if "bias" in linear and cut.axis == 0:
        part.bias = joined_spans(linear.bias, cut, 0, copy=copy)
    elif "bias" in linear:
        part.sum_bias = linear.bias
    return part
