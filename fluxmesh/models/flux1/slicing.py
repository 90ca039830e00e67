"""Takes a shard out of a transformer that is in memory whole. Knows no collective.

Any linear that a transformer may hold can be cut: plain, quantized (whole groups), with an adapter
beside it. `partition.py` says where; `loading.py` does the same from files, without the whole.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.models.flux1.layers import RMSNorm
from fluxmesh.models.flux1.partition import check, cuts
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut, Shard


def shard_of(flux: Flux, shard: Shard) -> Flux:
    """Part `shard` of `flux`, evaluated; `flux` keeps all of its own.

    What is not cut is shared between the two. Raises `UsageError` where heads or quantization
    groups don't divide.
    """
    check(flux.config, shard.size, is_quantized(flux))
    part = Flux(flux.config)
    if flux.modulation_released:
        part.release_modulation()
    found = cuts(flux.config, shard)
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            whole = module_at(flux, name)
            if name in found:
                whole = cut_linear(whole, found[name])
                mx.eval(whole.parameters())
            replace_module(part, name, whole)
    hold_shard(part, shard)
    mx.clear_cache()
    return part


def is_quantized(flux: Flux) -> bool:
    return any(isinstance(module, nn.QuantizedLinear) for module in flux.modules())


def cut_linear(linear: Any, cut: Cut, *, copy: bool = True) -> Any:
    """A linear of the same kind that holds `cut` of it, lazily.

    Cut along its inputs it gives a part of a sum; its bias, to be added once and to the whole sum,
    is then called `sum_bias`. Without `copy` and with one span, it shares the buffers of `linear`.
    """
    if isinstance(linear, LoRALinear):
        a, b = linear.lora_a, linear.lora_b
        if cut.axis == 0:
            b = _take(b, cut, 1, copy)
        else:
            a = _take(a, cut, 0, copy)
        return LoRALinear(cut_linear(linear.linear, cut, copy=copy), a, b, linear.scale)
    part: Any
    if isinstance(linear, nn.QuantizedLinear):
        group, bits = linear.group_size, linear.bits
        part = nn.QuantizedLinear(group, 1, bias=False, group_size=group, bits=bits)
        leaves = ["weight", "scales", "biases"]
    else:
        part = nn.Linear(1, 1, bias=False)  # its random weight is never computed
        leaves = ["weight"]
    for leaf in leaves:
        part[leaf] = _take(linear[leaf], cut, cut.axis, copy)
    if "bias" in linear and cut.axis == 0:
        part.bias = _take(linear.bias, cut, 0, copy)
    elif "bias" in linear:
        part.sum_bias = linear.bias
    return part


def _take(array: mx.array, cut: Cut, axis: int, copy: bool) -> mx.array:
    spans = cut.spans_of(array.shape[axis])
    parts = [array[start:stop] if axis == 0 else array[:, start:stop] for start, stop in spans]
    if len(parts) > 1:
        return mx.concatenate(parts, axis=axis)
    return mx.contiguous(parts[0]) if copy else parts[0]  # a bare slice keeps the whole alive


def hold_shard(flux: Flux, shard: Shard) -> None:
    """Tells a transformer whose linears are cut which part of itself it is."""
    flux.shard = shard
    for single in flux.single_blocks:
        single.qkv_dim = 3 * flux.config.hidden_size // shard.size
