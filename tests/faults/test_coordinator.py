"""SIGKILL and Ctrl-C of a coordinator, a `fluxmesh generate` process, at every moment of its job.

Killed: the next one finds the mesh free within ten seconds, paints the same pictures, and leaves
nothing unfinished. Interrupted: it ends with exit code 130 within a step, and the mesh is as warm
as it was.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.events import Event, Planned
from tests.faults import commands, strike
from tests.faults.conftest import Grounds
from tests.faults.mesh import Up, paint
from tests.faults.strike import LOAD, STEP, allowed, difference, heal, request_of
from tests.slowness import slowdown

FREE = 10.0  # seconds in which a mesh forgets a coordinator that was killed
LETTING_GO = 1.5  # seconds in which a command may end, beside the step that is under way
PLACEMENTS: tuple[Placement, ...] = ("data", "tensor", "sequence")
CASES = [
    pytest.param(family, placement, moment, id=f"{family}-{moment}-{placement}")
    for family in strike.MODEL_FAMILIES
    for placement in PLACEMENTS
    for moment in strike.MOMENTS
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("family", "placement", "moment"), CASES)
def test_the_successor_of_a_coordinator_that_was_killed_finds_the_mesh_free(
    grounds: Grounds,
    tmp_path: Path,
    family: strike.ModelFamily,
    placement: Placement,
    moment: strike.Moment,
) -> None:
    ground = grounds.of(2, family)
    up = ground.up
    with up.connect() as mesh:
        heal(up, mesh, placement, cold=moment == "load")
    with commands.generate(up, tmp_path / "out", placement) as command:
        command.until(moment)
        command.end(signal.SIGKILL)
        killed, slow = time.monotonic(), slowdown()
        free: list[float] = []

        def look(event: Event) -> None:
            if isinstance(event, Planned) and not free:
                free.append(time.monotonic() - killed)

        with up.connect() as mesh:
            outcome = paint(mesh, request_of(up.model), placement, look)
        assert outcome.error is None, outcome.error
        assert len(outcome.pictures) == 2
        assert free[0] <= FREE * max(slow, slowdown())
        assert difference(ground.alone, outcome.pictures) <= allowed(placement)
        whole = pictures(command)
        assert all(np.array_equal(whole[k], ground.alone[k]) for k in whole)

    with commands.generate(up, tmp_path / "out", placement) as successor:
        assert list(successor.lines())[-1]["event"] == "done"
        assert successor.unfinished() == []
        assert len(successor.pictures()) == len(whole) + 2


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "placement", "moment"),
    [
        *CASES,
        *(pytest.param("flux1", "data", name, id=name) for name in ("start", "planned")),
    ],
)
def test_ctrl_c_ends_a_command_within_a_step_and_leaves_the_mesh_warm(
    grounds: Grounds,
    tmp_path: Path,
    family: strike.ModelFamily,
    placement: Placement,
    moment: str,
) -> None:
    up = grounds.of(2, family).up
    is_cold = moment == "load"
    with up.connect() as mesh:
        heal(up, mesh, placement, cold=is_cold)
    before = held(up)
    with commands.generate(up, tmp_path / "out", placement) as command:
        slow = slowdown()
        command.until(moment)
        took = command.end(signal.SIGINT)
        assert command.process.returncode == 130
        # To save is to sync a file, and then its folder, on a disk that takes a second for each.
        longest = {"load": LOAD, "decode": strike.DECODE, "save": 2.0 + strike.DECODE}
        slow = max(slow, slowdown())
        assert took <= max(STEP, longest.get(moment, 0.0)) + LETTING_GO * slow
        assert command.unfinished() == []
        for path in command.pictures():
            Image.open(path).verify()
    if not is_cold:
        assert held(up) == before
    with up.connect() as mesh:
        for rank in range(2):
            assert up.status(mesh, rank).holder == ""


def held(up: Up) -> list[tuple[Any, ...]]:
    """Each host's processes, and what they hold."""
    with up.connect() as mesh:
        statuses = [up.status(mesh, rank) for rank in range(len(up.ports))]
    return [
        (status.pid, status.engine_pid, status.holds and status.holds.weights)
        for status in statuses
    ]


def pictures(command: commands.Command) -> dict[int, np.ndarray]:
    """The files of a command, by image; each is whole."""
    by_image = {}
    for path in command.pictures():
        with Image.open(path) as picture:
            by_image[int(path.name.split(".")[1])] = np.array(picture)
    return by_image
