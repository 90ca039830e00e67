"""A mesh that is up is warm, and after an engine's death it becomes so again by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fluxmesh.events import Event, Loading, Step
from fluxmesh_agent.kernels import VARIABLE
from fluxmesh_coordinator.agents.launch import start_ephemeral
from fluxmesh_coordinator.agents.status import survey
from tests.faults.mesh import LIMIT, Up, paint, up
from tests.faults.strike import make_model, request_of
from tests.integration.test_mesh_commands import MeshMachine, machine

__all__ = ["machine"]  # a fixture

SOON = 120.0  # seconds in which every host holds its weights again


def test_the_first_request_after_up_loads_nothing(machine: MeshMachine) -> None:
    path = machine.hostfile(2)
    bare = machine.up(path, "--no-warm")
    assert bare.of("warmed") == []
    for host in bare.of("up")[0]["hosts"]:
        assert host["components"] == ["transformer", "autoencoder"]
    timed = [set(map(size_of, host["compiled"])) for host in bare.of("up")[0]["hosts"]]
    assert timed == [{(32, 32)}, set()]  # one device is timed once

    done = machine.up(path, "--warm", "32x32,32x48")
    assert [
        (entry["placement"], entry["height"], entry["width"]) for entry in done.of("warmed")
    ] == [
        ("data", 32, 32),
        ("data", 32, 48),
    ]
    assert {line["what"] for line in done.of("progress")} == {"text encoders"}
    hosts = done.of("up")[0]["hosts"]
    assert sorted("text encoders" in host["components"] for host in hosts) == [False, True]
    assert [set(map(size_of, host["compiled"])) for host in hosts] == [{(32, 32), (32, 48)}] * 2
    assert {host["counters"]["images"] for host in hosts} == {0}  # nobody asked for these

    asked = ("generate", "a red apple", "--model", machine.model, "--json", "-n", 2)
    first = machine(*asked)
    assert first.code == 0 and len(first.of("picture")) == 2, first.err
    assert first.of("loading") == []
    known = machine("status").out
    assert known.count("bfloat16") == 2 and "nothing" not in known

    asked = machine(*asked[:-2], "--image-size", "48x48")
    assert asked.code == 0, asked.err
    wait(machine.hosts, lambda host: (48, 48) in map(size_of, host["compiled"]))
    made = [entry for host in machine.hosts() for entry in host["compiled"]]
    kinds = {(entry["model"], entry["dtype"], entry["bits"]) for entry in made}
    assert kinds == {(str(machine.model), "bfloat16", None)}
    assert {(entry["placement"], entry["hosts"]) for entry in made} == {("data", 1)}


def test_sizes_that_no_picture_has_are_refused(machine: MeshMachine) -> None:
    for size in ("40x32", "0x32", "big", "32x32,"):
        done = machine("up", "--model", machine.model, "--warm", size)
        assert done.code == 2 and size.split(",")[-1] in done.err, done.err
    both = machine("up", "--model", machine.model, "--warm", "32x32", "--no-warm")
    assert both.code == 2 and "exclude each other" in both.err


def test_engines_of_a_mesh_keep_their_kernels_and_one_for_a_call_does_not(
    machine: MeshMachine,
) -> None:
    (host,) = machine.up(machine.hostfile(1)).of("up")[0]["hosts"]
    (folder,) = (machine.folder / "fluxmesh_state").glob("agent-*/kernels/*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert psutil.Process(host["engine_pid"]).environ()[VARIABLE] == str(folder)
    with start_ephemeral() as agent:
        answers = survey(agent.record, agent.keys)
        assert answers.statuses[0].engine_pid is not None
        assert not (Path(agent.record.members[0].state) / "kernels").exists()


def test_hosts_that_a_broken_ring_left_behind_hold_their_weights_again(tmp_path: Path) -> None:
    """One whose engine is killed twice is left out by its job, and loads beside it."""
    model = make_model(tmp_path / "model")
    with up(tmp_path / "mesh", 3, model, delays="step=0.4", options=()) as mesh_up:
        with mesh_up.connect() as mesh:
            kills: list[int] = []
            seen: list[tuple[int, bool, str]] = []

            def hurt(event: Event) -> None:
                if not isinstance(event, Step):
                    return
                if event.step in (2, 4) and len(kills) < event.step // 2:
                    kills.append(mesh_up.pid("engine", 2))
                    os.kill(kills[-1], signal.SIGKILL)
                elif event.step > 6:
                    status = mesh_up.status(mesh, 2)
                    seen.append((event.step, status.holds is not None, status.job))

            # Of 24 s, in which an engine starts and loads beside it.
            request = request_of(model, steps=60, n_images=1)
            outcome = paint(mesh, request, "sequence", hurt)
            assert outcome.error is None and len(kills) == 2
            assert [plan.hosts for plan in outcome.planned] == [(0, 1, 2), (0, 1, 2), (0, 1)]
            assert len(outcome.steps) == len(set(outcome.steps)) == 60
            # Beside the job, which goes on without it and has let it go.
            assert any(holds and not job for _, holds, job in seen), seen
        wait(lambda: hosts_of(mesh_up), lambda host: is_whole(host) and host["ring_size"] == 1)
        with mesh_up.connect() as mesh:
            loads: list[Event] = []

            def look(event: Event) -> None:
                loads.extend([event] if isinstance(event, Loading) else [])

            request = request_of(model, steps=2, n_images=1)
            outcome = paint(mesh, request, "sequence", look)
            assert [plan.hosts for plan in outcome.planned] == [(0, 1, 2)]
            assert outcome.error is None and loads == []


def test_what_dies_while_nobody_asks_is_there_again_soon(tmp_path: Path) -> None:
    with up(tmp_path / "mesh", 3, make_model(tmp_path / "model")) as mesh_up:
        before = hosts_of(mesh_up)
        assert all(map(is_whole, before))
        killed = before[1]["engine_pid"]
        os.kill(killed, signal.SIGKILL)
        wait(lambda: hosts_of(mesh_up)[1:2], lambda host: host["engine_pid"] != killed)
        wait(lambda: hosts_of(mesh_up), is_whole)
        after = hosts_of(mesh_up)
        assert after[1]["engine_pid"] not in (None, killed)
        assert [host["pid"] for host in after] == [host["pid"] for host in before]


def size_of(shape: dict[str, Any]) -> tuple[int, int]:
    return shape["height"], shape["width"]


def hosts_of(mesh_up: Up) -> list[dict[str, Any]]:
    hosts: list[dict[str, Any]] = json.loads(mesh_up.fluxmesh("status", "--json").stdout)["hosts"]
    return hosts


def is_whole(host: dict[str, Any]) -> bool:
    """Whether it holds what `up` had it hold, and nothing is under way."""
    has_both = {"transformer", "autoencoder"} <= set(host["components"])
    return bool(host["state"] == "ready" and host["holds"] and has_both)


def wait(look: Callable[[], list[dict[str, Any]]], is_so: Callable[[dict[str, Any]], bool]) -> None:
    """Until it is so of all hosts."""
    end = time.monotonic() + min(SOON, LIMIT)
    while not all(map(is_so, hosts := look())):
        assert time.monotonic() < end, hosts
        time.sleep(0.2)
