"""A random tiny checkpoint, and the real command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from tests.checkpoints import make_checkpoint
from tests.integration.agents import AgentProcess, agent

Run = Callable[..., "FinishedProcess"]


@dataclass(frozen=True)
class FinishedProcess:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of `--json`."""
        return [json.loads(line) for line in self.out.splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind of event."""
        return [line for line in self.events if line["event"] == event]


def environment(home: Path) -> dict[str, str]:
    """That of a user with nothing set, whose Hub cache is empty and who has no network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLUX_", "HF_", "HUGGING", "XDG_")) and name not in ("AE", "CI")
    }
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    own = {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "FLUXMESH_HOME": str(home / "mesh")}
    return kept | threads | own


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX in a diffusers folder; its pictures are noise, but always the same noise."""
    return make_checkpoint(tmp_path_factory.mktemp("model"), dtype="bfloat16").path


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `environment` keeps what a user has."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def fluxmesh(tmp_path: Path, home: Path) -> Run:
    """Runs `fluxmesh ARGUMENTS` in `tmp_path`."""

    def run(
        *arguments: object, stdin: str | bytes = b"", timeout: float = 200, **more: Any
    ) -> FinishedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=tmp_path,
            env=environment(home),
            timeout=timeout,
            check=False,
            **more,
        )
        return FinishedProcess(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ModelVariant:
    """A random FLUX in float32, which agents are asked for."""
    return ModelVariant(str(make_checkpoint(tmp_path_factory.mktemp("model")).path), "float32")


@pytest.fixture
def host(tmp_path: Path, weights: ModelVariant) -> Iterator[AgentProcess]:
    """An agent that may load `weights`."""
    with agent(tmp_path / "agent", "--root", weights.model) as running:
        yield running
