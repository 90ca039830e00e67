"""docs/json.md names every field of `status --json`, and none that there is not."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.snapshot import (
    Holding,
    KeptModel,
    ModelVariant,
    StepShape,
    StepTiming,
    TextHolding,
)
from fluxmesh.request import AdapterRef
from fluxmesh.wire.messages import JobProgress, LeaseHolder, Reading, Status, WaitingJob
from fluxmesh_coordinator.agents.status import Survey
from fluxmesh_coordinator.cli import status as command
from fluxmesh_coordinator.server import running_server
from tests.messages import sample
from tests.serving import Serving, wait_until_running
from tools.status_picture import survey

DOCS = Path(__file__).resolve().parents[2] / "docs" / "json.md"
WEIGHTS = ModelVariant("dev", adapters=(AdapterRef("robot.safetensors"),))


def full() -> Survey:
    """A mesh of which everything is told that can be."""
    shown = survey()
    fault = BackendFault(backend="jaccl", ranks=(0, 1), reason="It failed.")
    held = Holding(weights=WEIGHTS, nbytes=1)
    status = replace(
        sample(Status, random.Random(1)),
        holds=held,
        kept=(KeptModel(holds=held),),
        text=TextHolding(weights=WEIGHTS),
        loading=Reading("transformer", 1, 2),
        measured=(
            StepTiming(
                model="dev", height=64, width=64, dtype="bfloat16", bits=None, step_seconds=1.0
            ),
        ),
        compiled=(
            StepShape(
                model="dev",
                dtype="bfloat16",
                bits=None,
                placement="data",
                hosts=1,
                height=64,
                width=64,
            ),
        ),
        lease=LeaseHolder(user="anna", title="1 image", progress=JobProgress()),
        line=(WaitingJob(user="ben", title="1 image", seconds=1.0),),
    )
    record = replace(shown.record, faults=(fault,))
    return replace(shown, record=record, statuses=dict.fromkeys(shown.statuses, status))


def names(value: Any) -> Iterator[str]:
    """Of all fields, those inside of others too."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for each in value if isinstance(value, list) else []:
        yield from names(each)


def test_every_field_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = Serving(tmp_path)
    serving.lane.may_go.clear()
    with serving.client() as client:
        client.post("/api/jobs", json={"prompt": "a dog"})
        wait_until_running(serving)
        queue = client.get("/api/status").json()["queue"]
    assert queue
    monkeypatch.setattr(running_server, "line", lambda: ("http://127.0.0.1:8420", queue))
    command._tell(full(), as_json=True)
    seen = set(names(json.loads(capsys.readouterr().out)))
    section = DOCS.read_text(encoding="utf-8").split("## The mesh at one moment", 1)[1]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("|")]
    described = set(re.findall(r"`(\w+)`", " ".join(cell for row in rows for cell in row)))
    assert seen - described == set() and described - seen == set()


def test_without_a_mesh_there_are_the_same_fields(capsys: pytest.CaptureFixture[str]) -> None:
    command._tell(full(), as_json=True)
    with_mesh = json.loads(capsys.readouterr().out)
    command._tell(None, as_json=True)
    without = json.loads(capsys.readouterr().out)
    assert set(with_mesh) == set(without)
