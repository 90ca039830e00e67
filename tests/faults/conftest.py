"""Which faults run: all with `--faults all` (`make faults`), else a sample drawn by a seed.

A test says by `@pytest.mark.sample(n)` how many of its cases on two hosts belong to a sample; one
without the mark is for `make faults` alone. The tests of a session share meshes, one at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.cluster.snapshot import Placement
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.faults import mesh, strike

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=("sample", "all"), default="sample")
    group.addoption("--faults-seed", type=int, default=1, help="which sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sample(n): so many cases belong to a sample of faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("faults", "sample") == "all":
        return
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if HERE in item.path.parents:
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    left_out: set[pytest.Item] = set()
    for (path, name), group in cases.items():
        mark = group[0].get_closest_marker("sample")
        draw = random.Random(f"{config.getoption('faults_seed', 1)} {path.name} {name}")
        small = [item for item in group if _hosts(item) == 2]
        drawn = draw.sample(small, mark.args[0]) if mark else []
        left_out |= set(group) - set(drawn)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))


def _hosts(item: pytest.Item) -> int:
    """Of the mesh that a case needs."""
    case = getattr(item, "callspec", None)
    return 2 if case is None else int(case.params.get("hosts", 2))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return strike.make_model(tmp_path_factory.mktemp("model"))


@dataclass
class Field:
    """A mesh that is up, what its pictures are, and how long they take when nobody is hurt."""

    up: mesh.Up
    alone: dict[int, np.ndarray]
    _seconds: dict[tuple[str, bool], float] = field(default_factory=dict)

    def seconds(self, held: Mesh, placement: Placement, *, cold: bool) -> float:
        """Of a job that nobody hurts, on a warm mesh or one whose engines are dead."""
        if (placement, cold) not in self._seconds:
            request = strike.request_for(self.up.model, placement, len(self.up.ports))
            strike.heal(self.up, held, placement, cold=cold)
            self._seconds[placement, cold] = mesh.paint(held, request, placement).seconds
        return self._seconds[placement, cold]


class Grounds:
    """Meshes with slow engines, one at a time: another size takes the place of what is up."""

    def __init__(self, folders: pytest.TempPathFactory, model: str) -> None:
        self.model = model
        self._folders = folders
        self._pictures = strike.alone(strike.request_of(model, n_images=3))
        self._stack = ExitStack()
        self._up: Field | None = None

    def of(self, hosts: int) -> Field:
        if self._up is None or len(self._up.up.ports) != hosts:
            self.close()
            folder = self._folders.mktemp("mesh")
            up = self._stack.enter_context(mesh.up(folder, hosts, self.model, delays=strike.DELAYS))
            self._up = Field(up, self._pictures)
        return self._up

    def close(self) -> None:
        self._up = None
        self._stack.close()


@pytest.fixture(scope="session")
def grounds(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grounds]:
    grounds = Grounds(tmp_path_factory, model)
    yield grounds
    grounds.close()
