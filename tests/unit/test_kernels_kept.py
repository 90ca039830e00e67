"""The folder of compiled kernels: of one version, bounded, private, with nothing half-written."""

from __future__ import annotations

import os
import time
from importlib import metadata
from pathlib import Path

import pytest

from fluxmesh.storage.homes import AgentHome, private_folder
from fluxmesh_agent import kernels

VERSION = metadata.version("mlx")


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    return AgentHome(private_folder(tmp_path / "agent"))


def module(folder: Path, name: str, age: float, nbytes: int = 10) -> None:
    """What MLX writes for one module, `age` seconds ago."""
    for suffix in (".ptx", ".txt", ".cu"):
        path = folder / f"{name}{suffix}"
        path.write_bytes(b"x" * nbytes)
        os.utime(path, (time.time() - age,) * 2)


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_each_version_of_mlx_has_a_folder_that_only_its_owner_may_look_into(
    home: AgentHome,
) -> None:
    old = home.kernels / "0.1"
    old.mkdir(parents=True)
    (old / "kernel.ptx").touch()
    folder = kernels.folder_for(home)
    assert folder == home.kernels / VERSION and folder.is_dir()
    for path in (folder, home.kernels):
        assert path.stat().st_mode & 0o777 == 0o700
    assert not old.exists()
    module(folder, "kept", age=100.0)
    assert kernels.folder_for(home) == folder and names(folder) == {"kept"}


def test_what_was_compiled_first_goes_when_there_is_too_much(
    home: AgentHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST", 95)
    folder = kernels.folder_for(home)
    assert folder is not None
    for age, name in enumerate(("d.x", "c", "b", "a"), start=1):
        module(folder, name, age=100.0 * age)  # 30 bytes each
    kernels.folder_for(home)
    assert names(folder) == {"b", "c", "d.x"}


def test_what_was_written_just_before_an_engine_was_ended_goes_whole(home: AgentHome) -> None:
    folder = kernels.folder_for(home)
    assert folder is not None
    for name, age in (("old", 60.0), ("new", 0.1), ("new[1]*", 60.0), ("half", 60.0)):
        module(folder, name, age)
    (folder / "half.cu").touch()  # the others came before it, and are of the same module
    kernels.drop_half_written(home)
    assert names(folder) == {"old", "new[1]*"}


def test_a_folder_that_cannot_be_had_costs_nothing_but_the_kernels(home: AgentHome) -> None:
    home.kernels.write_text("in the way")
    assert kernels.folder_for(home) is None
    kernels.drop_half_written(home)
    assert home.kernels.read_text() == "in the way"
