"""The learning rate of each update. Pure: no mlx, no NumPy."""

from __future__ import annotations

import math

from fluxmesh.training.request import TrainRequest


def warmup_updates(request: TrainRequest) -> int:
    """Updates of warm-up: as asked, or half of the run where that would take all of it."""
    asked = request.warmup_steps
    assert asked is not None, "`defaults.fill` has set it"
    return asked if asked < request.updates else request.updates // 2


def learning_rate(request: TrainRequest, update: int) -> float:
    """The rate of `update`, counted from 0.

    Rises linearly over the warm-up and is full in the update after it; from there it falls along
    the schedule so as to be 0 after the last update, however many there are.
    """
    full, warmup = request.learning_rate, warmup_updates(request)
    assert full is not None, "`defaults.fill` has set it"
    if update < warmup:
        return full * (update + 1) / (warmup + 1)
    done = (update - warmup) / (request.updates - warmup)  # in [0, 1)
    if request.lr_schedule == "cosine":
        return full * (1 + math.cos(math.pi * done)) / 2
    if request.lr_schedule == "linear":
        return full * (1 - done)
    return full
