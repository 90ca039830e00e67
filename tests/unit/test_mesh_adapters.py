"""Adapters on a whole mesh in one process: sent once, by their hash, called as the user does."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import ModelNotFoundError
from fluxmesh.request import AdapterRef
from fluxmesh_agent.adapter_store import AdapterStore
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.runtime import adapter_upload
from fluxmesh_coordinator.runtime.adapter_upload import by_hash, with_names
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.fakes import FakeMesh
from tests.unit.mesh_jobs import Heard, check, job, play


def test_adapters_travel_once_and_by_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(bytes(range(256)) * 40000)
    named, files = by_hash([AdapterRef(str(path), 0.5)])
    asked = job(adapters=named)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        heard = Heard()
        await JobRunner(pool, GenerationSession(asked), files, heard).run()
        check(heard, asked)
        stored = tmp_path / "agent-0" / "adapters" / f"{named[0].path}.safetensors"
        assert stored.read_bytes() == path.read_bytes()
        path.unlink()  # the host has it: nothing is read again
        await JobRunner(
            pool, GenerationSession(dataclasses.replace(asked, id="two")), files, Heard()
        ).run()

    play(tmp_path, 1, body)


def test_an_adapter_that_takes_long_to_send_is_no_reason_to_call_an_engine_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(bytes(600))
    named, files = by_hash([AdapterRef(str(path))])
    monkeypatch.setattr(adapter_upload, "PIECE", 100)
    put, soon = AdapterStore.put, replace(DEADLINES, silence=2.0)

    def slowly(self: AdapterStore, *piece: Any) -> None:
        time.sleep(0.4)
        put(self, *piece)

    monkeypatch.setattr(AdapterStore, "put", slowly)
    asked, heard = job(adapters=named), Heard()

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        await JobRunner(pool, GenerationSession(asked, soon), files, heard).run()
        check(heard, asked)
        assert heard.of(events.HostLost) == []
        loadings = [event for event in heard.of(events.Loading) if event.component == "adapter"]
        assert [event.done_bytes for event in loadings] == [0, 100, 200, 300, 400, 500, 600]

    play(tmp_path, 1, body)


def test_sentences_of_agents_name_adapters_as_the_user_did(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"dog")
    (adapter,), files = by_hash([AdapterRef(str(path))])
    said = f"The adapter /state/adapters/{adapter.path}.safetensors fits no key."
    assert with_names(said, files) == f"The adapter {path} fits no key."
    with pytest.raises(ModelNotFoundError, match="cat"):
        by_hash([AdapterRef(str(tmp_path / "cat.safetensors"))])
