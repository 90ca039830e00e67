"""Real engines whose backends fail in every way that JACCL was seen to: the picture comes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fluxmesh import Mesh, events
from fluxmesh.cluster.backends import BackendFault
from fluxmesh.deadlines import DEADLINES
from fluxmesh.storage.keys import Keys
from fluxmesh.wire.transport.dialer import CurveDialer
from fluxmesh_coordinator.jobs.generation.dispatch import GenerationDispatch
from tests.alone import painted_alone
from tests.false_backends import BEGIN, FalseBackends
from tests.integration.agents import agent
from tests.integration.conftest import FinishedProcess
from tests.integration.test_mesh import pictures, record_of, request_of
from tests.integration.test_mesh_commands import MeshMachine, machine
from tests.paths import ROOT

__all__ = ["machine"]  # a fixture

PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "agent", "coordinator"))
MIDDLE = 12  # collectives of `sequence`: in the second step


@contextmanager
def false_mesh(
    folder: Path, root: Path, backend: str, faults: dict[str, tuple[str, int]], kept: list[object]
) -> Iterator[Mesh]:
    """Two hosts with a cable; `kept` hears what would be written down."""
    user, envs = Keys.new(), FalseBackends(faults).envs(PATHS)
    with ExitStack() as stack:
        agents = [
            stack.enter_context(
                agent(folder / f"agent-{rank}", "--root", str(root), user=user, envs=envs)
            )
            for rank in range(2)
        ]
        record = record_of(agents)
        hosts = json.loads(record.text)
        for rank, host in enumerate(hosts):
            host["rdma"] = [None if other == rank else "rdma_en5" for other in range(2)]
        text = json.dumps({"backend": backend, "hosts": hosts})

        soon = replace(DEADLINES, first_sign=20.0)  # a new engine that hangs is found sooner
        mesh = Mesh(
            replace(record, text=text), lambda: CurveDialer(user), keep=kept.extend, deadlines=soon
        )
        yield stack.enter_context(mesh)


# How the first backends fail, and over what the picture is finished.
@pytest.mark.parametrize(
    ("faults", "changes"),
    [
        ({"jaccl": ("error", BEGIN), "jaccl-ring": ("segfault", BEGIN)}, ["jaccl-ring", "ring"]),
        ({"jaccl": ("hang", BEGIN)}, ["jaccl-ring"]),
        ({"jaccl": ("hang", MIDDLE)}, ["jaccl-ring"]),
        ({"jaccl": ("segfault", MIDDLE)}, ["jaccl-ring"]),
        ({"nccl": ("segfault", BEGIN)}, ["ring"]),
    ],
    ids=["does not form", "hangs in init", "hangs in a step", "dies twice", "nccl"],
)
def test_a_job_goes_on_over_the_next_backend(
    checkpoint: Path,
    tmp_path: Path,
    faults: dict[str, tuple[str, int]],
    changes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The collectives that are counted are those of steps.
    monkeypatch.setattr(GenerationDispatch, "_measure_ring", lambda dispatch: True)
    request = request_of(checkpoint, steps=4)
    (alone,) = painted_alone(request)
    kept: list[object] = []
    with false_mesh(tmp_path, checkpoint, next(iter(faults)), faults, kept) as mesh:
        heard = list(mesh.generate(request, "sequence"))
        again = list(mesh.generate(request, "sequence"))
        rings = {host.ring.backend for host in mesh.view.hosts}
    changed = [event for event in heard if isinstance(event, events.BackendChanged)]
    assert [event.after for event in changed] == changes
    for painted in (heard, again):
        (picture,) = pictures(painted)
        assert np.abs(picture.astype(int) - alone.astype(int)).max() <= 1
        steps = [event.step for event in painted if isinstance(event, events.Step)]
        assert steps == [1, 2, 3, 4]  # none that was acknowledged is made again
    assert rings == {changes[-1]}
    # The second job begins where the first one ended, in its ring.
    assert not any(isinstance(event, events.BackendChanged) for event in again)
    loaded = {event.component for event in again if isinstance(event, events.Loading)}
    assert "transformer" not in loaded
    known = [fault for fault in kept if isinstance(fault, BackendFault) and fault.is_out]
    assert [fault.backend for fault in known] == [event.before for event in changed]
    assert {fault.ranks for fault in known} == {(0, 1)} and all(fault.when for fault in known)


def test_up_tries_backends_in_turn_and_the_next_up_begins_anew(machine: MeshMachine) -> None:
    """Host 1 has no `ips`, as mlx.distributed_config writes it for jaccl: it is reached all the
    same."""
    faults = {"jaccl": ("error", BEGIN), "jaccl-ring": ("segfault", BEGIN)}
    machine.env |= FalseBackends(faults).envs(PATHS)
    path = machine.hostfile(2)
    hosts = json.loads(path.read_text())
    for rank, host in enumerate(hosts):
        host["rdma"] = [None if other == rank else "rdma_en5" for other in range(2)]
    hosts[1]["ips"] = []
    path.write_text(json.dumps({"backend": "jaccl", "hosts": hosts}))

    def told(done: FinishedProcess) -> list[str]:
        notes = [line["text"] for line in done.of("note")]
        return [note for note in notes if "jaccl" in note]

    fell = told(machine.up(path, "--no-warm"))
    assert len(fell) == 2 and "errno 60" in fell[0] and "signal 11" in fell[1], fell
    assert [" go on over jaccl-ring " in fell[0], " go on over ring " in fell[1]] == [True, True]
    (status,) = machine("status", "--json").of("status")
    assert [fault["backend"] for fault in status["backend_faults"]] == ["jaccl", "jaccl-ring"]
    assert {host["ring_backend"] for host in status["hosts"]} == {"ring"}
    assert "go on over ring until the next" in machine("status").out.replace("\n", " ")

    checks = machine("doctor", "--json").of("check")
    assert [check["level"] for check in checks if check["check"] == "backend"] == ["warn"]

    asked = ("generate", "a red apple", "--model", machine.model, "--json")
    done = machine(*asked, "--placement", "sequence")
    assert done.code == 0 and len(done.of("picture")) == 1, done.err
    assert done.of("backendchanged") == []  # it is known
    assert [plan["placement"] for plan in done.of("planned")] == ["sequence"]

    again = told(machine.up(path, "--no-warm"))  # with the same agents, and their ring
    assert again[0].startswith("jaccl is tried again on hosts 0, 1, where it had failed: ")
    assert again[1].startswith("jaccl-ring is tried again on hosts 0, 1, where it had failed: ")
    assert [" go on over " in note for note in again] == [False, False, True, True]
