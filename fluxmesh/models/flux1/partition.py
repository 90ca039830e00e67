"""Which part of the transformer each of N hosts holds for `tensor`. Pure geometry, no mlx.

Of the blocks what both families deal out (`transformer_shape.py`); the modulations, 27% of FLUX,
give up rows too. `loading.py` reads a shard by these cuts, `models/slicing.py` takes one out of a
whole model, `lora.py` cuts adapters to it, `parallel.py` runs it.
"""

from __future__ import annotations

import functools

from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.partition import Cut, Partition, Shard
from fluxmesh.models.transformer_shape import block_cuts


def cuts(config: FluxConfig, shard: Shard) -> dict[str, Cut]:
    """The cut of every linear that is dealt out, by the name of its module; empty for the whole.

    What is missing here (embeddings, norms, the last linear: 2% of FLUX) every host holds.
    """
    if shard.size == 1:
        return {}
    D, part = config.hidden_size, shard.part
    modulations: dict[str, Cut] = {}
    for i in range(config.depth):
        for stream in ("img", "txt"):
            modulations[f"double_blocks.{i}.{stream}_mod.lin"] = Cut(0, (part(6 * D),), 6 * D)
    for i in range(config.depth_single_blocks):
        modulations[f"single_blocks.{i}.modulation.lin"] = Cut(0, (part(3 * D),), 3 * D)
    modulations["final_layer.adaLN_modulation.1"] = Cut(0, (part(2 * D),), 2 * D)
    return block_cuts(config, shard, gated=False) | modulations


def partition(config: FluxConfig) -> Partition:
    """How a transformer of this config can be dealt out."""
    return Partition(
        config.num_heads,
        config.head_dim,
        config.mlp_hidden_dim,
        functools.partial(cuts, config),
        lambda name, width: group_size("transformer", f"{name}.weight", (1, width)),
    )
