"""What programs read: few lines of what only tells how far something is."""

from __future__ import annotations

import json

import pytest

from fluxmesh.events import Loading
from fluxmesh_coordinator.console.generate_report import GenerateJsonReporter
from fluxmesh_coordinator.console.json_lines import INTERVAL, Paced
from fluxmesh_coordinator.console.train_report import TrainJsonReporter


def test_the_first_the_last_and_two_a_second_pass() -> None:
    clock = [0.0]
    paced = Paced(lambda: clock[0])
    passed = []
    for piece in range(1, 101):
        clock[0] = piece * 0.02
        if paced.passes("loading", piece, 100):
            passed.append(piece)
    assert passed == [1, 26, 51, 76, 100]
    assert INTERVAL == 0.5


def test_kinds_do_not_hold_one_another_up_and_every_end_passes() -> None:
    paced = Paced(lambda: 0.0)
    assert paced.passes("loading", 1, 9) and paced.passes("encoding", 1, 9)
    assert not paced.passes("loading", 2, 9)
    assert [paced.passes("loading", 9, 9) for _ in range(3)] == [True] * 3  # of three hosts


@pytest.mark.parametrize("reporter", [GenerateJsonReporter, TrainJsonReporter])
def test_a_host_that_reads_in_a_thousand_pieces_gives_a_few_lines(
    reporter: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporter() as told:
        for piece in range(1, 1001):
            told.event(Loading("transformer", piece, 1000, host=1))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 2 <= len(lines) < 10
    assert lines[-1] == {
        "event": "loading",
        "component": "transformer",
        "done_bytes": 1000,
        "total_bytes": 1000,
        "host": 1,
    }
