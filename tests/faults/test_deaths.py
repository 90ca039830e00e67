"""SIGKILL of every engine and every agent, at every moment of a job: it costs seconds.

The job ends with the pictures that one host makes alone, no acknowledged step is made again, and
the time above that of a job that nobody hurts stays within a step, a load and ten seconds.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults import strike
from tests.faults.conftest import Grounds
from tests.faults.mesh import paint
from tests.faults.strike import SLACK, STEP, STEPS, Fault, allowed, difference, heal, request_of

CASES = [
    pytest.param(hosts, fault, id=f"{hosts}-{fault}")
    for hosts in (2, 3)
    for fault in strike.faults_of(hosts, signal.SIGKILL)
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("hosts", "fault"), CASES)
def test_a_death_costs_seconds_and_no_acknowledged_step(
    grounds: Grounds, hosts: int, fault: Fault
) -> None:
    ground = grounds.of(hosts)
    up, request = ground.up, request_of(ground.up.model)
    with up.connect() as mesh:
        warm, load = ground.seconds(mesh, fault.placement)
        is_cold = fault.moment == "load"
        heal(up, mesh, fault.placement, cold=is_cold)
        found = strike.strike(up, mesh, request, fault)
        outcome = found.outcome

        assert outcome.error is None, outcome.error
        assert difference(ground.alone, outcome.pictures) <= allowed(fault.placement)
        extra = outcome.seconds - warm - (load if is_cold else 0.0)
        assert extra <= STEP + load + SLACK

        assert found.log.again == []
        assert sorted(outcome.steps) == [(k, n + 1) for k in range(2) for n in range(STEPS)]
        for rank in range(len(up.ports)):
            up.status(mesh, rank)  # comes back
        found.end = strike.lives(mesh, len(up.ports))
        makers = 1 if fault.placement == "data" else len(up.ports)
        # Beside those that count, one that was not acknowledged may have been made by each.
        assert found.steps_run <= makers * (2 * STEPS + 1)

        if fault.moment == "save":  # the job may have been over: the next one shows it
            after = paint(mesh, request, fault.placement)
            assert difference(ground.alone, after.pictures) <= allowed(fault.placement)
