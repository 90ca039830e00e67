"""What `benchmarks.emulated` makes of what it measured, and when it fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from benchmarks.emulated import __main__ as emulated
from benchmarks.emulated.report import (
    NEAR,
    SLOWER,
    EmulatedSetting,
    MeshOutcome,
    StepWay,
    report,
)
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import Placement
from fluxmesh.planning.plan import Phase


def way(
    placement: Placement, predicted: float, measured: float, shares: Shares = EVEN, hosts: int = 2
) -> StepWay:
    phase = Phase(
        placement=placement,
        layout="replicated",
        images=(0,),
        ranks=tuple(range(hosts)),
        owners=(0,),
        step_seconds=predicted * SLOWER,
        shares=shares,
    )
    return StepWay(phase, measured * SLOWER)


def outcome(*ways: StepWay, chosen: int = 0) -> MeshOutcome:
    return MeshOutcome(EmulatedSetting(2, 5, True, 64, "tiny"), ways, ways[chosen])


@pytest.mark.parametrize(
    ("ways", "holds"),
    [
        ([("sequence", 1.0, 1.0), ("data", 2.0, 2.0)], True),
        ([("sequence", 1.0, 1.04), ("tensor", 1.1, 1.0)], True),  # a tie
        ([("sequence", 1.0, 1.1), ("tensor", 1.1, 1.0)], False),  # the other one was faster
        ([("sequence", 1.0, 1.0), ("data", 2.0, 2.0 / (1.01 + NEAR))], False),  # predicted too long
        ([("sequence", 1.0, 1.0), ("data", 2.0, 2.0 / (0.99 - NEAR))], False),  # or too short
    ],
)
def test_a_mesh_holds_where_all_is_predicted_and_the_fastest_is_chosen(
    ways: list[tuple[Placement, float, float]], holds: bool
) -> None:
    assert outcome(*(way(*each) for each in ways)).holds == holds


def test_the_table_has_a_row_for_each_way_in_the_time_that_is_emulated() -> None:
    shared = way("sequence", 0.001, 0.00125, Shares(tokens=(2, 1)))
    bad = outcome(way("tensor", 0.001, 0.002), way("data", 0.001, 0.001))
    printed = report([outcome(shared, way("data", 0.002, 0.002)), bad])
    assert (
        "| 2 hosts, one slowed, 5 Gb/s, tiny 64² | sequence on 2 (2:1) | 1.00 | 1.25 |" in printed
    )
    assert "| tensor on 2 | 1.00 | 2.00 | -50% ! | yes ! |" in printed
    assert "3 of 4 steps" in printed and "1 of 2 times" in printed
    assert printed.endswith("1 of 2 meshes hold.")


@pytest.mark.parametrize(("held", "code"), [(10, None), (9, None), (8, "8 of 10 meshes hold.")])
def test_it_fails_where_fewer_than_nine_of_ten_hold(
    monkeypatch: pytest.MonkeyPatch, held: int, code: str | None
) -> None:
    good, bad = outcome(way("data", 1.0, 1.0)), outcome(way("data", 1.0, 2.0))

    def measured(settings: Sequence[EmulatedSetting], rounds: int) -> list[MeshOutcome]:
        assert len(settings) == 10 and {s.hosts for s in settings} == {2, 3}
        return [good] * held + [bad] * (10 - held)

    monkeypatch.setattr(emulated, "measured", measured)
    monkeypatch.setattr(emulated.signal, "signal", lambda *_: None)  # this process has its own
    monkeypatch.setattr(sys, "argv", ["emulated"])
    if code is None:
        emulated.main()
        return
    with pytest.raises(SystemExit) as stopped:
        emulated.main()
    assert stopped.value.code == code
