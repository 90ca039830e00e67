"""Parts of a transformer: with copies of all that is cut, as from files; and what a part uses."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fluxmesh.models.layers import RMSNorm
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Shard
from fluxmesh.models.slicing import LentLinear, cut_linear


def copied_shard(whole: Any, shard: Shard) -> Any:
    """Part `shard` of `whole`, by copies."""
    part, cuts = type(whole)(whole.config), whole.partition.cuts(shard)
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            taken = module_at(whole, name)
            replace_module(part, name, cut_linear(taken, cuts[name]) if name in cuts else taken)
    mx.eval(part.parameters())
    return part


def used(flux: Any) -> dict[str, mx.array]:
    """What a part multiplies with, by name: its own arrays, and lazily what it borrows."""
    arrays = dict(tree_flatten(flux.parameters()))
    for name, module in flux.named_modules():
        if isinstance(module, LentLinear):
            taken = tree_flatten(module.take().parameters())
            arrays |= {f"{name}.{leaf}": array for leaf, array in taken}
    return arrays
