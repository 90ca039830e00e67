"""Which linears are trained, and where their numbers stand in the one flat vector. No mlx.

The vector is what is summed, averaged and saved: for each module of `names`, in this order, A
[in, rank] and then B [rank, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.formats import Adapter
from fluxmesh.errors import UsageError
from fluxmesh.models.base import Architecture
from fluxmesh.models.transformer_shape import block_numbers
from fluxmesh.training.request import TrainRequest


def select(model: Architecture, blocks: int, targets: Sequence[str]) -> list[str]:
    """Linears of the last `blocks` blocks (-1: all) that match one of the patterns `targets`.

    A pattern is a shell's, against the model's (BFL's) name of the linear, as `*attn.qkv`. Raises
    `UsageError` where nothing matches.
    """
    tensors = model.transformer_tensors
    block_of = block_numbers(tensors, model.block_lists)
    every = max(block_of.values()) + 1
    first = 0 if blocks == -1 else max(0, every - blocks)
    linears = [
        name.removesuffix(".weight")
        for name, block in block_of.items()
        if block >= first and len(tensors[name].shape) == 2
    ]
    modules = [name for name in linears if any(fnmatchcase(name, p) for p in targets)]
    if not modules:
        raise UsageError(
            f"`lora_targets` {', '.join(targets)} matches no linear of the last "
            f"{every - first} blocks; name some, such as '{linears[-1]}', with * for any letters.",
            setting="lora_targets",
        )
    return sorted(modules)


class VectorLayout:
    """The vector of one run."""

    def __init__(self, model: Architecture, request: TrainRequest) -> None:
        """Of a model's transformer. Raises `UsageError` where nothing is trained."""
        tensors = model.transformer_tensors
        self.scale = request.scale
        self.names = select(model, request.lora_blocks, request.lora_targets)
        rank = request.lora_rank
        self.shapes: list[tuple[int, int]] = []  # a, b, a, b, ... in the order of `names`
        for name in self.names:
            out, into = tensors[f"{name}.weight"].shape
            self.shapes += [(into, rank), (rank, out)]
        self.ends: list[int] = np.cumsum([a * b for a, b in self.shapes]).tolist()

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return self.ends[-1]

    def adapter(self, flat: np.ndarray) -> Adapter:
        """A vector of weights as `formats.write_adapter` takes it."""
        parts = np.split(flat, self.ends[:-1])
        shaped = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return {
            name: LowRank(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), self.scale)
            for name, a, b in zip(self.names, shaped[::2], shaped[1::2], strict=True)
        }
