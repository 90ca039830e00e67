"""The processes of a ring between network namespaces: collectives timed, then steps walked.

Each rank is `python -m benchmarks.emulated.ring` in a namespace of its own. Its sockets wait for
what comes (`patient_sockets.c`), and it is served before all else on the machine, for it waits
nearly always: what it measures is then the links, whatever else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import groups, harness
from benchmarks.harness import Result, Skipped, emit
from fluxmesh.cluster.snapshot import CollectiveTime, RingTiming

if TYPE_CHECKING:
    from benchmarks.emulated.steps import StepPiece

PROBE = 4.0  # seconds that a ring's collectives are timed
MEMORY = 1 << 24  # bytes that it is told to have: arrays of up to 64 KiB, the size of what travels
LONGEST = 600.0  # seconds that the processes may live


class EmulatedRing:
    """The processes that are a ring of the first hosts of a mesh: its collectives are timed."""

    def __init__(self, size: int, name: str, net: str, scratch: Path, patient: Path) -> None:
        """The ring forms between the namespaces NAME-2, NAME-3, ... at NET.2, NET.3, ...

        `patient` is what `built` gave. Raises `RuntimeError` where a rank fails.
        """
        self._steps = scratch / f"steps-{size}.json"
        addresses = [f"{net}.{rank + 2}" for rank in range(size)]
        within = [["ip", "netns", "exec", f"{name}-{rank + 2}"] for rank in range(size)]
        envs = groups.environments("ring", size, scratch, addresses)
        self._results = harness.results_of(
            "benchmarks.emulated.ring",
            {"steps": str(self._steps)},
            [{**env, "LD_PRELOAD": str(patient)} for env in envs],
            timeout=LONGEST,
            within=within,
        )
        found = self._next()
        gathers, sums = (
            tuple(CollectiveTime(*pair) for pair in found[name]) for name in ("gathers", "sums")
        )
        self.timing = RingTiming(
            backend="ring",
            ranks=tuple(range(size)),
            gathers=gathers,
            sums=sums,
            hidden=found["hidden"],
        )

    def walked(self, steps: Sequence[Sequence[Sequence[StepPiece]]]) -> list[float]:
        """Seconds of each of these steps, of which every rank has its own."""
        written = self._steps.with_suffix(".tmp")
        written.write_text(json.dumps(steps))
        written.rename(self._steps)
        return [float(min(self._next()["seconds"])) for _ in steps]

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._results.close()

    def _next(self) -> Result:
        result = next(self._results)
        if reason := result.get("failed") or result.get("skipped"):
            raise RuntimeError(f"A rank failed: {reason}")
        return result


def built(folder: Path) -> Path:
    """What makes a ring wait for its sockets. Raises `Skipped` where no C compiler is."""
    source, built = Path(__file__).with_name("patient_sockets.c"), folder / "patient_sockets.so"
    if (compiler := shutil.which("cc")) is None:
        raise Skipped("a C compiler is missing")
    how = ["-shared", "-fPIC", "-O2", "-o", str(built), str(source)]
    subprocess.run([compiler, *how], check=True, capture_output=True)
    return built


# A rank


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=json.loads)
    harness.run_case(parser.parse_args().case, measure)


def measure(case: Result) -> None:
    """One rank of a ring: its collectives timed, then steps walked, once they are there."""
    import mlx.core as mx

    from benchmarks.emulated.steps import StepPiece, hidden, walked
    from fluxmesh.engine import ring_probe
    from fluxmesh.models.collectives import Ranks
    from fluxmesh.models.waiting import OnHost

    mx.set_default_device(mx.cpu)
    _come_first()
    ranks = Ranks(mx.distributed.init(strict=True, backend="ring"), waiting=OnHost())
    table = ring_probe.timed(ranks, PROBE, MEMORY)
    assert table is not None
    tables = {"gathers": table.gathers, "sums": table.sums}
    plain = {what: [astuple(timing) for timing in each] for what, each in tables.items()}
    emit(**plain, hidden=hidden(ranks, table.gathers))
    steps, parent = Path(case["steps"]), os.getppid()
    while not steps.exists():
        if os.getppid() != parent:  # nobody is left to write them
            return
        time.sleep(0.05)
    for step in json.loads(steps.read_text()):
        emit(seconds=walked(ranks, [StepPiece(*piece) for piece in step[ranks.rank]]))


def _come_first() -> None:
    """Before all that has no time of its own, where this process may ask for that."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


if __name__ == "__main__":
    main()
