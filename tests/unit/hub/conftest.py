"""For the tests of names and checkpoints: nothing of the user's own is here."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache of the test's own, and none of the user's overrides."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"
