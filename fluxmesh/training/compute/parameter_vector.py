"""Which linears are trained, and where their numbers stand in the one flat vector. No mlx.

The vector is what is summed, averaged and saved: for each module of `names`, in this order, A
[in, rank] and then B [rank, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from fluxmesh.adapters.formats import Adapter, LowRank
from fluxmesh.errors import UsageError
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.tensor_maps import transformer_tensors
from fluxmesh.training.request import TrainRequest


def select(config: FluxConfig, blocks: int, targets: Sequence[str]) -> list[str]:
    """Linears of the last `blocks` blocks (-1: all) that match one of the patterns `targets`.

    A pattern is a shell's, against BFL's name of the linear: `*attn.qkv`, `single_blocks.*`.
    Raises `UsageError` where nothing matches.
    """
    every = config.depth + config.depth_single_blocks
    first = 0 if blocks == -1 else max(0, every - blocks)
    modules = []
    for name, target in transformer_tensors(config).items():
        kind, _, rest = name.partition(".")
        if kind not in ("double_blocks", "single_blocks") or len(target.shape) != 2:
            continue
        block = int(rest.partition(".")[0]) + (config.depth if kind == "single_blocks" else 0)
        module = name.removesuffix(".weight")
        if block >= first and any(fnmatchcase(module, pattern) for pattern in targets):
            modules.append(module)
    if not modules:
        raise UsageError(
            f"`lora_targets` {', '.join(targets)} matches no linear of the last "
            f"{every - first} blocks; name some, such as '*attn.qkv' or 'single_blocks.*'."
        )
    return sorted(modules)


class VectorLayout:
    """The vector of one run."""

    def __init__(self, config: FluxConfig, request: TrainRequest) -> None:
        """Raises `UsageError` where the request trains nothing."""
        self.config = config
        self.scale = request.scale
        self.names = select(config, request.lora_blocks, request.lora_targets)
        tensors, rank = transformer_tensors(config), request.lora_rank
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
