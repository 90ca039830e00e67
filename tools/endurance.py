"""Many small jobs on one mesh that nobody hurts: what leaks, what false alarms there are, what it
costs to control. `chaos.py --clean` prints it, `tests/faults/test_long_life.py` asserts it.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.table import Table

from fluxmesh.wire.messages import EngineCounters, Status
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.faults.mesh import Up, paint
from tests.faults.strike import request_of

SIZES = ((32, 32), (32, 48), (64, 64), (48, 96))
PROMPTS = ("two dogs", "a red apple", "the fox", "a blue car")
SETTLED = 0.3  # of all jobs, after which memory and files should stay what they are
GROWTH = (1.03, 4 << 20)  # times, and bytes on top: what counts as flat
FILES = 3  # more open files than before, that one moment may have
CONTROL = 0.050  # seconds a job that may be anything but computing


@dataclass
class EnduranceReport:
    """Of one run."""

    memory: dict[str, list[int]] = field(default_factory=dict)  # process -> bytes, job by job
    files: dict[str, list[int]] = field(default_factory=dict)  # process -> open files
    control: dict[str, list[float]] = field(default_factory=dict)  # placement -> seconds a job
    alarms: int = 0
    errors: list[str] = field(default_factory=list)
    jobs: int = 0

    def growth(self, values: list[int]) -> tuple[int, int]:
        """(least after it has settled, least at the end): buffers come and go, a leak stays."""
        begin = int(len(values) * SETTLED)
        length = max(1, len(values) // 5)
        return min(values[begin : begin + length]), min(values[-length:])

    def problems(self) -> list[str]:
        """What is not as it should be."""
        faults = list(self.errors)
        if self.alarms:
            faults.append(f"{self.alarms} false alarms")
        for name, values in self.memory.items():
            first, last = self.growth(values)
            if last > first * GROWTH[0] + GROWTH[1]:
                faults.append(f"{name} grew from {first >> 20} to {last >> 20} MiB")
        for name, values in self.files.items():
            first, last = self.growth(values)
            if last > first + FILES:
                faults.append(f"{name} has {last} files open, had {first}")
        for placement, seconds in self.control.items():
            if statistics.median(seconds) > CONTROL:
                cost = f"{1e3 * statistics.median(seconds):.0f} ms"
                faults.append(f"control of a {placement} job costs {cost}")
        return faults

    def table(self) -> Table:
        shown = Table("after " + str(self.jobs) + " jobs", "settled", "at the end")
        for name in self.memory:
            first, last = self.growth(self.memory[name])
            shown.add_row(f"memory of {name}", f"{first / 1e6:.1f} MB", f"{last / 1e6:.1f} MB")
            first, last = self.growth(self.files[name])
            shown.add_row(f"open files of {name}", str(first), str(last))
        for name, seconds in self.control.items():
            shown.add_row(
                f"control of a {name} job, least {1e3 * min(seconds):.1f} ms",
                f"median {1e3 * statistics.median(seconds):.1f} ms",
                f"longest {1e3 * max(seconds):.0f} ms",
            )
        shown.add_row("false alarms", "", str(self.alarms))
        return shown


def run(up: Up, jobs: int, seed: int) -> EnduranceReport:
    """`jobs` requests of mixed sizes and placements, one after another."""
    draw, report = random.Random(seed), EnduranceReport(jobs=jobs)
    with up.connect() as mesh:
        for number in range(jobs):
            height, width = draw.choice(SIZES)
            request = request_of(
                up.model, n_images=1, height=height, width=width, steps=draw.randint(1, 2)
            )
            placement: Any = ("data", "tensor", "sequence")[number // 20 % 3]
            before = counters(mesh)
            done = paint(mesh, request, placement)
            after = counters(mesh)
            report.alarms += len(done.lost)
            if done.error is not None:
                report.errors.append(f"job {number}: {done.error}")
            elif number % 20:  # the first of a placement may load, or form a ring
                spent = report.control.setdefault(placement, [])
                spent.append(done.seconds - computing(before, after))
            for rank in range(len(up.ports)):
                for kind in ("agent", "engine"):
                    pid, name = up.pid(kind, rank), f"{kind} {rank}"
                    process = psutil.Process(pid)
                    report.memory.setdefault(name, []).append(process.memory_info().rss)
                    report.files.setdefault(name, []).append(process.num_fds())
    return report


def counters(mesh: Mesh) -> dict[int, EngineCounters]:
    """Of the hosts that answer, by rank."""
    statuses = mesh.status()
    return {
        rank: status.counters for rank, status in statuses.items() if isinstance(status, Status)
    }


def computing(
    before: dict[int, EngineCounters],
    after: dict[int, EngineCounters],
    *,
    with_agreement: bool = False,
) -> float:
    """Seconds that engines spent on a job: all beside it is control.

    Those of the busiest one, which was at work whenever another was. In a ring the ranks' agreement
    whether to go on is control too; how long that took by itself, the rank tells that came last
    and waited for nobody; `with_agreement` leaves it with the engines.
    """
    busy = [after[rank].busy_seconds - before[rank].busy_seconds for rank in before]
    if with_agreement:
        return max(busy)
    agreed = [after[rank].agree_seconds - before[rank].agree_seconds for rank in before]
    return max(busy) - min([each for each in agreed if each > 0], default=0.0)
