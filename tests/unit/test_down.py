"""`fluxmesh down` asks before it takes a mesh from under somebody."""

from __future__ import annotations

import pytest

from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.messages import JobProgress, LeaseHolder
from fluxmesh_agent.lifecycle import Lifecycle
from fluxmesh_agent.status import status_of
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents import status as survey
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.cli.down import down
from fluxmesh_coordinator.deploy import bringup

MESH = MeshRecord("macs.json", '[{"ssh": "mac1"}]', (Member(0, "mac1:47100", "", "", "", ""),))


def test_a_host_that_a_job_holds_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    status = status_of(
        Lifecycle(),
        engine_pid=None,
        measured=(),
        memory=None,
        holder="someone",
        job="a1b2",
        lease=LeaseHolder(user="anna@studio", title="4 images, 128x128", progress=JobProgress()),
        waiting=0,
    )
    ended: list[MeshRecord] = []

    def take_down(mesh: MeshRecord) -> dict[int, FluxmeshError]:
        ended.append(mesh)
        return {}

    monkeypatch.setattr(mesh_file, "load", lambda: MESH)
    monkeypatch.setattr(survey, "survey", lambda mesh: survey.Survey(mesh, {0: status}, {}, {}))
    monkeypatch.setattr(bringup, "take_down", take_down)
    monkeypatch.setattr(mesh_file, "remove", lambda: None)
    assert survey.in_use(survey.Survey(MESH, {0: status}, {}, {})).startswith(
        "Host 0 works on 4 images, 128x128 (anna@studio); wait "
    )
    with pytest.raises(FluxmeshError, match="Host 0 works on 4 images, .*; wait .*`force`"):
        down.main([], standalone_mode=False)
    assert ended == []
    down.main(["--force"], standalone_mode=False)
    assert ended == [MESH]
