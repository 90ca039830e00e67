"""Columns of a table that fit a terminal: what is worth least is shortened, then left out.

A line of such a table is never folded. Pure: `tables.py` fills the columns, rich draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

GAP = 2  # characters between two columns


@dataclass(frozen=True)
class Column:
    """A heading, and a text for each row."""

    heading: str
    cells: tuple[str, ...]
    right: bool = False  # holds numbers
    brief: tuple[str, ...] | None = None  # the same in fewer characters, where there is such

    @property
    def width(self) -> int:
        return max(map(len, (self.heading, *self.cells)))

    def shortened(self) -> Column:
        """With its brief cells."""
        return self if self.brief is None else replace(self, cells=self.brief, brief=None)


def fitted(columns: Sequence[Column], width: int, order: Sequence[str]) -> list[Column]:
    """Those columns that fit `width` characters side by side, in their order.

    Columns with nothing in them are left out always. Of the others, those that `order` names give
    way one by one for as long as it is too wide: a column that has a brief form takes it, one that
    has none, or has taken it, is left out. What `order` does not name stays.
    """
    kept = [column for column in columns if any(column.cells)]
    for heading in order:
        if _total(kept) <= width:
            break
        kept = [
            column if column.heading != heading else column.shortened()
            for column in kept
            if column.heading != heading or column.brief is not None
        ]
    return kept


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)
