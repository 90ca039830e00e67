"""Does the mesh that is up do what the planner predicts, and is its choice the fastest one?

    fluxmesh up mesh.json --model dev && python -m benchmarks.plans
    python -m benchmarks.plans --hosts 4 --backend nccl --steps 8 --rounds 2   # 4 GPUs, full size
    python -m benchmarks.plans --model tiny --sizes 64x64 128x128 --images 1 3 --steps 4
    python -m benchmarks.plans --limited 2 --rate 125e6 --model tiny     # Linux, as root

For each size and number of images, every placement is asked for, and the time from the request to
its last picture is laid beside what `plan` said just before: "unseen" is what it said when no such
request had been made on this mesh, "predicted" after one had. Each request has a prompt of its own,
which is read. "first" is the very first of its way at a size, where kernels compile and hosts load.
Then, for each size and number, what `generate` would choose by itself, and whether
that was the fastest; ways within 5% of each other are a tie.

All kinds of requests take turns, `--rounds` times; of each the median counts. Where the hosts are
on this machine, it is watched what else its processors do: a request that others disturbed, or that
had to form another ring, is made again, up to twice `--rounds` more. "*" marks what was never left
alone, "cold" what was never warm.

`--hosts N` brings up a mesh of its own: N agents of this machine, with FLUX.1-dev at full size on
random weights, or `--model`. `--limited N` does so in N network namespaces, joined by links of
`--rate` bytes a second, as slow cables are (`limited.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Result, say
from benchmarks.plans_report import COLD, LOUD, line_of, report, rings
from benchmarks.quiet import OtherWork

if TYPE_CHECKING:
    from fluxmesh.planning.plan import Option
    from fluxmesh_coordinator.runtime.mesh import Mesh

PLACEMENTS = ("data", "sequence", "tensor")
MORE = 2  # times as many rounds, while requests are disturbed or cold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="else the one that is loaded")
    parser.add_argument("--sizes", nargs="+", default=[(512, 512), (1024, 1024)], type=size)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, help="else the model's own number")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each kind: the median")
    parser.add_argument(
        "--minutes", type=float, default=30, help="after which nothing is made again"
    )
    parser.add_argument("--hosts", type=int, metavar="N", help="agents of this machine")
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring", help="of --hosts")
    parser.add_argument("--limited", type=int, metavar="N", help="hosts with slow links, here")
    parser.add_argument("--rate", type=float, default=125e6, help="of such a link, in bytes/s")
    parser.add_argument("--small", action="store_true", help="`tiny`, to try this program")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    options.model = options.model or ("tiny" if options.small else None)
    say(f"{harness.machine()}\n")
    with _mesh(options) as mesh:
        results = measure(mesh, options)
        say("\n" + report(results))
        say("\n" + "\n".join(rings(mesh)))


def size(text: str) -> tuple[int, int]:
    """(height, width) of "512x768"."""
    height, _, width = text.partition("x")
    return int(height), int(width)


@contextlib.contextmanager
def _mesh(options: argparse.Namespace) -> Iterator[Mesh]:
    """The mesh that is up, or one of this machine's agents for the time of the run."""
    from fluxmesh.errors import UsageError
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.runtime.mesh import Mesh

    with contextlib.ExitStack() as stack:
        if options.limited:
            from benchmarks.limited import limited

            stack.enter_context(limited(options.limited, options.rate, options.model or "tiny"))
        elif options.hosts:
            stack.enter_context(_agents(options))
        up = mesh_file.load()
        if up is None:
            raise UsageError("No mesh is up; run `fluxmesh up` with its hostfile first.")
        if options.model is None:
            options.model = up.weights.model if up.weights else "tiny"
        yield stack.enter_context(Mesh.connect())


@contextlib.contextmanager
def _agents(options: argparse.Namespace) -> Iterator[None]:
    """A mesh of `--hosts` agents of this machine that is up."""
    from benchmarks.folders import temporary, write_models
    from benchmarks.limited import environment
    from benchmarks.sizes import FULL
    from benchmarks.warm import LocalMesh, line_of

    folder = temporary("fluxmesh-plans-", None)
    try:
        if options.model is None:
            say(f"wrote {write_models(folder, FULL) / 1e9:.1f} GB")
        mesh = LocalMesh(folder, argparse.Namespace(**vars(options), no_warm=False, size=None))
        options.model = mesh.model
        own = {key: mesh.env[key] for key in ("HOME", "FLUXMESH_HOME", "FLUXMESH_STATE")}
        with mesh.up(lambda result: say(line_of(result) + "\n")), environment(own):
            yield
    finally:
        shutil.rmtree(folder)


# Measuring


@dataclass
class Case:
    """One kind of request, and what its rounds gave."""

    common: dict[str, Any]
    images: int
    placement: Any  # None is whatever the plan chooses
    unseen: float | None
    option: Option
    rounds: list[Result] = field(default_factory=list)

    @property
    def good(self) -> list[Result]:
        """The rounds that others left alone, and that found the mesh warm."""
        return [
            measurement
            for measurement in self.rounds
            if measurement["others"] <= LOUD and measurement["cold"] <= COLD
        ]

    @property
    def counted(self) -> list[Result]:
        """The good rounds, or all of them where there is none."""
        return self.good or self.rounds

    @property
    def result(self) -> Result:
        """What all of it comes to: the median of the rounds that count."""
        rounds, phase = self.counted, self.option.phases[0]

        def median(name: str) -> float:
            return statistics.median(measurement[name] for measurement in rounds)

        return {
            **self.common,
            "images": self.images,
            "placement": self.placement or self.option.name,
            "hosts": list(self.option.ranks),
            "unseen": self.unseen,
            "predicted": median("predicted"),
            "measured": median("measured"),
            "step_predicted": phase.step_seconds,
            "step_measured": median("step"),
            "figure": phase.figure,
            "cold": median("cold"),
            "others": median("others"),
            "rounds": self.rounds,
        }


class Session:
    """Requests to one mesh, each with a prompt that nobody has read."""

    def __init__(self, mesh: Mesh, options: argparse.Namespace) -> None:
        self.mesh, self.options = mesh, options
        self._numbers = itertools.count(2)

    def plan(self, common: dict[str, Any], images: int, placement: Any) -> Option | None:
        return self.mesh.plan(self._request(common, images, "a plan"), placement).winner

    def paint(self, common: dict[str, Any], images: int, placement: Any) -> Result:
        """Seconds from the request to its last picture, of a step, and what others did."""
        from fluxmesh.events import Picture, Step

        prompt = f"a photo of {next(self._numbers)} red apples on a table"
        request, others = self._request(common, images, prompt), OtherWork(self._processes())
        others.begin()
        start, end, steps = time.perf_counter(), 0.0, list[float]()
        for event in self.mesh.generate(request, placement):
            if isinstance(event, Picture):
                end = time.perf_counter()
            elif isinstance(event, Step):
                steps.append(event.seconds)
        times = {"measured": end - start, "step": statistics.median(steps)}
        busy = others.end() / (os.cpu_count() or 1) if self._is_here else 0.0
        return {**times, "others": busy}

    def first(self, common: dict[str, Any], images: int, placement: Any) -> Result:
        """As `paint`, of a way that was not taken at this size: what was it expected to take?"""
        option = self.plan(common, images, placement)
        assert option is not None
        more = {"cold": option.cold_seconds, "load": option.load_seconds, **common}
        took = self.paint(common, images, placement)["measured"]
        return {
            "first": placement,
            "images": images,
            "predicted": option.seconds,
            "took": took,
            **more,
        }

    @property
    def _is_here(self) -> bool:
        addresses = [member.address for member in self.mesh.record.members]
        return bool(self.options.limited) or all(a.startswith("127.") for a in addresses)

    def _request(self, common: dict[str, Any], images: int, text: str) -> Any:
        from fluxmesh.request import GenerateRequest

        return GenerateRequest(text, 7, n_images=images, steps=self.options.steps, **common)

    def _processes(self) -> list[int]:
        """Of the mesh's agents and engines, where they are on this machine."""
        from fluxmesh.wire.messages import Status

        if not self._is_here:
            return []
        statuses = [status for status in self.mesh.status().values() if isinstance(status, Status)]
        return [
            pid for status in statuses for pid in (status.pid, status.engine_pid) if pid is not None
        ]


def measure(mesh: Mesh, options: argparse.Namespace) -> list[Result]:
    """Every kind of request, warm; then what would have been chosen."""
    session, hosts = Session(mesh, options), len(mesh.record.members)
    results: list[Result] = []
    measured: list[Result] = []
    start = time.monotonic()
    for height, width in options.sizes:
        common = {"model": options.model, "height": height, "width": width}
        cases: list[Case] = []
        for images in options.images:
            for placement in options.placements:
                option = session.plan(common, images, placement)
                if option is not None:
                    cases.append(Case(common, images, placement, option.seconds, option))
        for placement in dict.fromkeys(case.placement for case in cases):
            # Kernels compile, rings form, all hosts load; then it is seen how long the rest takes.
            first = session.first(common, 2 * hosts if placement == "data" else 2, placement)
            results.append(first)
            say(line_of(first))
            session.paint(common, 1, placement)
        chosen: dict[int, Option] = {}
        for number in range(options.rounds * (1 + MORE)):
            is_late = time.monotonic() - start > 60 * options.minutes
            is_done = all(len(case.good) >= options.rounds for case in cases)
            if number >= options.rounds and (is_late or is_done):
                break
            for case in cases:
                _round(session, case, number, options.rounds)
            for images in options.images:
                option = session.plan(common, images, None)
                assert option is not None
                chosen[images] = option
                if option.name == "mixed" and not any(
                    (case.images, case.placement) == (images, None) for case in cases
                ):
                    cases.append(Case(common, images, None, option.seconds, option))
                    _round(session, cases[-1], number, options.rounds)
            measured = _measured_so_far(cases, chosen)
            say(f"{height}x{width}: {number + 1} rounds, {time.monotonic() - start:.0f} s")
            harness.write_json(options.json, results + measured)
        for result in measured:
            say(line_of(result))
        results += measured
    return results


def _measured_so_far(cases: Sequence[Case], chosen: Mapping[int, Option]) -> list[Result]:
    """What was measured so far at one size, and what is chosen there."""
    made = sorted((case for case in cases if case.rounds), key=lambda case: case.images)
    rows = [case.result for case in made]
    for images, option in chosen.items():
        own = {"images": images, "chosen": option.name, "hosts": list(option.ranks)}
        rows.append({**cases[0].common, **own})
    return rows


def _round(session: Session, case: Case, number: int, rounds: int) -> None:
    """One request of a kind, unless there are enough good ones."""
    if len(case.good) >= rounds:
        return
    option = session.plan(case.common, case.images, case.placement)
    if option is None or (case.placement is None and option.name != "mixed"):
        return
    case.option = option
    times = session.paint(case.common, case.images, case.placement)
    cold = option.cold_seconds + option.load_seconds
    case.rounds.append({"round": number, "predicted": option.seconds, "cold": cold, **times})


if __name__ == "__main__":
    main()
