"""Columns give way in their order, and what is left fits."""

from __future__ import annotations

import pytest

from fluxmesh_coordinator.console.columns import Column, fitted

NAME = Column("name", ("studio", "mini"))
USER = Column("for", ("anna@studio", ""), brief=("anna", ""))
LINK = Column("link", ("4.40 GB/s", "4.40 GB/s"))
EMPTY = Column("job", ("", ""))


@pytest.mark.parametrize(
    ("width", "cells"),
    [
        (6 + 2 + 11 + 2 + 9, ["studio", "anna@studio", "4.40 GB/s"]),
        (6 + 2 + 11 + 2 + 8, ["studio", "anna@studio"]),
        (6 + 2 + 10, ["studio", "anna"]),
        (6 + 2 + 3, ["studio"]),
        (1, ["studio"]),  # what the order does not name stays
    ],
)
def test_columns_give_way_in_their_order(width: int, cells: list[str]) -> None:
    shown = fitted([NAME, EMPTY, USER, LINK], width, ("link", "for", "for"))
    assert [column.cells[0] for column in shown] == cells


def test_a_heading_may_be_wider_than_what_is_below_it() -> None:
    assert Column("heading", ("a",)).width == 7
