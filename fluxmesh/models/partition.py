"""A part of a model, of a linear, of a run of tokens: what one of N hosts has. Pure, no mlx.

A family says which of its linears are cut, and where (`flux1/partition.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares, dealt
from fluxmesh.errors import UsageError

LARGEST_GROUP = 128  # columns that share a scale, of those that files may be quantized in


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size`; by default, the whole. Of `shares` those of `tensor` count."""

    rank: int = 0
    size: int = 1
    shares: Shares = EVEN

    def __post_init__(self) -> None:
        self.shares.check(self.size)

    def part(self, width: int, offset: int = 0) -> tuple[int, int]:
        """Its span of `width` outputs or inputs, the first of which is `offset` of a linear.

        `width` is a multiple of the heads, whole ones of which are dealt out.
        """
        return self._span(self.shares.heads, width, offset)

    def columns(self, width: int, offset: int = 0) -> tuple[int, int]:
        """The same of an MLP's columns."""
        return self._span(self.shares.columns, width, offset)

    def _span(self, units: tuple[int, ...], width: int, offset: int) -> tuple[int, int]:
        if not units:
            step = width // self.size
            return offset + self.rank * step, offset + (self.rank + 1) * step
        before, whole = sum(units[: self.rank]), sum(units)
        start, stop = (width * count // whole for count in (before, before + units[self.rank]))
        return offset + start, offset + stop


@dataclass(frozen=True)
class TokenRuns:
    """Which of S tokens each rank computes under `sequence`: runs that follow each other.

    Even ones are of ceil(S / N): what lies beyond S is filled up and computed like tokens.
    """

    tokens: int  # S
    counts: tuple[int, ...]  # of each rank, with what fills it up

    @classmethod
    def of(cls, tokens: int, ranks: int, shares: Shares = EVEN) -> TokenRuns:
        """Raises `UsageError` where the shares are those of another number of ranks."""
        shares.check(ranks)
        if shares.tokens and tokens >= ranks:
            return cls(tokens, dealt(tokens, shares.tokens))
        return cls(tokens, (-(-tokens // ranks),) * ranks)

    @property
    def are_equal(self) -> bool:
        return len(set(self.counts)) == 1

    @property
    def longest(self) -> int:
        """What every rank gives to a gather, which takes equal shapes."""
        return max(self.counts)

    @property
    def own(self) -> tuple[int, ...]:
        """Each rank's number of tokens without filling."""
        starts = (self.span(rank)[0] for rank in range(len(self.counts)))
        return tuple(
            max(0, min(start + count, self.tokens) - start)
            for start, count in zip(starts, self.counts, strict=True)
        )

    def span(self, rank: int) -> tuple[int, int]:
        """From, to; what lies beyond S is filling."""
        start = sum(self.counts[:rank])
        return start, start + self.counts[rank]


@dataclass(frozen=True)
class Cut:
    """The part of one linear's weight [out, in] that a shard holds."""

    axis: int  # 0: outputs. 1: inputs; the outputs are then parts of a sum over the hosts
    spans: tuple[tuple[int, int], ...]  # from, to; in the order in which they are held
    length: int  # of the whole axis

    def spans_of(self, stored: int) -> tuple[tuple[int, int], ...]:
        """The spans in an axis stored as `stored` numbers: a quantized row has fewer than columns.

        Raises `UsageError` where the spans are no whole quantization groups: a file may have larger
        ones than `Partition.check` knows of.
        """
        if any(end * stored % self.length for span in self.spans for end in span):
            raise UsageError(
                f"A host's columns {', '.join(f'{a} to {b}' for a, b in self.spans)} are no whole "
                f"quantization groups of this model's {self.length}; choose `placement` sequence."
            )
        return tuple((a * stored // self.length, b * stored // self.length) for a, b in self.spans)

    @property
    def indices(self) -> np.ndarray:
        """The places along the whole axis that are held, int64."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans])


@dataclass(frozen=True)
class Partition:
    """How a transformer of one config can be dealt to hosts: whole heads, columns of the MLPs."""

    heads: int
    head_dim: int  # channels of a head
    columns: int  # of an MLP
    cuts: Callable[[Shard], Mapping[str, Cut]]
    group_of: Callable[[str, int], int | None]
    """The quantization group of a module's rows of so many columns, None where it has none."""

    @property
    def modules(self) -> frozenset[str]:
        """The linears that are cut, by the names of their modules."""
        return frozenset(self.cuts(Shard(0, 2)))

    def obstacle(self, size: int, quantized: bool = False, shares: Shares = EVEN) -> str | None:
        """Why it can't be dealt to `size` hosts in these shares, as a clause; None where it can."""
        for what, whole, units in (
            ("heads", self.heads, shares.heads),
            ("MLP columns", self.columns, shares.columns),
        ):
            if units and sum(units) != whole:
                return f"shares of {sum(units)} {what} are not those of {whole}"
            if not units and whole % size:
                return f"{whole} {what} don't divide by {size}"
        for rank in range(size if shares.heads or shares.columns else 1) if quantized else ():
            for name, cut in self.cuts(Shard(rank, size, shares)).items():
                group = self.group_of(name, cut.length)
                if (
                    cut.axis == 1
                    and group
                    and any(end % group for span in cut.spans for end in span)
                ):
                    width = cut.spans[0][1] - cut.spans[0][0]
                    columns = f"{width * size} columns over {size} hosts are {width}"
                    if not shares.are_even:
                        columns = f"{width} of {cut.length} columns are one host's share"
                    return f"{columns}, not whole quantization groups of {group}"
        return None

    def units(self, quantized: bool) -> tuple[int, int]:
        """Heads, and columns, that can be dealt out together: whole quantization groups.

        Columns go by 64 where they can, also where nothing is quantized: products of odd widths
        are slow. What is quantized goes by 128, the largest groups that files have.
        """
        group = math.gcd(LARGEST_GROUP if quantized else 64, self.columns)
        if quantized:
            cuts = self.cuts(Shard(0, 2)).items()
            groups = [self.group_of(name, cut.length) for name, cut in cuts if cut.axis == 1]
            group = math.lcm(group, *(size for size in groups if size))
        heads = 1 if not quantized else group // math.gcd(group, self.head_dim)
        return heads, group

    @property
    def column_parts(self) -> dict[str, float]:
        """Of each linear that is cut, the part of the cut axis that are columns of an MLP.

        The rest follows the heads.
        """
        # Whoever has a quarter of the heads and three quarters of the columns tells them apart.
        probe = Shard(0, 2, Shares(heads=(1, 3), columns=(3, 1)))
        return {
            name: 2 * (sum(stop - start for start, stop in cut.spans) / cut.length - 0.25)
            for name, cut in self.cuts(probe).items()
        }

    def check(self, size: int, quantized: bool = False, shares: Shares = EVEN) -> None:
        """Raises `UsageError`, naming the numbers of hosts that would do, where `size` does not."""
        reason = self.obstacle(size, quantized, shares)
        if reason is None:
            return
        fit = [n for n in range(1, self.heads + 1) if self.obstacle(n, quantized) is None]
        raise UsageError(
            f"The transformer can't be sharded over {size} hosts: {reason}; use "
            f"{', '.join(map(str, fit))} of them, or `placement` sequence."
        )
