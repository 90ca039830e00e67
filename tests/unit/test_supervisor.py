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
from fluxmesh_agent.supervisor import EngineOptions, Supervisor, last_words


def started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, platform: str, **envs: str
) -> dict[str, str]:
    """The environment of an engine on such a machine."""
    seen: dict[str, str] = {}

    def nothing_ends(_text: str, *, is_killed: bool) -> None:
        raise AssertionError("no engine ran")

    def popen(_command: Any, *, env: dict[str, str], **_options: Any) -> Any:
        seen.update(env)
        raise OSError(11, "no process today")

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
    options = EngineOptions(envs=tuple(envs.items()))
    watcher = Supervisor(AgentHome(folder), options, lambda _: None, nothing_ends)
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


def test_the_last_words_of_an_engine_are_not_its_log() -> None:
    log = "2026-07-01 10:00:00,000 engine INFO loads"
    abort = ["libc++abi: terminating", "[METAL] Command buffer execution failed", ""]
    assert last_words([log, *abort, log]) == abort[:2]
    raised = ["Traceback (most recent call last):", '  File "x.py"', "ImportError: libmlx.so"]
    assert last_words([log, *raised]) == ["ImportError: libmlx.so"]
    assert last_words([log]) == []
