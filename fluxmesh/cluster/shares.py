"""What of a step each host of a ring computes, where hosts are not equally fast. Pure.

Beside `snapshot.py`, whose hosts hold such shares of a model, and below all that deal with them:
the planner chooses them (`planning/share_choice.py`), works carry them, and the transformers on
several hosts go by them (`models/partition.py`). Without any numbers all hosts have the same: then
every byte is as if there were no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from fluxmesh.bounds import Count, Range
from fluxmesh.errors import UsageError

Units = Annotated[tuple[Annotated[int, Range(1, 1 << 20)], ...], Count(1024)]


@dataclass(frozen=True)
class Shares:
    """What each rank of a ring has, in the order of the ring; () is the same for all.

    `tokens` are parts of whatever number of tokens a step has: a request with a longer prompt, or
    references that are read by themselves, is dealt out in the same proportion.
    """

    tokens: Units = ()  # `sequence`: parts of all tokens
    heads: Units = ()  # `tensor`: attention heads, and rows of modulations in proportion
    columns: Units = ()  # `tensor`: columns of the MLPs

    @property
    def are_even(self) -> bool:
        return not (self.tokens or self.heads or self.columns)

    @classmethod
    def from_plain(cls, data: Mapping[str, Sequence[int]]) -> Shares:
        """Of lists, as JSON has them. Raises `TypeError` or `ValueError` for what are none."""
        return cls(**{name: tuple(map(int, units)) for name, units in dict(data).items()})

    def check(self, size: int) -> None:
        """Raises `UsageError` where they are those of another number of hosts than `size`."""
        for name, units in vars(self).items():
            if units and len(units) != size:
                raise UsageError(
                    f"The shares of {name} are those of {len(units)} hosts, and the ring has "
                    f"{size}; plan again."
                )


EVEN = Shares()


@lru_cache(maxsize=1024)
def dealt(total: int, parts: tuple[int, ...]) -> tuple[int, ...]:
    """`total` in proportion to `parts`, whole numbers that add up to it: by largest remainder.

    Nobody is left without any while there is one for each; of equal remainders the first is served.
    """
    whole, count = sum(parts), len(parts)
    least = 1 if total >= count else 0
    counts = [max(least, total * part // whole) for part in parts]
    remainders = [total * part % whole for part in parts]
    by_remainder = sorted(range(count), key=lambda i: (-remainders[i], i))
    for turn in range(max(0, total - sum(counts))):
        counts[by_remainder[turn % count]] += 1
    while sum(counts) > total:  # somebody was given one who had none
        counts[max(range(count), key=lambda i: counts[i])] -= 1
    return tuple(counts)
