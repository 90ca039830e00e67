"""Random oracles in PyTorch, and their weights carried over into fluxmesh's modules.

Every number is random, biases and norm weights too: a bias left out, added twice or put in the
wrong place changes the result.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten

from fluxmesh.models.flux1.tensor_maps import Tensors

BOUND = 1e-4  # relative L2 error

torch.set_num_threads(1)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter with noise of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
    return model.eval().requires_grad_(False)


def load(module: nn.Module, tensors: Tensors, oracle: torch.nn.Module) -> None:
    """Copies the oracle's weights into `module`; every tensor of both must be used exactly once."""
    state = {key: value.numpy() for key, value in oracle.state_dict().items()}
    weights, used = [], set()
    for name, target in tensors.items():
        pieces = [state[rows.key][rows.start : rows.stop] for rows in target.pieces]
        used |= {rows.key for rows in target.pieces}
        value = np.concatenate(pieces).reshape(target.shape)
        if value.ndim == 4:
            value = value.transpose(0, 2, 3, 1)  # MLX's convolutions: out, height, width, in
        weights.append((name, mx.array(value)))
    # a second name of T5's `shared.weight`; how many batches a batch norm has seen
    unread = {"encoder.embed_tokens.weight", "bn.num_batches_tracked"}
    assert set(state) - used <= unread
    assert {name for name, _ in tree_flatten(module.parameters())} == set(tensors)
    module.load_weights(weights, strict=True)


def normal(*shape: int, seed: int) -> np.ndarray:
    """Standard normal float32 input."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(ours: mx.array, oracle: torch.Tensor) -> float:
    """L2 norm of the difference over that of the oracle; the shapes must be equal."""
    mine, theirs = np.array(ours, dtype=np.float64), oracle.double().numpy()
    assert mine.shape == theirs.shape
    return float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
