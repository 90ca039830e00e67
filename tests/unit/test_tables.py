"""What `status` shows of one host: what its engine holds now, and not what it is to hold."""

from __future__ import annotations

import dataclasses
import random

import pytest

from fluxmesh.cluster.snapshot import Holding, ModelVariant
from fluxmesh.wire.messages import Reading, Status
from fluxmesh_coordinator.console.tables import holds
from tests.messages import sample

WHOLE = Holding(weights=ModelVariant("dev"), nbytes=24 * 10**9)
SHARD = Holding(weights=ModelVariant("dev", "bfloat16", 4), nbytes=2 * 10**9, shards=4, shard=1)


def status(**fields: object) -> Status:
    sampled: Status = sample(Status, random.Random(1))
    return dataclasses.replace(sampled, **{"holds": None, "loading": None, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "nothing"),
        ({"holds": WHOLE}, "dev bfloat16"),
        ({"holds": SHARD}, "dev 4-bit, shard 2 of 4"),
        ({"loading": Reading("transformer", 3_210_000_000, 23_800_000_000)},
         "transformer, 3.2 of 23.8 GB"),
        ({"holds": WHOLE, "loading": Reading("text encoders", 10**9, 9_500_000_000)},
         "text encoders, 1.0 of 9.5 GB"),
    ],
)  # fmt: skip
def test_a_host_tells_what_it_holds_now(fields: dict[str, object], text: str) -> None:
    assert holds(status(**fields)) == text
