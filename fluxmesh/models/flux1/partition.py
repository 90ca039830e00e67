"""Which part of the transformer each of N hosts holds for `tensor`. Pure geometry, no mlx.

Heads and the MLPs' hidden columns are dealt out (Shoeybi et al. 2019, "Megatron-LM",
https://arxiv.org/abs/1909.08053): the linear into a branch gives up rows of its weight, so that a
host computes whole heads; the linear out of it gives up columns, so that each host gets a part of
a sum. The modulations, 27% of FLUX, give up rows too. `loading.py` reads a shard by these cuts,
`models/slicing.py` takes one out of a whole model, `lora.py` cuts adapters to it, `parallel.py`
runs it.
"""

from __future__ import annotations

import functools

from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.partition import Cut, Partition, Shard


def cuts(config: FluxConfig, shard: Shard) -> dict[str, Cut]:
    """The cut of every linear that is dealt out, by the name of its module; empty for the whole.

    What is missing here (embeddings, norms, the last linear: 2% of FLUX) every host holds.
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
            module_cuts[f"{name}_mod.lin"] = Cut(0, (part(6 * D),), 6 * D)
            module_cuts[f"{name}_attn.qkv"] = Cut(0, heads, 3 * D)
            module_cuts[f"{name}_attn.proj"] = Cut(1, (part(D),), D)
            module_cuts[f"{name}_mlp.0"] = Cut(0, (columns(M),), M)
            module_cuts[f"{name}_mlp.2"] = Cut(1, (columns(M),), M)
    for i in range(config.depth_single_blocks):
        name = f"single_blocks.{i}"
        module_cuts[f"{name}.modulation.lin"] = Cut(0, (part(3 * D),), 3 * D)
        module_cuts[f"{name}.linear1"] = Cut(0, (*heads, columns(M, 3 * D)), 3 * D + M)
        module_cuts[f"{name}.linear2"] = Cut(1, (part(D), columns(M, D)), D + M)
    module_cuts["final_layer.adaLN_modulation.1"] = Cut(0, (part(2 * D),), 2 * D)
    return module_cuts


def partition(config: FluxConfig) -> Partition:
    """How a transformer of this config can be dealt out."""
    return Partition(
        config.num_heads,
        config.head_dim,
        config.mlp_hidden_dim,
        functools.partial(cuts, config),
        lambda name, width: group_size("transformer", f"{name}.weight", (1, width)),
    )
