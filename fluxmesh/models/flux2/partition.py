"""Which part of FLUX.2's transformer each of N hosts holds for `tensor`. Pure geometry, no mlx.

As FLUX.1's (`flux1/partition.py`): whole heads and columns of the MLPs are dealt out. A gated MLP's
gate and what it gates lie one below the other, so that each is cut by itself. The modulations,
which all blocks share, are 2 to 4% of the model: every host holds them whole.
"""

from __future__ import annotations

import functools

from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.quantization import group_size
from fluxmesh.models.partition import Cut, Partition, Shard


def cuts(config: Flux2Config, shard: Shard) -> dict[str, Cut]:
    """The cut of every linear that is dealt out, by the name of its module; empty for the whole.

    What is missing here (embeddings, norms, modulations, the last linear) every host holds.
    """
    if shard.size == 1:
        return {}
    D, M = config.hidden_size, config.mlp_hidden_dim
    part, columns = shard.part, shard.columns
    heads = tuple(part(D, offset) for offset in (0, D, 2 * D))  # those of q, k and v
    module_cuts: dict[str, Cut] = {}
    for i in range(config.depth):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            module_cuts[f"{name}_attn.qkv"] = Cut(0, heads, 3 * D)
            module_cuts[f"{name}_attn.proj"] = Cut(1, (part(D),), D)
            module_cuts[f"{name}_mlp.0"] = Cut(0, (columns(M), columns(M, M)), 2 * M)
            module_cuts[f"{name}_mlp.2"] = Cut(1, (columns(M),), M)
    for i in range(config.depth_single_blocks):
        name = f"single_blocks.{i}"
        gated = columns(M, 3 * D), columns(M, 3 * D + M)
        module_cuts[f"{name}.linear1"] = Cut(0, (*heads, *gated), 3 * D + 2 * M)
        module_cuts[f"{name}.linear2"] = Cut(1, (part(D), columns(M, D)), D + M)
    return module_cuts


def partition(config: Flux2Config) -> Partition:
    """How a transformer of this config can be dealt out."""
    return Partition(
        config.num_heads,
        config.head_dim,
        config.mlp_hidden_dim,
        functools.partial(cuts, config),
        lambda name, width: group_size("transformer", f"{name}.weight", (1, width)),
    )
