"""A part of a model, of a linear, of a run of tokens: what one of N hosts has. Pure, no mlx.

A family says which of its linears are cut, and where (`flux1/partition.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size`; by default, the whole."""

    rank: int = 0
    size: int = 1

    def part(self, width: int, offset: int = 0) -> tuple[int, int]:
        """Its span of `width` outputs or inputs, the first of which is `offset` of a linear."""
        step = width // self.size
        return offset + self.rank * step, offset + (self.rank + 1) * step


def token_run(tokens: int, rank: int, ranks: int) -> tuple[int, int]:
    """A rank's run of ceil(S / N) of S tokens under `sequence`; what lies beyond S is filling."""
    count = -(-tokens // ranks)
    return rank * count, (rank + 1) * count


@dataclass(frozen=True)
class Cut:
    """The part of one linear's weight [out, in] that a shard holds."""

    axis: int  # 0: outputs. 1: inputs; the outputs are then parts of a sum over the hosts
    spans: tuple[tuple[int, int], ...]  # from, to; in the order in which they are held
    length: int  # of the whole axis

    def spans_of(self, stored: int) -> tuple[tuple[int, int], ...]:
        """The spans in an axis stored as `stored` numbers: a quantized row has fewer than columns.

        Exact where the spans are whole quantization groups, which `check` sees to.
        """
        return tuple((a * stored // self.length, b * stored // self.length) for a, b in self.spans)

    @property
    def indices(self) -> np.ndarray:
        """The places along the whole axis that are held, int64."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans])


@dataclass(frozen=True)
class Partition:
    """How a transformer of one config can be dealt to hosts: whole heads, columns of the MLPs."""

    heads: int
    columns: int  # of an MLP
    cuts: Callable[[Shard], Mapping[str, Cut]]
    group_of: Callable[[str, int], int | None]
    """The quantization group of a module's rows of so many columns, None where it has none."""

    def obstacle(self, size: int, quantized: bool = False) -> str | None:
        """Why it can't be dealt to `size` hosts, as a clause; None where it can."""
        if self.heads % size:
            return f"{self.heads} heads don't divide by {size}"
        if self.columns % size:
            return f"{self.columns} MLP columns don't divide by {size}"
        for name, cut in self.cuts(Shard(0, size)).items() if quantized else ():
            group = self.group_of(name, cut.length)
            if cut.axis == 1 and group and any(end % group for span in cut.spans for end in span):
                width = cut.spans[0][1] - cut.spans[0][0]
                columns = f"a host's {width} columns of {name}"
                return f"{columns} are not whole quantization groups of {group}"
        return None

    def check(self, size: int, quantized: bool = False) -> None:
        """Raises `UsageError`, naming the numbers of hosts that would do, where `size` does not."""
        reason = self.obstacle(size, quantized)
        if reason is None:
            return
        fit = [n for n in range(1, self.heads + 1) if self.obstacle(n, quantized) is None]
        raise UsageError(
            f"The transformer can't be sharded over {size} hosts: {reason}; use "
            f"{', '.join(map(str, fit))} of them, or `placement` sequence."
        )
