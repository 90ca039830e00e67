"""Takes a shard out of a transformer that is in memory whole. Knows no collective.

`partition.py` says where; `loading.py` does the same from files, without the whole.
"""

from __future__ import annotations

from fluxmesh.models.flux1.partition import check, cuts
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.partition import Shard
from fluxmesh.models.slicing import cut_linear, is_quantized, take_cuts

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
    take_cuts(part, flux, cuts(flux.config, shard))
    hold_shard(part, shard)
    return part


def hold_shard(flux: Flux, shard: Shard) -> None:
    """Tells a transformer whose linears are cut which part of itself it is."""
    flux.shard = shard
    for single in flux.single_blocks:
        single.qkv_dim = 3 * flux.config.hidden_size // shard.size
