"""A mesh of real agents and engines on this machine, brought up by `fluxmesh up`, to be hurt."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fluxmesh.cluster.snapshot import HostInfo, MeshView
from fluxmesh.errors import FluxmeshError
from fluxmesh.events import Event, HostLost, Picture, Planned, Step
from fluxmesh.planning import plan as placing
from fluxmesh.planning.plan import Plan
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import GenerateRequest
from fluxmesh.storage.homes import AgentHome, Home
from fluxmesh.storage.keys import load_keys
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.status import host_info
from fluxmesh_coordinator.jobs.generation import state as generation_state
from fluxmesh_coordinator.runtime import agent_pool, job_runner
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.paths import python_path
from tests.ports import free_ports
from tests.processes import commands_of

LIMIT = 200.0  # seconds that anything here may take


def environment(folder: Path, delays: str = "") -> dict[str, str]:
    """Of a user whose home is `folder`; engines pause as `delays` says ("step=0.3")."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("FLUXMESH_")}
    return {
        **keep,
        "HOME": str(folder),
        "FLUXMESH_HOME": str(folder / "config"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **({"FLUXMESH_DELAYS": delays} if delays else {}),
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)]


@dataclass
class Up:
    """A mesh that is up, and its user."""

    folder: Path
    ports: list[int]
    env: dict[str, str]
    model: str

    def fluxmesh(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs the command line as this mesh's user."""
        done = subprocess.run(
            command(*arguments),
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"fluxmesh {arguments}: {done.returncode}\n{done.stderr}")
        return done

    @contextmanager
    def connect(self) -> Iterator[Mesh]:
        """The mesh, held by this process, which is its user meanwhile: it starts agents again."""
        home = Home(self.folder / "config")
        record = mesh_file.load(home)
        assert record is not None
        with (
            mock.patch.dict(os.environ, self.env),
            Mesh.connect(record, load_keys(home.folder, "client")) as mesh,
        ):
            yield mesh

    def home(self, rank: int) -> AgentHome:
        """The folder of an agent."""
        return AgentHome(self.folder / f".local/state/fluxmesh/agent-{self.ports[rank]}")

    def pid(self, victim: str, rank: int) -> int:
        """The process of the "agent" or the "engine" of a host that runs now."""
        home = self.home(rank)
        process = json.loads((home.agent if victim == "agent" else home.engine).read_text())
        return int(process["pid"])

    def status(self, mesh: Mesh, rank: int) -> Status:
        """What a host says of itself; waits until it answers."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            answer = mesh.status()[rank]
            if isinstance(answer, Status):
                return answer
            time.sleep(0.1)
        raise AssertionError(f"host {rank} does not answer: {answer}")

    def processes(self) -> list[int]:
        """Agents and engines of this mesh that run now."""
        commands = commands_of(self.folder)
        return [pid for pid, words in commands.items() if "fluxmesh_agent" in " ".join(words)]


def local(port: int) -> dict[str, Any]:
    """A line of a hostfile: this machine, once more."""
    return {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}"}


@contextmanager
def up(
    folder: Path,
    hosts: int,
    model: str = "tiny",
    dtype: str = "float32",
    delays: str = "",
    host: Callable[[int, int], dict[str, Any]] = lambda rank, port: local(port),
    options: tuple[str, ...] = ("--no-warm",),  # trial pictures take time, and nobody paints here
    **env: str,
) -> Iterator[Up]:
    """`hosts` agents with `model` in memory; nothing of them is left at the end.

    `host` gives a rank's line of the hostfile, `options` are more of `up`'s; `env` is for the
    user's environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(hosts)
    path = folder / "hosts.json"
    path.write_text(json.dumps([host(rank, port) for rank, port in enumerate(ports)]))
    mesh = Up(folder, ports, environment(folder, delays) | env, model)
    try:
        mesh.fluxmesh("up", path, "--model", model, "--dtype", dtype, *options)
        yield mesh
    finally:
        mesh.fluxmesh("down", check=False)
        left = mesh.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    assert not left, f"`fluxmesh down` left {left}"


@dataclass
class Outcome:
    """How a job went."""

    pictures: dict[int, np.ndarray]
    steps: list[tuple[int, int]]  # (image, step), as they were acknowledged
    lost: list[HostLost]
    planned: list[Planned]
    seconds: float
    error: FluxmeshError | None = None


def paint(mesh: Mesh, request: GenerateRequest, placement: Any = None, hurt: Any = None) -> Outcome:
    """Runs a job to its end; `hurt(event)` is called for every event, and may do harm.

    As many hosts as can work on it: the agents share a machine, and a planner that knows uses few.
    """
    pictures: dict[int, np.ndarray] = {}
    steps: list[tuple[int, int]] = []
    lost: list[HostLost] = []
    planned: list[Planned] = []
    began = time.monotonic()
    error = None
    try:
        with (
            mock.patch.object(generation_state, "plan", _widest),
            mock.patch.object(job_runner, "host_info", _apart),
            mock.patch.object(agent_pool, "host_info", _apart),
        ):
            for event in mesh.generate(request, placement):
                note(event, pictures, steps, lost, planned)
                if hurt is not None:
                    hurt(event)
    except FluxmeshError as failed:
        error = failed
    return Outcome(pictures, steps, lost, planned, time.monotonic() - began, error)


def _apart(rank: int, status: Status) -> HostInfo:
    """A host as the planner sees it: a slow machine of its own, to which weights come at once."""
    info = host_info(rank, status)
    return replace(info, device="", load_rate=1e12, flops_per_second=1e6, measured=())


def _widest(
    request: GenerateRequest,
    view: MeshView,
    sizes: ModelSizes,
    *,
    placement: Any = None,
    **keys: Any,
) -> Plan:
    """The plan for `placement` that uses most hosts."""
    plan = placing.plan(sizes.fill(request), view, sizes, placement=placement, **keys)
    ways = [option for option in plan.options if option.name == placement and not option.problem]
    return replace(plan, winner=max(ways, key=lambda option: len(option.ranks))) if ways else plan


def note(
    event: Event,
    pictures: dict[int, np.ndarray],
    steps: list[tuple[int, int]],
    lost: list[HostLost],
    planned: list[Planned],
) -> None:
    match event:
        case Picture():
            assert event.image not in pictures, "a picture is committed once"
            pictures[event.image] = event.pixels
        case Step():
            steps.append((event.image, event.step))
        case HostLost():
            lost.append(event)
        case Planned():
            planned.append(event)
