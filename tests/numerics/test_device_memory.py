"""How far MLX runs ahead, on every platform, and what an engine gives back when it idles."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES
from fluxmesh.engine import device_memory
from fluxmesh.engine.worker import Worker
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import AutoencoderConfig
from fluxmesh.planning import activations
from fluxmesh.planning.workload import Workload
from fluxmesh.request import SourceImage
from fluxmesh.wire import messages
from fluxmesh.wire.messages import AskStatus, Decode, EncodeSource, Measure
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.stream import Channel
from fluxmesh_agent import engine
from tests.checkpoints import make_checkpoint
from tests.numerics.units import only, painting
from tests.unit.meshes import FLUX, ask

PLATFORMS = ("metal", "cuda", "cpu")
HEAD: dict[str, Any] = {"fence": 1, "job": "job", "ring_generation": 0}
GB = 10**9


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ModelVariant:
    return ModelVariant(str(make_checkpoint(tmp_path_factory.mktemp("model")).path), "float32")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every limit that MLX is given."""
    given: list[int] = []
    own = mx.set_memory_limit

    def watch(limit: int) -> int:
        given.append(limit)
        return own(limit)

    monkeypatch.setattr(mx, "set_memory_limit", watch)
    yield given


def on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the module believe that MLX computes with `platform`."""
    monkeypatch.setattr(device_memory, "device", lambda: platform)


def test_a_decode_that_is_held_back_takes_half_the_memory_and_gives_the_same_bits() -> None:
    """Not held back it takes 37 of its largest arrays on a CPU, of which a convolution's own are
    nine."""
    made = AutoEncoder(AutoencoderConfig(widths=(32, 64, 64, 64), num_res_blocks=2))
    z = mx.random.normal((1, 8, 8, made.config.z_channels), key=mx.random.key(1))
    mx.eval(made.parameters(), z)
    largest = 64 * 64 * 64 * 4

    def peak() -> tuple[float, np.ndarray]:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        picture = np.array(made.decode(z))
        return (mx.get_peak_memory() - before) / largest, picture

    free, picture = peak()
    with device_memory.bounded(4 * largest):
        held, same = peak()
    assert held < 18 and held < 0.6 * free
    assert np.array_equal(picture, same)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_unit_that_computes_pixels_or_steps_is_held_back(
    weights: ModelVariant, limits: list[int], platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(platform, monkeypatch)
    before, worker = mx.get_memory_limit(), Worker()
    paint = painting(worker, weights)
    assert limits == [], "T5's activations are small"
    monkeypatch.setattr(device_memory, "memory_of_device", lambda: 10 * GB)
    for_steps = activations.denoising_room(0, platform, False, 10 * GB)
    for_pixels = activations.decoding_room(0, platform, False)
    units: list[tuple[messages.Work, list[float]]] = [
        (
            EncodeSource(**HEAD, weights=weights, pixels=np.zeros((32, 48, 3), np.uint8)),
            [for_pixels],
        ),
        (paint, [for_steps]),
        (
            Decode(**HEAD, weights=weights, images=(0,), height=32, width=48, latents=paint.noise),
            [for_pixels],
        ),
        # It begins with a trial picture.
        (Measure(**HEAD, weights=weights, height=32, width=48), [for_steps, for_pixels] * 2),
    ]
    for unit, rooms in units:
        limits.clear()
        list(worker.do(unit))
        held = [limit - mx.get_active_memory() for limit in limits if limit != before]
        assert held == pytest.approx(rooms, abs=0.02 * GB), unit
        assert mx.get_memory_limit() == before


@pytest.mark.parametrize(
    ("platform", "graphs", "is_paced"),
    [("cuda", "0", True), ("cuda", "1", False), ("cuda", None, False), ("cpu", "0", False)],
)
def test_a_picture_is_computed_block_by_block_where_only_operations_are_counted(
    weights: ModelVariant,
    monkeypatch: pytest.MonkeyPatch,
    platform: Any,
    graphs: str | None,
    is_paced: bool,
) -> None:
    """Thirty of a large picture's are gigabytes (`rendezvous.engine_envs`)."""

    def pixels() -> np.ndarray:
        worker = Worker()
        noise = painting(worker, weights).noise
        unit = Decode(**HEAD, weights=weights, images=(0,), height=32, width=48, latents=noise)
        begun.clear()
        return only(worker, unit, messages.Pictured)[0].pixels

    begun: list[mx.array] = []
    commit = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *x: (begun.extend(x), commit(*x))[1])
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
    expected = pixels()
    assert begun == []
    on(platform, monkeypatch)
    if graphs is not None:
        monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", graphs)
    assert np.array_equal(pixels(), expected)
    assert (len(begun) > 3) is is_paced  # each level has several blocks


@pytest.mark.parametrize(
    ("platform", "free", "cap", "how", "room"),
    [
        ("cuda", 80, 80, {}, 6),
        ("cuda", 80, 80, {"is_quantized": True}, 3),
        ("cuda", 80, 80, {"scarce": True}, 1.5),
        ("cuda", 80, 10, {}, 3),  # what the engine may use counts
        ("cuda", 10, 80, {}, 3),
        ("metal", 80, 80, {}, 1.5),
    ],
)
def test_twice_as_much_waits_where_there_is_plenty(
    platform: Any,
    free: int,
    cap: int,
    how: dict[str, bool],
    room: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(platform, monkeypatch)
    monkeypatch.setattr(device_memory, "memory_of_device", lambda: free * GB)
    before = mx.set_memory_limit(cap * GB)
    try:
        given = {"scarce": False, "is_quantized": False, **how}
        assert device_memory.denoising_room(3072, 16, mx.bfloat16, **given) == room * 1e9
    finally:
        mx.set_memory_limit(before)


def test_the_limit_stays_within_what_was_allowed_and_what_the_device_may_use(
    limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mx.set_memory_limit(3 * GB)  # an engine's own cap
    try:
        with device_memory.bounded(8 * GB):
            assert mx.get_memory_limit() == 3 * GB
        monkeypatch.setattr(device_memory, "memory_of_device", lambda: 2 * GB)
        with device_memory.bounded(8 * GB):
            assert mx.get_memory_limit() == 2 * GB
        with device_memory.bounded(0.1 * GB):
            assert mx.get_memory_limit() == pytest.approx(mx.get_active_memory() + 0.1 * GB, abs=9)
        assert mx.get_memory_limit() == 3 * GB
    finally:
        mx.set_memory_limit(before)


@pytest.mark.parametrize("largest", [int(0.1 * GB), int(0.5 * GB), int(2 * GB)])
def test_what_may_wait_on_metal_and_one_convolution_are_what_is_planned(largest: int) -> None:
    waits = activations.decoding_room(largest, "metal", False)
    convolution = (1 + activations.WINOGRAD) * largest  # its output, and its own
    assert waits + convolution <= activations.decoding_bytes(largest, "metal") + 0.25 * GB
    assert waits == activations.decoding_room(largest, "metal", True)


@pytest.mark.parametrize("side", [1536, 2048, 4096])
def test_a_decode_may_take_what_is_planned_also_where_it_goes_in_tiles(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload.of(ask(height=side, width=side, low_memory=True), FLUX)
    for platform in ("metal", "cpu"):
        on(platform, monkeypatch)
        waits = device_memory.decoding_room(FLUX.architecture, side, side, mx.bfloat16, True)
        planned = work.memory("data", 1, 1, platform).decode - work.autoencoder_bytes
        assert waits <= planned


def test_an_encode_may_take_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a picture whose decode would go in tiles."""
    side = 4096
    source = SourceImage(np.zeros((side, side, 3), np.uint8))
    work = Workload.of(ask(height=side, width=side, low_memory=True, source=source), FLUX)
    for platform in ("metal", "cpu"):
        on(platform, monkeypatch)
        waits = device_memory.encoding_room(FLUX.architecture, side * side, mx.bfloat16, True)
        planned = work.encoding_memory(1, platform) - work.autoencoder_bytes
        # A CPU's convolutions are float32, and hold their input nine times beside what waits.
        assert planned / (3 if platform == "metal" else 8) < waits <= planned


def test_a_mac_may_use_what_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    device_info = {"memory_size": 16 << 30, "max_recommended_working_set_size": 11 * GB}
    monkeypatch.setattr(mx, "device_info", lambda: device_info)
    assert device_memory.memory_of_device() == 11 * GB
    assert engine.device().memory_bytes == 11 * GB
    assert engine.device(limit=4 * GB).memory_bytes == 4 * GB


@pytest.mark.parametrize(
    ("platform", "memory_bytes", "limit"),
    [("metal", 48 << 30, 2 << 30), ("metal", 8 << 30, 1 << 30), ("cuda", 80 << 30, None)],
)
def test_metals_cache_is_bounded_but_not_a_trainings(
    platform: str, memory_bytes: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    on(platform, monkeypatch)
    monkeypatch.setattr(device_memory, "memory_of_device", lambda: memory_bytes)
    monkeypatch.setattr(mx, "set_cache_limit", given.append)
    device_memory.bound_cache()
    device_memory.free_cache()
    assert given == ([] if limit is None else [limit, memory_bytes])


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[engine.Engine]:
    """An engine whose agent says nothing."""
    near, far = socket.socketpair()
    config = engine.Config(0, str(tmp_path), str(tmp_path), None, [], None)
    yield engine.Engine(config, Channel(near), replace(DEADLINES, engine_idle=0.05))
    near.close()
    far.close()


def cached() -> int:
    """Has MLX keep a megabyte of freed memory; how much it then keeps."""
    x = mx.ones((1 << 18,))
    mx.eval(x)
    del x
    return mx.get_cache_memory()


def test_an_idle_engine_gives_its_cache_back_and_one_at_work_keeps_it(
    idle: engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached() >= 1 << 20
    idle._line.put(AskStatus())
    assert isinstance(idle._next(), AskStatus)
    assert mx.get_cache_memory() >= 1 << 20, "work was waiting: the next unit takes what this freed"

    given_back = threading.Event()
    own = device_memory.give_back
    monkeypatch.setattr(device_memory, "give_back", lambda: (own(), given_back.set()))
    threading.Thread(target=lambda: (given_back.wait(60), idle._line.put(AskStatus()))).start()
    idle._next()
    assert given_back.is_set() and mx.get_cache_memory() == 0


def test_an_engine_bounds_its_cache_before_its_first_unit(
    idle: engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    on("metal", monkeypatch)
    monkeypatch.setattr(mx, "set_cache_limit", given.append)
    for thread in ("_read", "_beat"):  # they would end this process with the agent
        monkeypatch.setattr(idle, thread, lambda: None)

    def closed() -> None:
        raise ConnectionClosed("the agent is gone")

    monkeypatch.setattr(idle, "_next", closed)
    with pytest.raises(ConnectionClosed):
        idle.run()
    assert len(given) == 1 and 0 < given[0] <= device_memory.CACHE_BYTES


def test_a_cuda_gpus_memory_is_its_own_and_stays_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    on("cuda", monkeypatch)
    held = cached()
    device_memory.give_back()
    assert mx.get_cache_memory() == held
    on("metal", monkeypatch)
    device_memory.give_back()
    assert mx.get_cache_memory() == 0
