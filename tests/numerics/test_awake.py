"""Long work without a mesh keeps a Mac awake too: training, fetching, quantizing, fusing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.training.local_executor import train
from fluxmesh.weights.quantize import quantize_checkpoint
from tests.checkpoints import make_checkpoint
from tests.mac import Mac, mac, until
from tests.numerics.loading import resolved
from tests.trainings import asked, make_place


@pytest.fixture
def a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mac:
    made = mac(tmp_path / "mac", monkeypatch)
    made.caffeinate()
    return made


def test_a_training_in_one_process(tmp_path: Path, a_mac: Mac) -> None:
    request = asked(make_place(tmp_path / "place"), tmp_path / "out")
    with closing(train(request)) as events:
        next(events)
        until(a_mac.is_awake)
        next(events)
    assert not a_mac.is_awake()
    assert len(a_mac.caffeinated()) == 1


def test_quantizing_a_model(tmp_path: Path, a_mac: Mac) -> None:
    source = resolved(make_checkpoint(tmp_path / "source"))
    quantize_checkpoint(source, tmp_path / "q", 4, lambda done, total: until(a_mac.is_awake))
    assert not a_mac.is_awake() and len(a_mac.caffeinated()) == 1


def test_fusing_a_model(tmp_path: Path, a_mac: Mac) -> None:
    source = resolved(make_checkpoint(tmp_path / "source"))
    fuse_checkpoint(source, tmp_path / "f", (), lambda done, total: until(a_mac.is_awake))
    assert not a_mac.is_awake() and len(a_mac.caffeinated()) == 1
