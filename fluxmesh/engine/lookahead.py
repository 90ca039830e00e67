"""Walks an image's steps, evaluating each, and hides the time that it takes to describe the next.

Building the graph of a step takes the host 5 to 15 ms, in which a fast GPU would idle: here it is
done while the device computes the step before. Between `denoise.py`, whose generator evaluates
nothing, and `painting.py`, which reports each step.

On CUDA the first half of the next step, its double blocks, is also given to the device before the
host waits for this one: else the device would idle until MLX has put the first operations of a new
graph together, 4 to 13 ms of 130. The whole next step would be too much: MLX queues no more than a
third of a step, so that the host would hear of this one when the next is nearly done.

Stopping stays with the caller and, in a ring, with all ranks together: they agree before each
step. The question must be built before the next step's collectives, so that a ring that builds
ahead hears a step later that it should stop; it does so only where a step is short on all ranks.
A ring whose collectives a host waits for (`models/waiting.py`) computes as it builds, and never
builds ahead. Whatever is done ahead all ranks do, or none: what one alone had begun would meet the
others' next collective.

A step whose latents hold NaN or infinity ends the walk: every step after it would. Whether they do
is one number more of the same evaluation, so that nobody waits for the device once more. The ranks
of a ring have the same latents, and end together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fluxmesh.errors import FluxmeshError, NotFiniteError
from fluxmesh.kernels.ops import device
from fluxmesh.models.collectives import Mark, Ranks
from fluxmesh.models.double_stream import watching
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
    """Yields each of the `steps` of `walk`, evaluated, with the seconds that it was waited for.

    Where the next step has begun by then, what this one looks too long the next looks too short.
    Ends early where `stopping`, asked between steps, is true: in a ring, on any rank. `ranks` is
    the ring whose collectives the steps run, or None; `pause` is called before each step. Without
    `ahead` nothing is built ahead: for a walk that waits for the device as it builds.
    Raises `no_number` of a step, counted from 1, whose latents are not finite.
    """
    start = time.perf_counter()
    step = next(walk)
    seconds = SHORT
    agreed = Answers()
    for left in range(steps - 1, -1, -1):
        pause()
        is_finite = mx.isfinite(step.x).all()
        mx.async_eval(step.x, is_finite)
        following: StepState | None = None
        asked: mx.array | None = None
        mark: Mark | None = None  # what has begun when this step ends
        if left and ahead and (ranks is None or agreed.looks_ahead):
            if ranks is not None:
                asked = ranks.ask(_answer(stopping(), seconds, ranks))
                # By itself: in one CUDA graph with the next step's first collective, with which it
                # has no data in common, nothing would keep the two from running at once.
                mx.async_eval(asked)
                mark = ranks.mark()
            if agreed.begins_early:
                following, half = _begun(walk)
                if mark is not None and half is not None:
                    # Behind the collectives of this half, whose bytes then count for nothing.
                    mark = replace(mark, last=half)
                del half  # a hidden state
            else:
                following = next(walk)
        mx.eval(step.x, is_finite)
        seconds = time.perf_counter() - start
        if not is_finite.item():
            if ranks is not None and mark is not None:
                ranks.rewind(mark)
            raise no_number(steps - left)
        yield step, seconds
        if not left:
            return
        if ranks is None:
            is_short = seconds < SHORT
            agreed = Answers(stopping(), is_short, is_short and device() == "cuda")
        else:
            every = ranks.ask(_answer(stopping(), seconds, ranks)) if asked is None else asked
            agreed = _agreed(np.array(every))
        if agreed.stops:
            if ranks is not None and mark is not None:
                ranks.rewind(mark)
            return
        del mark
        start = time.perf_counter()
        step = next(walk) if following is None else following


class Answers(NamedTuple):
    """What follows from what all ranks said between two steps: the same on each of them."""

    stops: bool = False
    looks_ahead: bool = False  # the next step is described before this one is waited for
    begins_early: bool = False  # and its first half is computed


# Bits of a rank's answer: its steps are long, or its host waits; it has no CUDA; it is to stop.
LONG, ELSEWHERE, STOP = 1, 2, 4


def _answer(stops: bool, seconds: float, ranks: Ranks) -> int:
    """This rank's; `seconds` is what its latest step took."""
    is_long = seconds >= SHORT or not ranks.looks_ahead
    return STOP * stops + ELSEWHERE * (device() != "cuda") + LONG * is_long


def _agreed(every: np.ndarray) -> Answers:
    """From the answers of all ranks [N]. They are read here, and nothing is computed of them: that
    would wait on the device for the half that has begun."""
    any_of = int(np.bitwise_or.reduce(every))
    looks_ahead = not any_of & LONG
    return Answers(bool(any_of & STOP), looks_ahead, looks_ahead and not any_of & ELSEWHERE)


def _begun(walk: Iterator[StepState]) -> tuple[StepState, mx.array | None]:
    """The next step, described, and its first half, which the device computes from here on."""
    with watching() as halves:
        step = next(walk)
    half = halves[0] if halves else None
    if half is not None:
        mx.async_eval(half)
    return step, half
