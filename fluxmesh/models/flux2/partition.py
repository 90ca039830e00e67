"""Which part of FLUX.2's transformer each of N hosts holds for `tensor`. Pure geometry, no mlx.

Of the blocks what both families deal out (`transformer_shape.py`). The modulations, which all
blocks share, are 2 to 4% of the model: every host holds them whole.
"""

from __future__ import annotations

import functools

from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.quantization import group_size
from fluxmesh.models.partition import Cut, Partition, Shard
from fluxmesh.models.transformer_shape import block_cuts


def cuts(config: Flux2Config, shard: Shard) -> dict[str, Cut]:
    """The cut of every linear that is dealt out, by the name of its module; empty for the whole.

    What is missing here (embeddings, norms, modulations, the last linear) every host holds.
    """
    return {} if shard.size == 1 else block_cuts(config, shard, gated=True)


def partition(config: Flux2Config) -> Partition:
    """How a transformer of this config can be dealt out."""
    return Partition(
        config.num_heads,
        config.head_dim,
        config.mlp_hidden_dim,
        functools.partial(cuts, config),
        lambda name, width: group_size("transformer", f"{name}.weight", (1, width)),
    )
