"""A placement's transformer that is replayed: it computes what the one that is described does."""

from __future__ import annotations

import gc
import io
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.placements import spread
from benchmarks.sizes import SMALL_TRANSFORMERS
from fluxmesh.engine import replay
from fluxmesh.engine.replay import KEPT, Replayed, replayed
from fluxmesh.kernels.ops import has_kernels
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.double_stream import watching
from fluxmesh.models.step_cache import StepCache
from fluxmesh.models.waiting import InGraph, OnHost
from fluxmesh.sampling.denoise import denoise
from tests.parallel.cases import ODD, SHALLOW, ParallelCase, flow_of, noise_of, plan_of, quantizable
from tests.parallel.ring import run_ranks

pytestmark = pytest.mark.skipif(
    mx.default_device() == mx.Device(mx.cpu) and shutil.which("g++") is None,
    reason="MLX compiles what it traces with g++ on a CPU, which is not installed",
)
SMALL = {"config": SHALLOW, "text_tokens": 3, "size": (4, 6)}
CASES = {
    case.name: case
    for case in (
        ParallelCase("odd", "sequence"),
        ParallelCase("small", "sequence", **SMALL),
        ParallelCase("quantized", "sequence", config=quantizable(2), bits=4),
        ParallelCase("filled", "sequence", replace(ODD, in_channels=16 + 16 + 64)),
        ParallelCase("guided twice", "sequence", **SMALL, cfg=3.0),
    )
}


class Counted:
    """A transformer that counts its calls."""

    def __init__(self, flow: Any) -> None:
        self._flow, self.calls = flow, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def __call__(self, *arguments: Any) -> mx.array:
        self.calls += 1
        velocity: mx.array = self._flow(*arguments)
        return velocity


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replay, "device", lambda: "cuda")
    monkeypatch.setattr(replay, "has_kernels", lambda *_: True)  # of models of any width
    yield


def lone() -> Ranks:
    return Ranks(mx.distributed.init(), waiting=InGraph())


def painted(flow: Any, case: ParallelCase, image: int = 0) -> np.ndarray:
    for step in denoise(flow, plan_of(case, flow), noise_of(case, image)):
        mx.eval(step.x)
    return np.array(step.x)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_replayed_is_what_is_described(name: str, placement: str) -> None:
    case = replace(CASES[name], placement=placement)
    plain, ranks = lone(), lone()
    expected = [painted(flow_of(case, plain), case, image) for image in range(2)]
    counted = Counted(flow_of(case, ranks))
    flow = replayed(counted, ranks)
    for image, latents in enumerate(expected):
        assert np.allclose(painted(flow, case, image), latents, rtol=1e-5, atol=1e-5)
    assert counted.calls == 1  # of two images and all steps; cfg's two texts are of one length
    assert ranks.traffic == plain.traffic and plain.traffic.bytes == 0
    assert max(plain.traffic.sums, plain.traffic.gathers) > 2


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("model", ["klein-4b", "klein-9b-kv"])
def test_flux2_and_the_keys_of_its_references_are_replayed(
    model: str, references: int, placement: str
) -> None:
    peer = FluxmeshKlein(SMALL_TRANSFORMERS[model], "float32", None, low_memory=False)
    peer.references, peer.keeps_references = references, model == "klein-9b-kv"
    whole, latents = peer.flow, []
    for is_replayed in (False, True):
        ranks = lone()
        peer.flow = spread(placement, whole, ranks)
        if is_replayed:
            peer.flow = replayed(peer.flow, ranks)
            assert isinstance(peer.flow, Replayed)
        noise, plan = peer.planned(64, 64, 3, 16)
        for step in denoise(peer.flow, plan.prepared(peer.flow), noise):
            mx.eval(step.x)
        latents.append(np.array(step.x))
    assert latents[0].std() > 0.3
    assert np.allclose(*latents, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cuda")
def test_whoever_watches_is_told_at_every_call() -> None:
    case, ranks = CASES["small"], lone()
    flow = replayed(flow_of(case, ranks), ranks)
    plan, noise = plan_of(case, flow), noise_of(case)
    for step in range(2):
        with watching() as halves:
            velocity = plan.velocity(flow, noise, step)
        assert [half.shape for half in halves] == [(1, 9, SHALLOW.hidden_size)]
        mx.eval(halves)
        assert mx.isfinite(velocity).all() and mx.abs(halves[0]).max() > 0


def test_ranks_that_compute_two_replayed_calls_in_other_orders_swap_no_data(
    tmp_path: Path,
) -> None:
    """Collectives have no tag: each call waits for the one described before it."""
    first, second = (
        np.load(out.with_suffix(".npz")) for out in run_ranks(2, [], tmp_path, 120.0, "replaying")
    )
    assert set(first) == {"sequence", "tensor"}
    for placement, velocities in first.items():
        assert velocities.std() > 0.1 and np.array_equal(velocities, second[placement])
        alone = flow_of(CASES["small"])
        plan = plan_of(CASES["small"], alone)
        for step, velocity in enumerate(velocities):
            expected = plan.velocity(alone, noise_of(CASES["small"]), step)
            assert np.allclose(velocity, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cuda")
def test_a_trace_leaves_with_its_transformer() -> None:
    case, ranks = CASES["small"], lone()
    whole = flow_of(case, ranks)
    flow = replayed(whole, ranks)
    painted(flow, case)
    weight = weakref.ref(whole.flux.single_blocks[0].linear2)
    gc.collect()
    gc.disable()
    try:
        del whole, flow
        assert weight() is None  # at once: gigabytes can't wait for a collection
    finally:
        gc.enable()


@pytest.mark.usefixtures("on_cuda")
def test_a_few_shapes_are_kept() -> None:
    case, ranks = CASES["small"], lone()
    counted = Counted(flow_of(case, ranks))
    flow = replayed(counted, ranks)
    sizes = [replace(case, text_tokens=tokens, steps=2) for tokens in range(1, KEPT + 2)]
    for shape in sizes:
        painted(flow, shape)
    assert counted.calls == len(sizes)
    painted(flow, sizes[0])  # has left, for it was used longest ago
    assert counted.calls == len(sizes) + 1
    painted(flow, sizes[2])  # the next to leave, but for being used now
    painted(flow, sizes[1])
    painted(flow, sizes[2])
    assert counted.calls == len(sizes) + 2


@pytest.mark.usefixtures("on_cuda")
def test_a_description_that_fails_leaves_the_ring_as_it_was() -> None:
    case, ranks = CASES["small"], lone()
    counted = Counted(flow_of(case, ranks))
    flow = replayed(counted, ranks)
    expected = painted(flow, case)
    before = ranks.mark()
    plan = plan_of(case, flow)
    with pytest.raises(ValueError, match="shape|match|dimension"):
        flow(noise_of(case)[..., :3], plan.text, plan.pe, plan.modulations.at(0))
    assert ranks.mark() == before
    assert np.array_equal(painted(flow, case), expected)


@pytest.mark.usefixtures("on_cuda")
def test_what_a_trace_would_change_is_not_replayed() -> None:
    case, ranks = CASES["small"], lone()
    half = flow_of(replace(case, dtype="float16"), ranks)
    assert replayed(half, ranks) is half  # its plain forms would be joined, and round otherwise
    beside, fused = (
        flow_of(replace(case, adapter=adapter), ranks) for adapter in ("beside", "fused")
    )
    assert replayed(beside, ranks) is beside  # as would an adapter's scale and sum
    assert replayed(fused, ranks) is not fused
    waits = Ranks(mx.distributed.init(), waiting=OnHost())
    flow = flow_of(case, waits)
    assert replayed(flow, waits) is flow  # the host computes as it describes
    cached = replace(case, steps=6)
    counted = Counted(flow_of(cached, ranks))
    flow = replayed(counted, ranks)
    walk = denoise(
        flow, plan_of(cached, flow), noise_of(cached), caches=[StepCache(0.7, ranks.gather)]
    )
    for step in walk:
        mx.eval(step.x)
    assert counted.calls == 6  # a cache looks at each


def test_nothing_is_replayed_elsewhere_than_on_cuda() -> None:
    case, ranks = CASES["small"], lone()
    flow = flow_of(case, ranks)
    assert replayed(flow, ranks) is flow


@pytest.mark.usefixtures("on_cuda")
def test_a_replay_makes_no_part_of_the_weights_anew() -> None:
    case = ParallelCase("plain", "sequence", config=quantizable(2), bits=4)
    dots = []
    for is_replayed in (False, True):
        ranks = lone()
        flow = flow_of(case, ranks)
        if is_replayed:
            flow = replayed(flow, ranks)
        plan = plan_of(case, flow)
        mx.eval(plan.velocity(flow, noise_of(case), 0))
        dot = io.StringIO()
        mx.export_to_dot(dot, plan.velocity(flow, noise_of(case), 1))
        dots.append(dot.getvalue())
    described, again = (dot.count('"Slice"') for dot in dots)
    assert 0 < again <= described


@pytest.mark.parametrize(
    ("head_dim", "widths", "is_ours"),
    [(128, (3072, 12288), True), (16, (64,), True), (6, (72,), False), (128, (3070,), False)],
)
def test_models_of_odd_widths_are_not_replayed(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, widths: tuple[int, ...], is_ours: bool
) -> None:
    assert has_kernels(head_dim, *widths) is is_ours
    monkeypatch.setattr(replay, "device", lambda: "cuda")
    ranks = lone()
    flow = flow_of(CASES["odd"], ranks)  # heads of 6 channels
    assert replayed(flow, ranks) is flow
