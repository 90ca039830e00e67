"""What a run leaves on the disk so that it can go on: one file a checkpoint, whole or not there.

`0000050_state.safetensors` holds the weights, Adam's averages and the average of weights, all
float32, and in its header the counters, the request and the data's fingerprint. Beside it lies
`0000050_adapters.safetensors`, the same weights as other tools read them. Imports no mlx.

Not `mlx.optimizers`' state or a pickle: one file that is there whole or not at all can't hold
weights of one update and averages of another, any safetensors reader opens it, and no code is run
by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.errors import OutputError, UsageError, WeightsError
from fluxmesh.storage.atomic import replaced_file
from fluxmesh.storage.safetensors import make_folder, read_header, read_tensor, write_tensors

FORMAT = 1
STATE = re.compile(r"(\d{7,})_state\.safetensors")
ADAPTERS = re.compile(r"(\d{7,})_adapters\.safetensors")
RECORD = "fluxmesh_training"  # JSON in the file's header
FINAL = "final_adapters.safetensors"


@dataclass(frozen=True)
class RunCounters:
    """Numbers of a run that its end depends on."""

    update: int  # updates done
    iteration: int  # micro-batches done
    smooth_loss: float | None = None  # a running mean, to notice an explosion
    lowest_loss: float | None = None  # of the running mean
    best_loss: float | None = None  # of validation
    best_iteration: int | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back."""

    counters: RunCounters
    request: Mapping[str, Any]  # `TrainRequest.identity()`
    data: str  # `dataset.fingerprint`
    model: str  # the base checkpoint's revision
    vectors: Mapping[str, np.ndarray] = field(repr=False)  # float32 [size]


def state_path(folder: Path, iteration: int) -> Path:
    return folder / f"{iteration:07d}_state.safetensors"


def adapters_path(folder: Path, iteration: int) -> Path:
    return folder / f"{iteration:07d}_adapters.safetensors"


def save(folder: Path, saved: Saved) -> Path:
    """Writes a checkpoint's state; returns its file. Raises `OutputError`."""
    record = {
        "format": FORMAT,
        "counters": asdict(saved.counters),
        "request": dict(saved.request),
        "data": saved.data,
        "model": saved.model,
    }
    arrays = {name: (vector, "F32") for name, vector in saved.vectors.items()}
    path = state_path(folder, saved.counters.iteration)
    make_folder(folder)
    write_tensors(path, arrays, {RECORD: json.dumps(record)}, replaced_file)
    return path


def iterations(folder: Path) -> list[int]:
    """The iterations whose states lie in `folder`, ascending."""
    if not folder.is_dir():
        return []
    matches = (STATE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def load(path: Path) -> Saved:
    """Reads a checkpoint back. Raises `WeightsError` where it is damaged."""
    header = read_header(path)
    try:
        record = json.loads(header.metadata[RECORD])
        if record["format"] != FORMAT:
            raise UsageError(f"{path} was written by another version of fluxmesh; begin anew.")
        counters = RunCounters(**record["counters"])
        request, data, model = dict(record["request"]), str(record["data"]), str(record["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is no checkpoint of a training, or is damaged; remove it to go on from the "
            "one before."
        ) from error
    vectors = {name: read_tensor(entry) for name, entry in header.entries.items()}
    return Saved(counters, request, data, model, vectors)


def latest(folder: Path) -> Saved | None:
    """The last checkpoint of `folder`, or None."""
    numbers = iterations(folder)
    return load(state_path(folder, numbers[-1])) if numbers else None


def check_same(saved: Saved, request: Mapping[str, Any], data: str, model: str) -> None:
    """Raises `UsageError` naming what differs from the run that left `saved`."""
    differing = [
        f"{name} was {saved.request.get(name)!r} and is {request.get(name)!r}"
        for name in sorted({*saved.request, *request})
        if saved.request.get(name) != request.get(name)
    ]
    if saved.data != data:
        differing.append("the pictures or captions have changed")
    if saved.model != model:
        differing.append(f"the model was {saved.model} and is {model}")
    if differing:
        raise UsageError(
            f"`resume` can't go on from iteration {saved.counters.iteration}: "
            f"{'; '.join(differing)}; give what the run began with, or another `output_dir`.",
            setting="resume",
        )


def check_new(folder: Path) -> None:
    """Raises `OutputError` where `folder` holds a training already."""
    if iterations(folder) or (folder / FINAL).exists():
        raise OutputError(
            f"{folder} holds a training already; go on with `resume`, or name another `output_dir`."
        )


def check_begun(folder: Path) -> None:
    """Raises `UsageError` where `folder` holds nothing that a resume could go on from."""
    if not iterations(folder):
        raise UsageError(
            f"`resume` goes on from a checkpoint, and {folder} holds none; leave `resume` out to "
            "begin, or name the `output_dir` of the run.",
            setting="resume",
        )


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the last `keep` and the one of iteration `best`."""
    kept = {*iterations(folder)[-keep:], best}
    for path in folder.iterdir():
        match = STATE.fullmatch(path.name) or ADAPTERS.fullmatch(path.name)
        if match and int(match[1]) not in kept:
            path.unlink(missing_ok=True)
