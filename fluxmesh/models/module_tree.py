"""Modules of a model by their paths. Knows no family."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn


def module_at(model: Any, path: str) -> Any:
    """The module called `path` ("double_blocks.0.img_attn.qkv"); the model itself for ""."""
    node = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def replace_module(model: Any, path: str, module: nn.Module) -> None:
    """Puts `module` where the one called `path` was."""
    parent_path, _, leaf = path.rpartition(".")
    parent = module_at(model, parent_path)
    if isinstance(parent, list):
        parent[int(leaf)] = module
    else:
        setattr(parent, leaf, module)
