"""What `benchmarks.emulated` finds of each mesh, and how it is told. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import harness
from benchmarks.harness import Result
from benchmarks.plans_report import TIE
from fluxmesh.planning.plan import Phase

NEAR = 0.20  # of the measured time, by which a prediction may be off
SLOWER = 100.0  # than what is emulated, all runs


class EmulatedSetting(NamedTuple):
    """A mesh, and what it is asked for."""

    hosts: int
    gigabits: int  # a second, of every link
    is_slowed: bool  # the last host
    side: int  # pixels
    model: str

    @property
    def mesh(self) -> tuple[int, int]:
        return self.hosts, self.gigabits

    def __str__(self) -> str:
        slowed = ", one slowed" if self.is_slowed else ""
        return f"{self.hosts} hosts{slowed}, {self.gigabits} Gb/s, {self.model} {self.side}²"


@dataclass(frozen=True)
class StepWay:
    """One way to make the step."""

    phase: Phase
    measured: float  # seconds of a step, in slow motion

    @property
    def off(self) -> float:
        """By how much of the measured time the prediction is too long."""
        return self.phase.step_seconds / self.measured - 1

    @property
    def name(self) -> str:
        """`sequence on 2`, or `sequence on 2 (96:48)`, the parts of unequal hosts."""
        shares = self.phase.shares.tokens or self.phase.shares.heads
        dealt = f" ({':'.join(map(str, shares))})" if shares else ""
        if self.phase.placement == "data":
            return "data"
        return f"{self.phase.placement} on {len(self.phase.ranks)}{dealt}"


@dataclass(frozen=True)
class MeshOutcome:
    """One mesh: every way that can be taken, and the one that the plan chose."""

    setting: EmulatedSetting
    ways: tuple[StepWay, ...]
    chosen: StepWay

    @property
    def fastest(self) -> StepWay:
        return min(self.ways, key=lambda way: way.measured)

    @property
    def is_predicted(self) -> bool:
        return all(abs(way.off) <= NEAR for way in self.ways)

    @property
    def is_fastest(self) -> bool:
        return self.chosen.measured <= TIE * self.fastest.measured

    @property
    def holds(self) -> bool:
        return self.is_predicted and self.is_fastest

    @property
    def plain(self) -> Result:
        """For a file, seconds as emulated."""
        ways = [
            {
                "name": way.name,
                "predicted": way.phase.step_seconds / SLOWER,
                "measured": way.measured / SLOWER,
            }
            for way in self.ways
        ]
        told = {"chosen": self.chosen.name, "fastest": self.fastest.name, "holds": self.holds}
        return {**self.setting._asdict(), "ways": ways, **told}


def report(outcomes: Sequence[MeshOutcome]) -> str:
    """One table, a row for each way on each mesh; then how many hold."""
    header = ["mesh", "way", "predicted ms", "measured ms", "off", "chosen", "fastest", ""]
    rows: list[list[str]] = []
    for outcome in outcomes:
        first = [str(outcome.setting), "holds" if outcome.holds else "does NOT hold"]
        for way in outcome.ways:
            off = f"{way.off:+.0%}" + ("" if abs(way.off) <= NEAR else " !")
            seconds = (way.phase.step_seconds, way.measured)
            times = [f"{1e3 * each / SLOWER:.2f}" for each in seconds]
            chosen = "" if way is not outcome.chosen else "yes" if outcome.is_fastest else "yes !"
            best = "yes" if way is outcome.fastest else ""
            rows.append([first[0], way.name, *times, off, chosen, best, first[1]])
            first = ["", ""]
    ways = [way for outcome in outcomes for way in outcome.ways]
    near = sum(abs(way.off) <= NEAR for way in ways)
    best_of = sum(outcome.is_fastest for outcome in outcomes)
    return (
        f"{harness.table(header, rows)}\n\n"
        f"{near} of {len(ways)} steps took what was predicted, within {NEAR:.0%}; the choice was "
        f"the fastest, or within {TIE - 1:.0%} of it, {best_of} of {len(outcomes)} times.\n"
        f"{sum(outcome.holds for outcome in outcomes)} of {len(outcomes)} meshes hold."
    )
