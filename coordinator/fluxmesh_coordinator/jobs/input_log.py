"""The last inputs of a job's session: a session is pure, so these are all that a bug needs. Pure.

`runtime/job_runner.py` notes every input here, `replay.py` turns what was noted into bytes and
back into a session that goes through it again. Arrays are noted by dtype and shape alone: a session
passes them on, and decides nothing by what is in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fluxmesh.wire.messages.training import PutFeatures
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Asked,
    Input,
    Instruction,
    JobFinished,
    JobStuck,
    Learn,
    LetGo,
    Remember,
    Reported,
    SendToAgent,
    TellUser,
    Tick,
)

# Inputs that are kept. A job that had no more is gone through again from its beginning: that is
# every generation but the very long ones. Of others the last ones can be read, and not replayed.
KEPT = 5000

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # of arrays by name: dtype, shape


@dataclass(frozen=True)
class Noted:
    """One input, when it came, and what was done about it, in a word each."""

    now: float
    event: Input
    said: tuple[str, ...]


class InputLog:
    """What a session has heard. Its size does not depend on what the arrays are."""

    def __init__(self) -> None:
        self.noted: deque[Noted] = deque(maxlen=KEPT)
        self.missing = 0  # inputs before these
        # Of the features that hosts were sent, by name: not from a session's inputs, but from
        # the program above it.
        self.features: dict[str, Shapes] = {}

    def note(self, now: float, event: Input, instructions: Sequence[Instruction]) -> None:
        """Keeps an input. A tick about which nothing was done has changed nothing: it isn't."""
        if isinstance(event, Tick) and not instructions:
            return
        self.missing += len(self.noted) == KEPT
        self.noted.append(Noted(now, hollow(event), tuple(map(brief, instructions))))
        for instruction in instructions:
            message = instruction.message if isinstance(instruction, SendToAgent) else None
            if isinstance(message, PutFeatures):
                self.features[message.name] = shapes_of(message.features)


def brief(instruction: Instruction) -> str:
    """An instruction in a word or two, without what a user wrote."""
    match instruction:
        case SendToAgent():
            return f"{type(instruction.message).__name__} to {instruction.rank}"
        case TellUser():
            return f"tell {type(instruction.event).__name__}"
        case Learn():
            return "learn"
        case LetGo():
            return f"let go of {instruction.rank}"
        case Remember():
            return f"remember {instruction.fault.backend}"
        case JobStuck():
            return "stuck"
        case JobFinished():
            error = instruction.error
            return "finished" if error is None else f"finished with {type(error).__name__}"


def hollow(event: Input) -> Input:
    """The same input with arrays that take no memory."""
    match event:
        case Reported():
            return Reported(event.rank, event.report.with_arrays(hollow_array))
        case Answered():
            request = event.request.with_arrays(hollow_array)
            return Answered(event.rank, request, event.answer.with_arrays(hollow_array))
        case Asked():
            return event.with_arrays(hollow_array)
    return event


def hollow_array(array: np.ndarray) -> np.ndarray:
    """Zeros of the same dtype and shape, in the memory of one."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def shapes_of(arrays: Mapping[str, np.ndarray]) -> Shapes:
    """Of each of them."""
    return {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
