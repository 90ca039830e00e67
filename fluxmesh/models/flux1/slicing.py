"""Takes a shard out of a transformer that is in memory whole. Knows no collective.

`partition.py` says where; `loading.py` does the same from files, without the whole.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.models.flux1.layers import RMSNorm
from fluxmesh.models.flux1.partition import Shard, check, cuts
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.slicing import cut_linear

__all__ = ["cut_linear", "hold_shard", "is_quantized", "shard_of"]


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


def hold_shard(flux: Flux, shard: Shard) -> None:
    """Tells a transformer whose linears are cut which part of itself it is."""
    flux.shard = shard
    for single in flux.single_blocks:
        single.qkv_dim = 3 * flux.config.hidden_size // shard.size
