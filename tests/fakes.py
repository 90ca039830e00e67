"""Engines and agents that count instead of painting: for tests of whoever gives them work.

`FakeEngine` is pure: a unit of work goes in, the reports of a real engine come out, and the
latents after a step depend on what they were before it and on nothing else, so that a picture
shows whether each of its steps was made exactly once and in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fluxmesh import messages
from fluxmesh.cluster import Holding
from fluxmesh.flux.noise import initial_noise
from fluxmesh.planning.work import ModelSizes
from fluxmesh.request import GenerateRequest

GB = 10**9
STATUS = messages.Status(
    state="idle",
    epoch=0,
    pid=1,
    engine_pid=None,
    name="fake",
    kind="fake device",
    device="",
    mlx_version="0",
    python_version="3",
    memory_bytes=100 * GB,
    free_bytes=100 * GB,
    load_rate=1e9,
    flops_per_second=1e12,
    clock=0.0,
    holds=None,
    measured=(),
    counters=messages.Counters(),
    holder="",
    job="",
    waiting=0,
)


def one_step(latents: np.ndarray, step: int) -> np.ndarray:
    """The latents after step `step` (from 1): float32, of the same shape."""
    return (latents * np.float32(0.5) + np.float32(step)).astype(np.float32)


def developed(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """One image's picture, uint8 [height, width, 3]."""
    shade = int(abs(float(latents.mean())) * 1000) % 256
    picture = np.full((height, width, 3), shade, np.uint8)
    picture[0, 0] = int(abs(float(latents.flat[0])) * 1000) % 256
    return picture


def expected(request: GenerateRequest, sizes: ModelSizes, image: int) -> np.ndarray:
    """The picture that image `image` must be, whoever paints it."""
    height = request.height or sizes.defaults.height
    width = request.width or sizes.defaults.width
    ae = sizes.autoencoder
    seed = request.seed_of(image)
    latents = initial_noise(seed, height, width, ae.z_channels, ae.downsampling)
    for step in range(1, (request.steps or sizes.defaults.steps) + 1):
        latents = one_step(latents, step)
    return developed(latents, height, width)


class FakeEngine:
    """Does units of work at once; remembers what it did."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1  # in its ring
        self.steps: list[tuple[int, int]] = []  # (image, step) that it made
        self.holding: Holding | None = None
        self.counters = messages.Counters()

    def work(self, unit: messages.Work | messages.Join) -> Iterator[messages.Report]:
        """Its reports, one a `next`."""
        match unit:
            case messages.Join():
                self.rank, self.size = unit.rank, unit.size
                yield messages.Joined(unit.epoch, unit.rank)
            case messages.Load():
                for component in unit.components:
                    yield messages.Progress(unit.job, unit.epoch, component, 0, 8)
                    yield messages.Progress(unit.job, unit.epoch, component, 8, 8)
                self.holding = Holding(unit.weights, GB, unit.shards, unit.shard)
                yield messages.Loaded(unit.job, unit.epoch, self.holding, 0.1)
            case messages.Encode():
                self._count(encodes=1)
                t5, clip = np.zeros((1, 4, 8), np.uint16), np.zeros((1, 8), np.uint16)
                yield messages.Encoded(unit.job, unit.epoch, 0.1, False, 3, t5, clip)
            case messages.EncodeSource():
                yield messages.SourceEncoded(unit.job, unit.epoch, np.zeros((1, 4, 16), np.float32))
            case messages.Paint():
                yield from self._paint(unit)
            case messages.Decode():
                for place, image in enumerate(unit.images):
                    self._count(decodes=1)
                    latents = unit.latents[place : place + 1]
                    pixels = developed(latents, unit.height, unit.width)
                    yield messages.Pictured(unit.job, unit.epoch, image, 0.1, 5, pixels)

    def _paint(self, unit: messages.Paint) -> Iterator[messages.Report]:
        latents = unit.latents
        for step in range(unit.first + 1, unit.steps + 1):
            latents = one_step(latents, step)
            self.steps.append((unit.image, step))
            self._count(steps=1, images=int(step == unit.steps))
            told = latents if self.rank == 0 else None
            yield messages.Stepped(unit.job, unit.epoch, unit.image, step, 0.1, 4, told)

    def _count(self, **more: int) -> None:
        for name, value in more.items():
            now = getattr(self.counters, name) + value
            self.counters = dataclasses.replace(self.counters, **{name: now})
