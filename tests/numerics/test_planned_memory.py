"""What a plan says of memory, held to what an engine took, as MLX counts it; on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from fluxmesh.models.flux1.conditions import kontext
from tests.memory_cases import CASES, MemoryCase, make_models, peaks

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU lets as much wait as it has room for"
)
# placement, hosts, shards, low memory
ALONE = ("data", 1, 1, False)
OTHERS = [
    ("data", 1, 1, True),
    ("sequence", 2, 1, False),
    ("tensor", 2, 1, False),
    ("tensor", 2, 2, False),
    ("tensor", 3, 3, True),
]
CHECKS = [(case, ALONE) for case in CASES]
CHECKS += [(case, OTHERS[k % len(OTHERS)]) for k, case in enumerate(CASES[::2])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.mark.parametrize(("case", "how"), CHECKS, ids=lambda value: getattr(value, "name", ""))
def test_no_phase_takes_more_than_the_plan_says(
    case: MemoryCase,
    how: tuple[Any, int, int, bool],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement, hosts, shards, low = how
    if "bits" in case.asked and placement == "tensor":  # 192 columns are three groups
        hosts, shards = 3, 3 if shards > 1 else 1
    monkeypatch.setattr(kontext, "SIZES", ((64, 96), (96, 64)))  # in the place of a megapixel
    taken = peaks(case, models, placement, hosts, shards, low_memory=low)
    assert {"denoise", "decode"} <= taken.keys()
    for phase, (measured, planned) in taken.items():
        assert 0.6 * planned <= measured <= 1.1 * planned, (phase, measured, planned)
