"""A mesh that nobody hurts: up in seconds, cheap to control, no false alarm, no leak."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults import mesh, strike
from tests.faults.conftest import ModelOf
from tools import endurance

UP = 20.0  # seconds in which four agents of this machine are up, weights and all


@pytest.mark.timeout(900)
def test_500_jobs_leak_nothing_raise_no_alarm_and_cost_little(model: str, tmp_path: Path) -> None:
    with mesh.up(tmp_path, 3, model) as up:
        report = endurance.run(up, 500, seed=1)
    assert report.problems() == []
    assert {name: len(spent) > 100 for name, spent in report.control.items()} == {
        "data": True,
        "tensor": True,
        "sequence": True,
    }


@pytest.mark.parametrize("family", strike.MODEL_FAMILIES)
def test_four_agents_are_up_in_time(
    model_of: ModelOf, family: strike.ModelFamily, tmp_path: Path
) -> None:
    model = model_of(family)
    began = time.monotonic()
    with mesh.up(tmp_path, 4, model) as up:
        assert time.monotonic() - began < UP
        with up.connect() as held:
            assert all(up.status(held, rank).holds for rank in range(4))
