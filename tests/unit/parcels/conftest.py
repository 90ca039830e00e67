"""For the tests of parcels: a host that has a model, and one that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.parcels.pushes import ModelDisk


@pytest.fixture
def source(tmp_path: Path) -> ModelDisk:
    return ModelDisk(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> ModelDisk:
    return ModelDisk(tmp_path / "target", {})
