"""What an engine's process is started with; how it lives is for real ones (`tests/integration`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.engine.gpu_errors import RELAX
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import AgentHome
from fluxmesh_agent import supervisor
from fluxmesh_agent.supervisor import EngineOptions, Supervisor


def started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, platform: str, **envs: str
) -> dict[str, str]:
    """The environment of an engine on such a machine."""
    seen: dict[str, str] = {}

    def popen(_command: Any, *, env: dict[str, str], **_options: Any) -> Any:
        seen.update(env)
        raise OSError(11, "no process today")

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
    options = EngineOptions(envs=tuple(envs.items()))
    watcher = Supervisor(AgentHome(folder), options, lambda _: None, lambda _: None)
    with pytest.raises(FluxmeshError, match="no process today"):
        watcher.start()
    return seen


def test_a_macs_engine_may_keep_its_display_waiting_and_the_user_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RELAX, raising=False)
    assert started(tmp_path, monkeypatch, "darwin")[RELAX] == "1"
    assert RELAX not in started(tmp_path, monkeypatch, "linux")
    assert started(tmp_path, monkeypatch, "darwin", **{RELAX: "0"})[RELAX] == "0"
    monkeypatch.setenv(RELAX, "0")
    assert started(tmp_path, monkeypatch, "darwin")[RELAX] == "0"
