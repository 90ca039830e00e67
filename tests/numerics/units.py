"""Units of work, and what is read from their reports: for the tests of a worker."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.worker import Worker
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Encode, Paint, Report

HEAD: dict[str, Any] = {"fence": 0, "job": "job", "ring_generation": 0}
R = TypeVar("R", bound=Report)


def only(worker: Worker, work: messages.Work, kind: type[R]) -> list[R]:
    return [report for report in worker.do(work) if isinstance(report, kind)]


def painting(worker: Worker, weights: ModelVariant, **more: Any) -> Paint:
    """A painting of 3 steps, 32 x 48 pixels."""
    (text,) = only(worker, Encode(**HEAD, weights=weights, prompt="two dogs"), messages.TextEncoded)
    noise = initial_noise(7, 32, 48, 16, 8)
    fields: dict[str, Any] = {
        "placement": "data",
        "image": 0,
        "height": 32,
        "width": 48,
        "steps": 3,
        "first": 0,
        "guidance": 4.0,
        "low_memory": False,
        "preview": False,
        "strength": 1.0,
        "latents": noise,
        "noise": noise,
        "features": text.features,
    }
    return Paint(**HEAD, weights=weights, **(fields | more))


def latents(worker: Worker, work: Paint) -> list[np.ndarray]:
    arrays = [step.latents for step in only(worker, work, messages.Stepped)]
    assert all(each is not None for each in arrays)
    return arrays  # type: ignore[return-value]


def loaded(worker: Worker) -> list[str]:
    assert worker.pipeline is not None
    names = (*sorted(worker.pipeline.runtime.text_models, reverse=True), "flow", "ae")
    return [name for name in names if worker.pipeline.is_loaded(name)]
