"""`make gpu`: a step that is replayed is the one that is described, to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.peers import Fluxmesh
from benchmarks.placements import spread
from benchmarks.sizes import SMALL_TRANSFORMERS
from fluxmesh.engine.replay import Replayed, replayed
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph
from fluxmesh.sampling.denoise import denoise


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", ["dev", "klein-4b"])
def test_a_replayed_step_is_the_described_one_to_the_bit(
    model: str, dtype: str, bits: int | None, placement: str
) -> None:
    ours = Fluxmesh if model == "dev" else FluxmeshKlein
    peer = ours(SMALL_TRANSFORMERS[model], dtype, bits, low_memory=False)
    whole, latents = peer.flow, []
    for is_replayed in (False, True):
        ranks = Ranks(mx.distributed.init(), waiting=InGraph())  # a group of one
        peer.flow = spread(placement, whole, ranks)
        if is_replayed:
            peer.flow = replayed(peer.flow, ranks)
            assert isinstance(peer.flow, Replayed)
        noise, plan = peer.planned(64, 64, 3, 16)
        for step in denoise(peer.flow, plan.prepared(peer.flow), noise):
            mx.eval(step.x)
        latents.append(np.array(step.x))
    assert np.isfinite(latents[0]).all() and np.array_equal(*latents)
