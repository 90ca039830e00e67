"""Metal's watchdog on a CPU: what ends a GPU's command buffer that waits for 5 s.

A process that calls `watch` computes on a stream of its own, as on a GPU, while collectives run on
another, as they do beside Metal. MLX decides alike on both where one waits for the other: a graph
that computes with a result which is still on its way makes its stream wait. A thread puts a small
sum in line there again and again; one that takes too long was behind something that waited. The
process then fails at its next evaluation, in the words of Metal.

What it can't show: the length of a kernel of one's own, for small models have none that is long.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph, OnHost

LIMIT = 5.0  # seconds that Metal lets a command buffer wait
LOOKS = 0.05  # seconds between two looks
TEXT = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)


class Watchdog:
    """Looks after the stream that this process computes on."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self.longest = 0.0  # seconds that something waited
        self.collectives = mx.new_stream(mx.cpu)  # what carries them
        self._gpu = mx.new_thread_unsafe_stream(mx.cpu)
        self._begun: float | None = None  # when the look at hand began
        mx.set_default_stream(self._gpu)
        for name in ("eval", "async_eval"):
            setattr(mx, name, self._checked(getattr(mx, name)))
        threading.Thread(target=self._look, daemon=True).start()

    @property
    def is_angry(self) -> bool:
        return self.longest > self.limit

    def check(self) -> None:
        """Raises what MLX does where a command buffer was ended."""
        if self._begun is not None:
            self.longest = max(self.longest, time.monotonic() - self._begun)
        if self.is_angry:
            raise RuntimeError(TEXT)

    def _checked(self, evaluate: Callable[..., None]) -> Callable[..., None]:
        if evaluate.__name__ == "eval":
            self._evaluate = evaluate

        @functools.wraps(evaluate)
        def checked(*arrays: Any) -> None:
            evaluate(*arrays)
            self.check()

        return checked

    def _look(self) -> None:
        number = mx.array(1.0)
        while True:
            time.sleep(LOOKS)
            self._begun = time.monotonic()
            self._evaluate(mx.add(number, number, stream=self._gpu))
            self.longest = max(self.longest, time.monotonic() - self._begun)
            self._begun = None


@contextmanager
def late(call: int, seconds: float) -> Iterator[None]:
    """Inside, this process comes late to its collective number `call`, counted from 1."""
    made = 0

    def delayed(collective: Callable[..., mx.array]) -> Callable[..., mx.array]:
        @functools.wraps(collective)
        def called(*arguments: Any, **options: Any) -> mx.array:
            nonlocal made
            made += 1
            if made == call:
                time.sleep(seconds)
            return collective(*arguments, **options)

        return called

    collectives = {name: getattr(mx.distributed, name) for name in ("all_sum", "all_gather")}
    for name, collective in collectives.items():
        setattr(mx.distributed, name, delayed(collective))
    try:
        yield
        assert made >= call, f"only {made} collectives were called"
    finally:
        for name, collective in collectives.items():
            setattr(mx.distributed, name, collective)


@dataclass(frozen=True)
class Metal:
    """What an engine is to take its machine for: one with this watchdog, and what happens there.

    The last rank of its ring comes `seconds` late to collective `call` of its life.
    """

    road: str  # how collectives are waited for: by the "host", or by the "graph"
    call: int
    seconds: float

    def envs(self, paths: str) -> dict[str, str]:
        """What makes an engine do so; `paths` is its PYTHONPATH."""
        here = Path(__file__).parent / "metal"  # its `sitecustomize` calls `emulate`
        text = json.dumps([self.road, self.call, self.seconds])
        return {"PYTHONPATH": f"{here}{os.pathsep}{paths}", "EMULATED_METAL": text}

    def emulate(self) -> None:
        """From here on; the engine has done nothing yet."""
        watchdog, stack = Watchdog(), ExitStack()
        waiting = {"host": OnHost, "graph": InGraph}[self.road]

        def join(backend: str = "ring") -> Ranks:
            group = mx.distributed.init(strict=True, backend=backend)
            ranks = Ranks(group, watchdog.collectives, waiting())
            if ranks.rank == ranks.size - 1:
                stack.enter_context(late(self.call, self.seconds))
            return ranks

        Ranks.join = join  # type: ignore[method-assign]
