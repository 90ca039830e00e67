"""Does the units of work of one engine, one after another. Holds no socket.

A unit goes in as a message (`messages.Work`), reports come out, one after another, from a
generator: whoever asks (the engine's process, `fluxmesh_agent/engine.py`) sends them on, and closes
the generator to stop. The units are functions of what they share (`state.py`): `units.py` loads,
encodes and decodes, `painting.py` paints, `measuring.py` measures and warms.

What stays in memory (the memory policy):

- Models stay until another unit needs the room. `Encode` without `stay` makes the transformer
  leave until the encoders are done, and the encoders leave before anything else loads.
- Another shard of the same weights makes what is there leave first. Other weights find it kept
  beside them where there is room for both (`ModelWork.memory_bytes`): the least used leaves first.
- `low_memory` loads the modulation weights alone, uses them, and lets them leave before the rest
  of the transformer comes; that leaves before the first picture is decoded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fluxmesh.engine import measuring, painting, units
from fluxmesh.engine.residency import Stopped, WorkerOptions
from fluxmesh.engine.state import EngineState, Reports
from fluxmesh.errors import DoesNotFitError, UsageError
from fluxmesh.wire import messages
from fluxmesh.wire.messages import (
    Decode,
    Encode,
    EncodePictures,
    EncodeSource,
    Load,
    Measure,
    MeasureRing,
    Paint,
    Report,
    Warm,
)


class Worker(EngineState):
    """Does one unit of work after another."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        super().__init__(options)
        self._job = ""

    def do(self, work: messages.Work) -> Iterator[Report]:
        """Does one unit and yields its reports.

        Raises what a wrong model, file or request deserves (`errors.py`), `DoesNotFitError` where
        memory runs out. A unit that is told to stop ends without the report that would end it.
        """
        if work.job != self._job:
            self.end_job()
            self.drop_changed()  # now, and not in the midst of a job: it is one model's from here
            self.meter.forget()
            self._job, self._room = work.job, None  # other programs may have taken memory since
        self.memory_bytes = work.memory_bytes if isinstance(work, messages.ModelWork) else 0
        self.begin("loading")  # what was there leaves, and headers are read, maybe from afar
        does = self.units().get(type(work))
        try:
            if does is None:
                raise UsageError(f"This engine does no {type(work).__name__}.")
            yield from self._timed(does(work))
        except Stopped:
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            name = "the model" if self.weights is None else self.weights.model
            raise DoesNotFitError(
                f"Memory ran out while {self.doing} with {name}; try {self.less_memory(work)}."
            ) from error
        finally:
            self.quiet = ""
            self.done = replace(self.done, peak_bytes=max(self.done.peak_bytes, self.meter.now()))

    def _timed(self, reports: Reports) -> Reports:
        """What a unit reports; its time is counted, without that of whoever sends the reports."""
        start = time.perf_counter()
        with contextlib.closing(reports):
            for report in reports:
                self.count(busy_seconds=time.perf_counter() - start)
                yield report
                start = time.perf_counter()
        self.count(busy_seconds=time.perf_counter() - start)

    def less_memory(self, work: messages.Work) -> str:
        """What makes units like this one take less memory."""
        return "`quantize`, `low_memory` or a smaller `image_size`"

    def units(self) -> dict[type, Callable[[Any], Reports]]:
        """What does each kind of unit."""
        return {
            Load: partial(units.load, self),
            Encode: partial(units.encode, self),
            EncodeSource: partial(units.encode_source, self),
            EncodePictures: partial(units.encode_pictures, self),
            Paint: partial(painting.paint, self),
            Decode: partial(units.decode, self),
            Measure: partial(measuring.measure, self),
            Warm: partial(measuring.warm_up, self),
            MeasureRing: partial(measuring.measure_ring, self),
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX failed to allocate: Metal, CUDA and the CPU each say so in words."""
    text = str(error).lower()
    words = ("malloc", "out of memory", "unable to allocate", "insufficient memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)
