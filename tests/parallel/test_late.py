"""A peer that comes late to a collective, on machines whose GPU may not wait: an emulated Metal."""

from __future__ import annotations

import json

import pytest

from tests.parallel.late import MOMENTS
from tests.parallel.ring import run_ranks

SAFE = ("training",)  # whose sum is evaluated alone in any case


@pytest.mark.alone  # beside others, a thread may stand still for longer than the scaled watchdog
def test_a_late_peer_is_waited_for_by_hosts_and_never_by_a_gpu(tmp_path):
    outs = run_ranks(3, ["host", *MOMENTS], tmp_path, 200.0, program="late")
    for out in outs:
        same = json.loads(out.with_suffix(".json").read_text())
        assert same == dict.fromkeys(MOMENTS, True)


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment not in SAFE])
def test_a_graph_that_waits_for_a_late_peer_is_killed(tmp_path, moment):
    with pytest.raises(AssertionError, match="Caused GPU Timeout Error"):
        run_ranks(2, ["graph", moment], tmp_path, 200.0, program="late")
