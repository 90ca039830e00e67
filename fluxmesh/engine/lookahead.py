"""Walks an image's steps, evaluating each, and hides the time that it takes to describe the next.

Building the graph of a step takes the host 5 to 15 ms, in which a fast GPU would idle: here it is
done while the device computes the step before. Between `denoise.py`, whose generator evaluates
nothing, and `painting.py`, which reports each step.

Stopping stays with the caller and, in a ring, with all ranks together: they agree before each
step. The question must be built before the next step's collectives, so that a ring that builds
ahead hears a step later that it should stop; it does so only where a step is short. A ring whose
collectives the host waits for (`models/waiting.py`) computes as it builds, and never builds ahead.

A step whose latents hold NaN or infinity ends the walk: every step after it would. Whether they do
is one number more of the same evaluation, so that nobody waits for the device once more. The ranks
of a ring have the same latents, and end together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from fluxmesh.errors import FluxmeshError, NotFiniteError
from fluxmesh.models.collectives import Ranks
from fluxmesh.sampling.denoise import StepState

SHORT = 0.25  # seconds: a step after which nobody minds to wait for another one until it stops


def _no_number(number: int) -> FluxmeshError:
    return NotFiniteError(f"Step {number} gave numbers that are not finite (NaN or infinity).")


def walked(
    walk: Iterator[StepState],
    steps: int,
    ranks: Ranks | None,
    stopping: Callable[[], bool],
    pause: Callable[[], None] = lambda: None,
    ahead: bool = True,
    no_number: Callable[[int], FluxmeshError] = _no_number,
) -> Iterator[tuple[StepState, float]]:
    """Yields each of the `steps` of `walk`, evaluated, with the seconds that it took.

    Ends early where `stopping`, asked between steps, is true: in a ring, on any rank. `ranks` is
    the ring whose collectives the steps run, or None; `pause` is called before each step. Without
    `ahead` nothing is built ahead: for a walk that waits for the device as it builds.
    Raises `no_number` of a step, counted from 1, whose latents are not finite.
    """
    start = time.perf_counter()
    step = next(walk)
    seconds = SHORT
    for left in range(steps - 1, -1, -1):
        pause()
        is_finite = mx.isfinite(step.x).all()
        mx.async_eval(step.x, is_finite)
        following: StepState | None = None
        asked: mx.array | None = None
        if left and ahead and (ranks is None or (ranks.looks_ahead and seconds < SHORT)):
            if ranks is not None:
                asked = ranks.ask(int(stopping()))
                # By itself: in one CUDA graph with the next step's first collective, with which it
                # has no data in common, nothing would keep the two from running at once.
                mx.async_eval(asked)
                mark = ranks.mark()
            following = next(walk)
        mx.eval(step.x, is_finite)
        seconds = time.perf_counter() - start
        if not is_finite.item():
            if asked is not None and ranks is not None:
                ranks.rewind(mark)
            raise no_number(steps - left)
        yield step, seconds
        if not left:
            return
        if ranks is None:
            stops = stopping()
        elif asked is None:
            stops = bool(ranks.most(int(stopping())))
        else:
            stops = bool(asked.any().item())
        if stops:
            if asked is not None and ranks is not None:
                ranks.rewind(mark)
            return
        start = time.perf_counter()
        step = next(walk) if following is None else following
