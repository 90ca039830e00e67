"""SIGKILL of every engine and every agent, at every moment of a job: it costs seconds.

The job ends with the pictures that one host makes alone, no acknowledged step is made again, and
the time above that of a job that nobody hurts stays within a step and ten seconds, of which one
load is a part; longer where others use the machine too.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults import strike
from tests.faults.conftest import Grounds
from tests.faults.mesh import paint
from tests.faults.strike import SLACK, STEP, STEPS, Fault, allowed, difference, heal, request_for
from tests.slowness import slowdown

CASES = [
    pytest.param(family, hosts, fault, id=f"{family}-{hosts}-{fault}")
    for family in strike.MODEL_FAMILIES
    for hosts in strike.hosts_of(family)
    for fault in strike.faults_of(hosts, signal.SIGKILL)
]


@pytest.mark.sample(1, flux2=1)
@pytest.mark.parametrize(("family", "hosts", "fault"), CASES)
def test_a_death_costs_seconds_and_no_acknowledged_step(
    grounds: Grounds, family: strike.ModelFamily, hosts: int, fault: Fault
) -> None:
    ground = grounds.of(hosts, family)
    up = ground.up
    request = request_for(up.model, fault.placement, hosts)
    images = request.n_images
    with up.connect() as mesh:
        is_cold, slow = fault.moment == "load", slowdown()
        clean = ground.seconds(mesh, fault.placement, cold=is_cold)
        heal(up, mesh, fault.placement, cold=is_cold)
        struck = strike.strike(up, mesh, request, fault)
        outcome = struck.outcome

        assert outcome.error is None, outcome.error
        assert len(outcome.pictures) == images
        assert difference(ground.alone, outcome.pictures) <= allowed(fault.placement)
        extra = outcome.seconds - clean
        assert extra <= (STEP + SLACK) * max(slow, slowdown())

        assert struck.log.again == []
        assert sorted(outcome.steps) == [(k, n + 1) for k in range(images) for n in range(STEPS)]
        for rank in range(hosts):
            up.status(mesh, rank)  # comes back
        struck.end = strike.lives(mesh, hosts)
        makers = 1 if fault.placement == "data" else hosts
        # Beside those that count, one that was not acknowledged may have been made by each.
        assert struck.steps_run <= makers * (images * STEPS + 1)

        if fault.moment == "save":  # the job may have been over: the next one shows it
            after = paint(mesh, request, fault.placement)
            assert difference(ground.alone, after.pictures) <= allowed(fault.placement)
