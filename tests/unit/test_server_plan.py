"""`/api/plan`: what a job would do, planned as the job itself is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.planning.plan import Plan, plan
from fluxmesh_coordinator.server.faces import api
from tests.serving import Serving, png, text
from tests.unit.meshes import full, mac


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """Before a mesh of two hosts."""
    serving = Serving(tmp_path)
    painter = SimpleNamespace(mesh=SimpleNamespace(view=full(mac(0), mac(1))))

    @contextmanager
    def looking() -> Iterator[Any]:
        yield painter

    monkeypatch.setattr(serving.lane.painters, "looking", looking)
    return serving


@pytest.mark.parametrize("placement", ["data", "sequence", "tensor"])
def test_a_placement_that_is_asked_for_is_the_one_that_is_planned(
    serving: Serving, placement: str
) -> None:
    sent = {"prompt": "a dog", "n_images": 2}
    with serving.client() as client:
        free = client.post("/api/plan", json=sent).json()
        asked = client.post("/api/plan", json={**sent, "placement": placement})
        wrong = client.post("/api/plan", json={**sent, "placement": "nowhere"})
    assert asked.status_code == 200 and asked.json()["chosen"] == placement
    assert {row["placement"] for row in asked.json()["rows"]} >= {"data", "sequence", "tensor"}
    assert free["chosen"] == "data"  # which of them asks for it makes a difference
    assert wrong.status_code == 400 and wrong.json()["error"]["setting"] == "placement"


def test_the_planner_is_asked_for_the_very_request_that_a_job_would_be(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[Any, Any]] = []

    def noted(request: Any, *more: Any, placement: Any = None) -> Plan:
        heard.append((request, placement))
        return plan(request, *more, placement=placement)

    monkeypatch.setattr(api, "find_plan", noted)
    sent = {
        "prompt": "a dog", "width": 128, "height": 64, "steps": 3, "n_images": 2, "bits": 4,
        "text_bits": 8, "dtype": "float16", "cache": 0.1, "t5_padding": False, "seed": 5,
        "image": text(png()), "strength": 0.5, "placement": "tensor", "previews": True,
        "id": "an-id-of-mine",
    }  # fmt: skip
    with serving.client() as client:
        serving.lane.may_go.clear()
        assert client.post("/api/plan", json=sent).status_code == 200
        assert client.post("/api/jobs", json=sent).status_code == 202
        job = serving.service.job("an-id-of-mine")
        assert job.ready is not None and job.spread is not None
        (request, placement), of_job = heard[0], job.ready.resolved.request
        assert placement == job.spread.placement == "tensor"
        assert str(request) == str(of_job)  # arrays among its fields have no one truth
        # A field that does not belong to it is refused, and not passed over.
        assert client.post("/api/plan", json={**sent, "hostfile": "x"}).status_code == 400
