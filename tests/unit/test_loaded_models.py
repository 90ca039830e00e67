"""Which models are in memory, as each face of the server tells it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxmesh.cluster.snapshot import Holding, KeptModel, ModelVariant
from fluxmesh.wire.messages import Status
from tests.fakes import FakeMesh
from tests.messages import sample
from tests.serving import Serving


def held(model: str) -> Holding:
    return Holding(weights=ModelVariant(model), nbytes=10**9)


def test_every_face_tells_all_models_that_a_host_has_in_memory(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    sampled: Status = sample(Status, random.Random(1))
    kept = KeptModel(holds=held("/far/away/tiny-klein"))
    status = replace(sampled, holds=held("tiny"), kept=(kept,))
    answer: Any = (FakeMesh(tmp_path, 2).record, {0: status, 1: "It does not answer."})
    serving.lane.statuses = lambda: answer  # type: ignore[method-assign]
    with serving.client() as client:
        hosts = client.get("/api/status").json()["hosts"]
        assert [host["models"] for host in hosts] == [["tiny", "tiny-klein"], []]
        assert [host["model"] for host in hosts] == ["tiny", None]
        own = {each["name"]: each["loaded"] for each in client.get("/api/models").json()["models"]}
        openai = {each["id"]: each["loaded"] for each in client.get("/v1/models").json()["data"]}
        models = client.get("/sdapi/v1/sd-models").json()
        a1111 = {each["model_name"]: each["loaded"] for each in models}
        assert own == openai == a1111
        assert own["tiny"] and client.get("/v1/models/tiny").json()["loaded"]
