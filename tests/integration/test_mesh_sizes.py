"""The signature promise on real agents and rings: one picture, whatever the mesh and the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh import Mesh, events
from fluxmesh.cluster.snapshot import Placement
from fluxmesh.request import GenerateRequest
from fluxmesh.storage.keys import Keys
from fluxmesh_coordinator.jobs.generation.images import ImageTable
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import TWELVE_HEADS, Kind, make_flux2
from tests.integration.agents import agent, as_if_apart
from tests.integration.test_mesh import connected_to, counters, pictures, record_of
from tests.parallel.cases import ODD, ON_DISK

# 12 heads divide by 2, 3 and 4; the tokens, with text of 16, by none of them.
SHAPES = {
    "shallow": (ON_DISK, (32, 48)),
    "deeper": (
        replace(ODD, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32),
        (48, 80),
    ),
}
IMAGES, STEPS = 3, 2
SLOW = {"FLUXMESH_DELAYS": "step=0.2"}  # else the first is done before the others have begun


@contextmanager
def meshes(
    folder: Path, root: Path, sizes: tuple[int, ...], envs: Mapping[str, str] = SLOW
) -> Iterator[dict[int, Mesh]]:
    """Meshes of the first so many of the same agents."""
    user = Keys.new()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(agent(folder / str(k), "--root", str(root), user=user, envs=envs))
            for k in range(max(sizes))
        ]
        whole = record_of(agents)
        yield {n: stack.enter_context(connected_to(whole.only(range(n)), user)) for n in sizes}


class Latents:
    """The latents of every image after its last step, as the coordinator was given them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: dict[int, np.ndarray] = {}
        acknowledge = ImageTable.acknowledge

        def spy(
            images: ImageTable, index: int, step: int, latents: np.ndarray, *rest: Any, **more: Any
        ) -> bool:
            if step == images.steps:
                self.last[index] = np.array(latents)
            return acknowledge(images, index, step, latents, *rest, **more)

        monkeypatch.setattr(ImageTable, "acknowledge", spy)

    def take(self) -> np.ndarray:
        taken = np.concatenate([self.last[k] for k in sorted(self.last)])
        self.last = {}
        return taken


def learn_nothing(runner: JobRunner) -> None:
    """What a job measured is not kept."""


def make(shape: str, folder: Path) -> Path:
    """A checkpoint of a shape of FLUX.1, or of a kind of FLUX.2."""
    if shape in SHAPES:
        return make_checkpoint(folder, seed=11, transformer=SHAPES[shape][0]).path
    kind: Kind = "dev" if shape == "FLUX.2 dev" else "klein"
    return make_flux2(folder, kind, seed=11, transformer=TWELVE_HEADS)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [("deeper", (2, 4)), ("shallow", (3,)), ("FLUX.2 dev", (2,)), ("FLUX.2 klein", (3, 4))],
)
def test_one_to_four_hosts_give_one_picture(
    shape: str, sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = SHAPES[shape][1] if shape in SHAPES else (48, 80)
    model = make(shape, tmp_path / "model")
    request = GenerateRequest(
        "two dogs", 5, str(model), IMAGES, height, width, STEPS, dtype="float32"
    )
    latents = Latents(monkeypatch)
    as_if_apart(monkeypatch)
    # Plans that learn how unequal processes of one machine are would leave some of them out.
    monkeypatch.setattr(JobRunner, "_learn", learn_nothing)

    def paint(mesh: Mesh, placement: Placement) -> tuple[list[np.ndarray], np.ndarray]:
        job_events = list(mesh.generate(request, placement))
        painted = [event for event in job_events if isinstance(event, events.Picture)]
        assert {event.placement for event in painted} == {placement}
        return pictures(job_events), latents.take()

    with meshes(tmp_path, tmp_path, (1, *sizes)) as mesh:
        alone, exact = paint(mesh[1], "data")
        assert len(alone) == IMAGES and np.ptp(alone[0]) > 50  # a picture, not one grey
        for hosts in sizes:
            for placement in ("sequence", "tensor"):
                before = counters(mesh[hosts])
                spread, near = paint(mesh[hosts], placement)
                error = np.linalg.norm(near - exact) / np.linalg.norm(exact)
                assert error <= 1e-5, (placement, hosts, error)
                for a, b in zip(alone, spread, strict=True):
                    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
                if placement == "tensor":  # in the ring of `sequence`, so by the same engines
                    pairs = list(zip(before, counters(mesh[hosts]), strict=True))
                    assert [b.steps - a.steps for a, b in pairs] == [IMAGES * STEPS] * hosts
                    assert len({b.sent_bytes - a.sent_bytes for a, b in pairs}) == 1
                    assert all(b.sent_bytes > a.sent_bytes for a, b in pairs)
            # All have loaded now, and are slow: none can have done it all before others began.
            before = counters(mesh[hosts])
            shared, same = paint(mesh[hosts], "data")
            assert [a.tobytes() for a in alone] == [b.tobytes() for b in shared]
            assert exact.tobytes() == same.tobytes()
            after = counters(mesh[hosts])
            done = [b.images - a.images for a, b in zip(before, after, strict=True)]
            assert sum(done) == IMAGES and sum(count > 0 for count in done) >= 2
