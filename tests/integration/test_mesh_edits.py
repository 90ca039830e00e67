"""Pictures from references on real agents and rings: one picture on any mesh, and after a death."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh import Mesh, events
from fluxmesh.cluster.snapshot import Placement
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.models.flux2.files.folder import KV_PIPELINE
from fluxmesh.request import GenerateRequest
from fluxmesh.wire import messages
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import TWELVE_HEADS, make_flux2
from tests.integration.agents import as_if_apart
from tests.integration.test_mesh import counters, pictures
from tests.integration.test_mesh_sizes import SHAPES, Latents, learn_nothing, meshes
from tests.redux_checkpoint import make_redux

IMAGES, STEPS = 2, 2


def make(kind: str, folder: Path) -> Path:
    """A checkpoint that takes references."""
    if kind == "Kontext":
        path = make_checkpoint(folder, seed=11, transformer=SHAPES["shallow"][0]).path
        return _called(path, "FluxKontextPipeline")
    if kind == "Redux":
        return make_checkpoint(folder, seed=11, transformer=SHAPES["shallow"][0]).path
    path = make_flux2(folder, "klein", seed=11, transformer=TWELVE_HEADS)
    return _called(path, KV_PIPELINE) if kind == "klein KV" else path


def _called(folder: Path, pipeline: str) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    return folder


def with_redux(folder: Path) -> dict[str, Any]:
    """What a request says more that reads two references with Redux."""
    how = {"redux": str(make_redux(folder, seed=11)), "reference_strengths": (0.9, 0.4)}
    return {**how, "height": 64, "width": 96}


def request_of(model: Path, references: int, **keys: Any) -> GenerateRequest:
    """An edit whose pictures are of odd sizes, and whose output has that of the first."""
    rng = np.random.default_rng(3)
    sizes = ((70, 101), (90, 64))[:references]
    given = tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    fields = {"n_images": IMAGES, "steps": STEPS, "dtype": "float32", **keys}
    return GenerateRequest("two dogs", 5, str(model), references=given, **fields)


@pytest.mark.parametrize(
    ("kind", "sizes", "references"),
    [("klein", (3,), 2), ("klein KV", (2,), 2), ("Kontext", (2,), 1), ("Redux", (3,), 2)],
)
def test_one_to_three_hosts_make_one_edit(
    kind: str,
    sizes: tuple[int, ...],
    references: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kontext, "SIZES", ((96, 64), (64, 64)))
    more = with_redux(tmp_path / "redux") if kind == "Redux" else {}
    request = request_of(make(kind, tmp_path / "model"), references, **more)
    latents = Latents(monkeypatch)
    as_if_apart(monkeypatch)
    monkeypatch.setattr(JobRunner, "_learn", learn_nothing)

    def paint(mesh: Mesh, placement: Placement) -> tuple[list[np.ndarray], np.ndarray]:
        before = sum(counted.pictures for counted in counters(mesh))
        job_events = list(mesh.generate(request, placement))
        painted = [event for event in job_events if isinstance(event, events.Picture)]
        assert {event.placement for event in painted} == {placement}
        encoded = sum(counted.pictures for counted in counters(mesh)) - before
        assert encoded == references or placement != "tensor"  # where no engine began anew
        return pictures(job_events), latents.take()

    with meshes(tmp_path, tmp_path, (1, *sizes)) as mesh:
        alone, exact = paint(mesh[1], "data")
        assert [picture.shape for picture in alone] == [(64, 96, 3)] * IMAGES
        assert np.ptp(alone[0]) > 50
        for hosts in sizes:
            shared, same = paint(mesh[hosts], "data")
            assert [a.tobytes() for a in alone] == [b.tobytes() for b in shared]
            assert exact.tobytes() == same.tobytes()
            for placement in ("sequence", "tensor"):
                spread, near = paint(mesh[hosts], placement)
                error = np.linalg.norm(near - exact) / np.linalg.norm(exact)
                assert error <= 1e-5, (placement, hosts, error)
                for a, b in zip(alone, spread, strict=True):
                    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "placement", "moment"),
    [
        ("klein", "data", "encoding"),
        ("klein", "sequence", "step 1"),
        ("Redux", "data", "encoding"),
        ("Redux", "tensor", "step 1"),
    ],
)
def test_an_engine_that_dies_costs_no_reference_and_no_step(
    kind: str,
    placement: Placement,
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it encodes the references, or in the middle of the first image."""
    as_if_apart(monkeypatch)
    more = with_redux(tmp_path / "redux") if kind == "Redux" else {}
    request = request_of(make(kind, tmp_path / "model"), 2, **more)
    # Long enough for this process to come and kill it, however busy the machine is.
    slow = {"FLUXMESH_DELAYS": "encode=3" if moment == "encoding" else "step=1"}
    struck: list[int] = []

    def strike(mesh: Mesh, rank: int) -> None:
        status = mesh.status()[rank]
        assert isinstance(status, messages.Status) and status.engine_pid
        os.kill(status.engine_pid, signal.SIGKILL)
        struck.append(rank)

    with meshes(tmp_path, tmp_path, (1, 2), slow) as mesh:
        alone = pictures(list(mesh[1].generate(request, "data")))
        seen: list[events.Event] = []
        for event in mesh[2].generate(request, placement):
            seen.append(event)
            if moment == "encoding" and isinstance(event, events.Encoded) and not struck:
                assert not _has_stepped(seen)
                later = threading.Timer(0.4, strike, (mesh[2], 0))  # the pictures come next
                later.start()
            if moment == "step 1" and isinstance(event, events.Step) and not struck:
                strike(mesh[2], 0)
        deadline = time.monotonic() + 60
        while not struck and time.monotonic() < deadline:
            time.sleep(0.05)
        assert struck
        assert any(isinstance(event, events.HostLost) for event in seen)
        steps = [(e.image, e.step) for e in seen if isinstance(e, events.Step)]
        assert len(steps) == len(set(steps)) == IMAGES * STEPS
        for a, b in zip(alone, pictures(seen), strict=True):
            assert np.abs(a.astype(int) - b.astype(int)).max() <= (0 if placement == "data" else 1)


def _has_stepped(seen: list[events.Event]) -> bool:
    return any(isinstance(event, events.Step) for event in seen)
