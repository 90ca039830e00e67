"""SIGKILL of an engine in a job that gives its model more than a prompt.

Whoever encodes the references or the map dies while it does, or in the middle of an image; guidance
has two calls a step to be made again. The pictures are those of one host.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import Placement
from tests.faults import strike
from tests.faults.mesh import up
from tests.faults.strike import STEPS, Fault, allowed, difference, heal, request_of

CASES = [
    pytest.param(
        kind, Fault(placement, moment, "engine", rank, signal.SIGKILL), id=f"{kind}-{name}"
    )
    for kind in strike.MODEL_KINDS
    if strike.conditions(kind)
    for name, placement, moment, rank in (
        ("encoding", "data", "first", 0),
        ("ring-encoding", "sequence", "first", 0),
        ("ring", "sequence", "middle", 1),
    )
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_death_costs_no_condition_and_no_acknowledged_step(
    kind: strike.ModelKind, fault: Fault, tmp_path: Path
) -> None:
    model = strike.make_kind(tmp_path, kind)
    request = request_of(model, **strike.conditions(kind, 1))
    expected = strike.alone(request)
    placement: Placement = fault.placement
    delays = "step=0.8,encode=0.8"  # for this process to come, however busy the machine is
    with up(tmp_path / "mesh", 2, model, delays=delays) as ground, ground.connect() as mesh:
        heal(ground, mesh, placement)
        struck = strike.strike(ground, mesh, request, fault)
    outcome = struck.outcome
    assert outcome.error is None, outcome.error
    assert [lost.host for lost in outcome.lost]
    assert difference(expected, outcome.pictures) <= allowed(placement)
    assert len(outcome.pictures) == 2 and struck.log.again == []
    assert sorted(outcome.steps) == [(k, n + 1) for k in range(2) for n in range(STEPS)]
