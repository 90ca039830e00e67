"""Which faults run: all with `--faults all` (`make faults`), else a sample drawn by a seed.

A test says by `@pytest.mark.sample(n)` how many of its cases on two hosts belong to a sample, of
FLUX.1, and by `flux2=m` how many of FLUX.2; one without the mark is for `make faults` alone.
`--family` leaves the others out. The tests of a session share meshes, one at a time.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh.cluster.snapshot import Placement
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.faults import mesh, strike

HERE = Path(__file__).parent
PATIENCE = 600  # seconds for one that says nothing else: a mesh comes up, and jobs run, in its time


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=("sample", "all"), default="sample")
    group.addoption("--faults-seed", type=int, default=1, help="which sample")
    group.addoption("--family", choices=strike.MODEL_FAMILIES, help="models of this family alone")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sample(n): so many cases belong to a sample of faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE))
    if asked := config.getoption("family", None):
        faults = [item for item in items if HERE in item.path.parents]
        _leave_out(config, items, {item for item in faults if _family(item) != asked})
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
        left_out |= set(group)
        for family, count in _wanted(mark).items():
            small = [item for item in group if (_hosts(item), _family(item)) == (2, family)]
            left_out -= set(draw.sample(small, min(count, len(small))))
    _leave_out(config, items, left_out)


def _wanted(mark: pytest.Mark | None) -> dict[strike.ModelFamily, int]:
    """How many cases of each family belong to a sample."""
    if mark is None:
        return {}
    return {"flux1": mark.args[0], "flux2": mark.kwargs.get("flux2", 0)}


def _leave_out(config: pytest.Config, items: list[pytest.Item], others: set[pytest.Item]) -> None:
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=sorted(others, key=lambda item: item.nodeid))


def _hosts(item: pytest.Item) -> int:
    """Of the mesh that a case needs."""
    return int(_parameter(item, "hosts", 2))


def _family(item: pytest.Item) -> strike.ModelFamily:
    """Of the model that a case needs."""
    family: strike.ModelFamily = _parameter(item, "family", "flux1")
    return family


def _parameter(item: pytest.Item, name: str, otherwise: Any) -> Any:
    case = getattr(item, "callspec", None)
    return otherwise if case is None else case.params.get(name, otherwise)


ModelOf = Callable[[strike.ModelFamily], str]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """A checkpoint of a family, made when it is first asked for."""

    @functools.cache
    def make(family: strike.ModelFamily) -> str:
        return strike.make_model(tmp_path_factory.mktemp(family) / "model", family)

    return make


@pytest.fixture(scope="session")
def model(model_of: ModelOf) -> str:
    return model_of("flux1")


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
    """Meshes with slow engines, one at a time: another size or model takes the place of it."""

    def __init__(self, folders: pytest.TempPathFactory, model_of: ModelOf) -> None:
        self._folders, self._model_of = folders, model_of
        self._stack = ExitStack()
        self._up: Field | None = None

    def of(self, hosts: int, family: strike.ModelFamily = "flux1") -> Field:
        model = self._model_of(family)
        if self._up is None or (len(self._up.up.ports), self._up.up.model) != (hosts, model):
            self.close()
            folder = self._folders.mktemp("mesh")
            up = self._stack.enter_context(mesh.up(folder, hosts, model, delays=strike.DELAYS))
            # A text of FLUX.2 is 512 tokens: no more pictures than a job here has.
            alone = strike.alone(strike.request_of(model, n_images=max(hosts, 2)))
            self._up = Field(up, alone)
        return self._up

    def close(self) -> None:
        self._up = None
        self._stack.close()


@pytest.fixture(scope="session")
def grounds(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grounds]:
    grounds = Grounds(tmp_path_factory, model_of)
    yield grounds
    grounds.close()
