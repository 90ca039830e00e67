"""The embedded checkpoint, trained by the command line on meshes of 1, 2 and 3: the same bytes.

`tests/integration/test_mesh_training.py` has the short runs of a small model; this is the long one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fluxmesh.training import checkpoint
from tests.datasets import make_dataset
from tests.faults import mesh

UPDATES = 20
ACCUMULATED = 8


def arguments(folder: Path, out: Path, dtype: str) -> list[str]:
    """Dropout of both kinds and crops on; pictures of two shapes, one of them held out."""
    options: dict[str, object] = {
        "model": "tiny",
        "seed": 5,
        "dtype": dtype,
        "iterations": UPDATES * ACCUMULATED,
        "grad-accumulate": ACCUMULATED,
        "resolution": "64x64",
        "num-augmentations": 3,
        "lora-rank": 4,
        "lora-dropout": 0.1,
        "caption-dropout": 0.2,
        "warmup-steps": 3,
        "learning-rate": 1e-3,
        "validation": 1,
        "ema": 0.9,
        "checkpoint-every": 40,
        "output-dir": out,
        "cache-dir": folder / "cache",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["train", str(folder / "data"), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    make_dataset(folder / "data", sizes=((64, 64), (80, 48), (64, 64), (48, 80)))
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_20_updates_are_the_same_bytes_on_1_2_and_3_hosts(
    folder: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "LIMIT", 1200.0)
    adapters, losses = {}, {}
    for hosts in (1, 2, 3):
        out = tmp_path / f"out-{hosts}"
        with mesh.up(tmp_path / str(hosts), hosts, dtype=dtype) as up:
            done = up.fluxmesh(*arguments(folder, out, dtype))
            with up.connect() as held:
                steps = [up.status(held, rank).counters.steps for rank in range(hosts)]
        assert steps == [UPDATES] * hosts, "every host makes every update"
        sentences = re.findall(rf"{UPDATES} updates of {ACCUMULATED} images[^\n]*", done.stderr)
        assert sentences, done.stderr
        print(f"{dtype}, {hosts} hosts: {sentences[0]}")
        adapters[hosts] = (out / checkpoint.FINAL).read_bytes()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[hosts] = [line["loss"] for line in lines if "loss" in line]
    assert adapters[1] == adapters[2] == adapters[3]
    assert losses[1] == losses[2] == losses[3] and len(losses[1]) >= UPDATES
