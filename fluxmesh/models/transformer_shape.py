"""A transformer of double and single blocks in numbers: what a step computes and sends, and which
part of the blocks each of N hosts holds for `tensor`. Pure.

Both families' transformers are of this kind (Esser et al. 2024, https://arxiv.org/abs/2403.03206):
`depth` double blocks, in which text and image have linears of their own and attend together, then
`depth_single_blocks` single ones, whose MLP runs beside attention.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fluxmesh.models.partition import Cut, Shard


@dataclass(frozen=True)
class TransformerShape:
    """D hidden channels, M columns of an MLP, of which a gated one has twice as many inside."""

    hidden_size: int
    mlp_hidden_dim: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    gated: bool = False
    calls: int = 1  # of it in a step: two where guidance asks with a negative prompt too
    # Numbers that a step's modulations are, where `tensor` splits the linears that make them.
    split_modulations: int = 0

    @property
    def blocks(self) -> int:
        return self.depth + self.depth_single_blocks

    def flops(self, tokens: int, remembered: int = 0) -> float:
        """Arithmetic of one step of one image of S tokens: the blocks' matrices and attention.

        All attend to `remembered` tokens too. FLUX.1 at 1024x1024 and 512 text tokens: 74.4e12;
        FLUX.2 klein 4B: 34.8e12, and 76.7e12 with a reference of the same size.
        """
        block = tokens * (2 * self._matrices + 4 * (tokens + remembered) * self.hidden_size)
        return float(self.calls * self.blocks * block)

    def heads_part(self, tokens: int) -> float:
        """The part of a step's arithmetic that heads are: the rest are the MLPs' columns."""
        heads = 4 * self.hidden_size**2 + 2 * tokens * self.hidden_size
        columns = self.hidden_size * (self._inner + self.mlp_hidden_dim)
        return heads / (heads + columns)

    def collectives(self, placement: Literal["data", "tensor", "sequence"]) -> int:
        """Collectives in a step, whatever the number of hosts."""
        if placement == "data":
            return 0
        doubles = 1 if placement == "sequence" else 2
        return self.calls * (doubles * self.depth + self.depth_single_blocks)

    def beside_gathers(self, tokens: int) -> Sequence[tuple[int, float]]:
        """(blocks, the part of such a block's arithmetic that needs no keys of other hosts).

        Double blocks compute their queries while keys and values travel, single blocks the inner
        half of their MLP too.
        """
        hidden, inner = self.hidden_size, self._inner
        block = self._matrices + 2 * tokens * hidden
        return (
            (self.calls * self.depth, hidden**2 / block),
            (self.calls * self.depth_single_blocks, (hidden**2 + hidden * inner) / block),
        )

    @property
    def _inner(self) -> int:
        """Columns that an MLP's first matrix makes."""
        return (2 if self.gated else 1) * self.mlp_hidden_dim

    @property
    def _matrices(self) -> int:
        """Numbers of a block's matrices, as one token meets them."""
        return 4 * self.hidden_size**2 + self.hidden_size * (self._inner + self.mlp_hidden_dim)


class RotaryConfig(Protocol):
    """What a transformer's config says of its heads."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def axes_dim(self) -> tuple[int, ...]: ...


def rules_of_heads(config: RotaryConfig) -> dict[str, bool]:
    """What must hold before such a transformer can compute, in words, and whether it does."""
    size, heads, axes = config.hidden_size, config.num_heads, config.axes_dim
    return {
        f"the transformer's {heads} heads must divide its hidden size {size}": size % heads == 0,
        f"the transformer's rotary axes {axes} must be even and sum to the size of a head": (
            sum(axes) * heads == size and not any(dim % 2 for dim in axes)
        ),
    }


class BlockSizes(Protocol):
    """What a transformer's config says of its blocks."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def mlp_hidden_dim(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def depth_single_blocks(self) -> int: ...


def block_cuts(config: BlockSizes, shard: Shard, *, gated: bool) -> dict[str, Cut]:
    """The cut of every linear of the blocks, without modulations, by the name of its module.

    Heads and the MLPs' hidden columns are dealt out (Shoeybi et al. 2019, "Megatron-LM",
    https://arxiv.org/abs/1909.08053): the linear into a branch gives up rows of its weight, so that
    a host computes whole heads; the linear out of it gives up columns, so that each host gets a
    part of a sum. A gated MLP's gate and what it gates lie one below the other: each is cut by
    itself.
    """
    D, M = config.hidden_size, config.mlp_hidden_dim
    part, columns = shard.part, shard.columns
    heads = tuple(part(D, offset) for offset in (0, D, 2 * D))  # those of q, k and v
    halves = (0, M) if gated else (0,)
    cuts: dict[str, Cut] = {}

    def way_in(before: int) -> tuple[tuple[int, int], ...]:
        """The MLP's rows of a linear that has others before them."""
        return tuple(columns(M, before + half) for half in halves)

    for i in range(config.depth):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            cuts[f"{name}_attn.qkv"] = Cut(0, heads, 3 * D)
            cuts[f"{name}_attn.proj"] = Cut(1, (part(D),), D)
            cuts[f"{name}_mlp.0"] = Cut(0, way_in(0), len(halves) * M)
            cuts[f"{name}_mlp.2"] = Cut(1, (columns(M),), M)
    for i in range(config.depth_single_blocks):
        name = f"single_blocks.{i}"
        cuts[f"{name}.linear1"] = Cut(0, (*heads, *way_in(3 * D)), 3 * D + len(halves) * M)
        cuts[f"{name}.linear2"] = Cut(1, (part(D), columns(M, D)), D + M)
    return cuts


BLOCK_LISTS = ("double_blocks", "single_blocks")  # what such a transformer calls them


def block_numbers(names: Collection[str], lists: Sequence[str]) -> dict[str, int]:
    """The block that each tensor belongs to, counted in the order in which they run.

    `lists` are those of `Architecture.block_lists`; what is in no block is left out.
    """
    numbers: dict[str, int] = {}
    depth = 0
    for kind in (f"{each}." for each in lists):
        mine = {name: depth + int(name.split(".")[1]) for name in names if name.startswith(kind)}
        depth = max(mine.values(), default=depth - 1) + 1
        numbers |= mine
    return numbers
