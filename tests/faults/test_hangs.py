"""A hang is a death: SIGSTOP of every engine and agent, noticed within the deadline of its kind.

After that a job goes on as after a death. Waking what hung, later, does no harm.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults import strike
from tests.faults.conftest import Grounds
from tests.faults.mesh import paint
from tests.faults.strike import (
    DEADLINE,
    SLACK,
    STEP,
    STEPS,
    Fault,
    allowed,
    difference,
    heal,
    request_for,
)
from tests.slowness import slowdown

MOMENTS = ("load", "first", "middle", "decode")
LOOKS = 1.5  # seconds between a silence that is too long and the event that tells it
CASES = [
    pytest.param(family, hosts, fault, id=f"{family}-{hosts}-{fault}")
    for family in strike.MODEL_FAMILIES
    for hosts in strike.hosts_of(family)
    for fault in strike.faults_of(hosts, signal.SIGSTOP)
    if fault.moment in MOMENTS
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("family", "hosts", "fault"), CASES)
def test_a_hang_is_noticed_in_time_and_costs_no_acknowledged_step(
    grounds: Grounds, family: strike.ModelFamily, hosts: int, fault: Fault
) -> None:
    ground = grounds.of(hosts, family)
    up = ground.up
    request = request_for(up.model, fault.placement, hosts)
    with up.connect() as mesh:
        is_cold, slow = fault.moment == "load", slowdown()
        clean = ground.seconds(mesh, fault.placement, cold=is_cold)
        heal(up, mesh, fault.placement, cold=is_cold)
        struck = strike.strike(up, mesh, request, fault)
        outcome = struck.outcome

        assert outcome.error is None, outcome.error
        assert len(outcome.pictures) == request.n_images
        assert difference(ground.alone, outcome.pictures) <= allowed(fault.placement)
        # Whole images may all be done by others before the silence is too long.
        assert struck.noticed is not None or fault.placement == "data"
        noticed, slow = struck.noticed or 0.0, max(slow, slowdown())
        assert noticed <= DEADLINE + LOOKS * slow
        extra = outcome.seconds - clean - noticed
        assert extra <= (STEP + SLACK) * slow
        assert struck.log.again == []
        assert sorted(outcome.steps) == [
            (k, n + 1) for k in range(request.n_images) for n in range(STEPS)
        ]

        heal(up, mesh, fault.placement)
        after = paint(mesh, request, fault.placement)
        assert after.lost == []
        assert difference(ground.alone, after.pictures) <= allowed(fault.placement)
