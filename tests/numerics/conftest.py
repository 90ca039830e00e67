"""What computes with MLX in the tests' own process."""

from __future__ import annotations

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.worker import Worker
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import checkpoint

__all__ = ["checkpoint"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ModelVariant:
    made = make_checkpoint(tmp_path_factory.mktemp("model"), guidance=True)
    return ModelVariant(str(made.path), "float32")


@pytest.fixture
def worker() -> Worker:
    return Worker()
