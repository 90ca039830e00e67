"""`Mesh` on real agents, engines and rings on loopback: the same pictures, whoever makes them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh import Mesh, events
from fluxmesh.cluster.snapshot import LinkInfo, Placement
from fluxmesh.request import GenerateRequest
from fluxmesh.storage.homes import Home, private_folder
from fluxmesh.storage.keys import Keys, store_keys
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import mesh_file as records
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.artifacts.recipe import read_recipe
from fluxmesh_coordinator.deploy import diagnosis
from tests.alone import painted_alone
from tests.checkpoints import make_checkpoint
from tests.integration.agents import PATIENCE, agent, as_if_apart
from tests.integration.conftest import Run

SLOW = {"FLUXMESH_DELAYS": "step=0.4"}


def record_of(agents: list[Any]) -> MeshRecord:
    """A mesh of agents on loopback, as `fluxmesh up` would have written it down."""
    entries = [
        {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{_port(process)}"}
        for process in agents
    ]
    members = [
        Member(rank, process.endpoint, process.key, process.boot, str(process.state), "python")
        for rank, process in enumerate(agents)
    ]
    pairs = [(a, b) for a in range(len(agents)) for b in range(len(agents)) if a != b]
    links = tuple(LinkInfo(source=a, target=b, rate=1e9) for a, b in pairs)
    return MeshRecord("loopback.json", json.dumps(entries), tuple(members), links=links)


def _port(process: Any) -> int:
    return int(process.endpoint.rpartition(":")[2])


@contextmanager
def connected_to(record: MeshRecord, user: Keys) -> Iterator[Mesh]:
    """A mesh all of whose hosts answer: `connect` waits no longer than a second for the others."""
    with Mesh.connect(record, user) as mesh:
        end = time.monotonic() + PATIENCE
        while len(mesh.view.hosts) < len(record.members):
            assert time.monotonic() < end, "not all agents answer"
            time.sleep(0.05)
        yield mesh


@contextmanager
def mesh_of(
    folder: Path, hosts: int, root: Path, envs: dict[str, str] | None = None
) -> Iterator[Mesh]:
    user = Keys.new()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(
                agent(folder / f"agent-{rank}", "--root", str(root), user=user, envs=envs)
            )
            for rank in range(hosts)
        ]
        yield stack.enter_context(connected_to(record_of(agents), user))


def request_of(checkpoint: Path, **keys: Any) -> GenerateRequest:
    fields = {"height": 32, "width": 48, "steps": 3, "dtype": "float32", **keys}
    return GenerateRequest("two dogs", seed=5, model=str(checkpoint), **fields)


def pictures(job_events: list[events.Event]) -> list[np.ndarray]:
    by_image = {
        event.image: event.pixels for event in job_events if isinstance(event, events.Picture)
    }
    return [by_image[k] for k in sorted(by_image)]


def counters(mesh: Mesh) -> list[messages.EngineCounters]:
    statuses = list(mesh.status().values())
    assert all(isinstance(status, messages.Status) for status in statuses), statuses
    return [status.counters for status in statuses if isinstance(status, messages.Status)]


def test_every_placement_gives_the_pictures_of_one_host(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_apart(monkeypatch)  # on one device, one host is as fast as two
    request = request_of(checkpoint, n_images=3)
    alone = painted_alone(request)
    with mesh_of(tmp_path, 2, checkpoint, SLOW) as mesh:
        for placement in ("sequence", "tensor"):
            job_events = list(mesh.generate(request, placement))
            for a, b in zip(alone, pictures(job_events), strict=True):
                assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
            made = {event.placement for event in job_events if isinstance(event, events.Picture)}
            assert made == {placement}
        assert [counted.steps for counted in counters(mesh)] == [18, 18]
        generations = {
            status.ring_generation
            for status in mesh.status().values()
            if isinstance(status, messages.Status)
        }
        assert generations == {1}  # one ring served both
        # Both have loaded now, and are slow: neither can have done it all before the other began.
        before = [counted.images for counted in counters(mesh)]
        shared = pictures(list(mesh.generate(request, "data")))
        assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))
        after = [counted.images for counted in counters(mesh)]
        assert sorted(b - a for a, b in zip(before, after, strict=True)) == [1, 2]


@pytest.mark.parametrize(
    ("placement", "number", "cache"),
    [
        ("data", signal.SIGSTOP, 0.0),
        ("sequence", signal.SIGSTOP, 0.0),
        ("tensor", signal.SIGKILL, 0.0),
        ("sequence", signal.SIGKILL, 0.85),
    ],
)
def test_an_engine_that_dies_or_hangs_costs_seconds_and_no_step(
    checkpoint: Path,
    tmp_path: Path,
    placement: Placement,
    number: signal.Signals,
    cache: float,
) -> None:
    request = request_of(checkpoint, n_images=2, steps=8, cache=cache)
    alone = painted_alone(request)
    with mesh_of(tmp_path / "whole", 1, checkpoint) as mesh:
        by_one = list(mesh.generate(request))
    with mesh_of(tmp_path, 2, checkpoint, SLOW) as mesh:
        job_events: list[events.Event] = []
        struck = 0.0
        # Behind the step that is waited for a host has 2.4 s of work at least.
        for event in mesh.generate(request, placement):
            job_events.append(event)
            if isinstance(event, events.Step) and event.step == 2 and not struck:
                struck = time.monotonic()
                status = mesh.status()[event.host or 0]
                assert isinstance(status, messages.Status) and status.engine_pid
                os.kill(status.engine_pid, number)
        took = time.monotonic() - struck
        for a, b in zip(alone, pictures(job_events), strict=True):
            assert np.abs(a.astype(int) - b.astype(int)).max() <= (0 if placement == "data" else 1)
        steps = [(e.image, e.step) for e in job_events if isinstance(e, events.Step)]
        assert len(steps) == len(set(steps)) == 16
        reused = [
            {(e.image, e.step) for e in t if isinstance(e, events.Step) and e.reused}
            for t in (by_one, job_events)
        ]
        assert reused[0] == reused[1] and bool(reused[0]) is bool(cache)
        assert any(isinstance(event, events.HostLost) for event in job_events)
        assert took < 100


def test_the_command_line_uses_the_mesh_that_is_up(
    fluxmesh: Run,
    home: Path,
    checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, user = tmp_path_factory.mktemp("agents"), Keys.new()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(agent(folder / str(k), "--root", str(checkpoint), user=user))
            for k in range(2)
        ]
        own = Home(private_folder(home / "mesh"))
        store_keys(own.folder, "client", user)
        records.save(record_of(agents), own)
        command = ("generate", "dogs", "--model", checkpoint, "--image-size", "32x48", "-v")
        done = fluxmesh(*command, "--placement", "tensor", "--seed", "1", "-o", "a.png")
        assert done.code == 0, done.err
        assert "Plan: tensor on hosts 0, 1" in done.err
        assert "was predicted" in done.err
        assert read_recipe(tmp_path / "a.png").placement == "tensor"
        refused = fluxmesh(*command, "--placement", "data", "--force-shard")
        assert refused.code == 2 and "exclude each other" in refused.err
        assert all(member.process.poll() is None for member in agents)


def test_a_checkpoint_that_is_replaced_is_read_anew_and_never_mixed(tmp_path: Path) -> None:
    """Host 0 has read the model when its folder is replaced; host 1 read what was there then."""
    folder = tmp_path / "model"
    first = make_checkpoint(folder, seed=1).path
    other = make_checkpoint(tmp_path / "newer", seed=2).path
    user = Keys.new()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(agent(tmp_path / str(k), "--root", str(folder), user=user))
            for k in range(2)
        ]
        with connected_to(record_of(agents[:1]), user) as alone:
            (old,) = pictures(list(alone.generate(request_of(first))))
        folder.rename(tmp_path / "older")
        other.rename(folder)
        with connected_to(record_of(agents[1:]), user) as alone:
            (new,) = pictures(list(alone.generate(request_of(first))))
        mesh = stack.enter_context(connected_to(record_of(agents), user))
        (both,) = pictures(list(mesh.generate(request_of(first), "tensor")))
        assert np.abs(both.astype(int) - new.astype(int)).max() <= 1
        assert np.abs(both.astype(int) - old.astype(int)).max() > 10
        statuses = {k: v for k, v in mesh.status().items() if isinstance(v, messages.Status)}
        assert not diagnosis.in_memory(statuses)
