"""Does the mesh that is up do what the planner predicts, and is its choice the fastest one?

    fluxmesh up mesh.json --model dev && python -m benchmarks.plans
    python -m benchmarks.plans --hosts 4 --backend nccl --steps 8 --rounds 2   # 4 GPUs, full size
    python -m benchmarks.plans --model tiny --sizes 64x64 128x128 --images 1 3 --steps 4
    python -m benchmarks.plans --limited 2 --rate 125e6 --model tiny     # Linux, as root

For each size and number of images, every placement is asked for, and the time from the request to
its last picture is laid beside what `plan` said just before: "unseen" is what it said when no such
request had been made on this mesh, "predicted" after one had. Each request has a prompt of its own,
which is read. Then, for each size and number, what `generate` would choose by itself, and whether
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
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Result, say
from benchmarks.quiet import OtherWork

if TYPE_CHECKING:
    from fluxmesh.planning.plan import Option
    from fluxmesh_coordinator.runtime.mesh import Mesh

PLACEMENTS = ("data", "sequence", "tensor")
TIE = 1.05
NEAR = 0.15  # off by no more than this counts as predicted
LOUD = 0.05  # of the machine's processors, that others may keep busy
WRONG = "NOT the fastest"
COLD = 0.05  # seconds beside the warm request, which loading and forming a ring may take
MORE = 2  # times as many rounds, while requests are disturbed or cold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="else the one that is loaded")
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], type=size)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, help="else the model's own number")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each kind: the median")
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
    from benchmarks.folders import scratch, write_models
    from benchmarks.limited import environment
    from benchmarks.sizes import FULL
    from benchmarks.warm import LocalMesh, line_of

    folder = Path(tempfile.mkdtemp(prefix="fluxmesh-plans-", dir=scratch()))
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
        return [one for one in self.rounds if one["others"] <= LOUD and one["cold"] <= COLD]

    @property
    def counted(self) -> list[Result]:
        """The good rounds, or all of them where there is none."""
        return self.good or self.rounds

    @property
    def result(self) -> Result:
        """What all of it comes to: the median of the rounds that count."""
        rounds, phase = self.counted, self.option.phases[0]

        def median(name: str) -> float:
            return statistics.median(one[name] for one in rounds)

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
        found = {"measured": end - start, "step": statistics.median(steps)}
        busy = others.end() / (os.cpu_count() or 1) if self._is_here else 0.0
        return {**found, "others": busy}

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
        told = [one for one in self.mesh.status().values() if isinstance(one, Status)]
        return [pid for one in told for pid in (one.pid, one.engine_pid) if pid is not None]


def measure(mesh: Mesh, options: argparse.Namespace) -> list[Result]:
    """Every kind of request, warm; then what would have been chosen."""
    session, hosts = Session(mesh, options), len(mesh.record.members)
    results: list[Result] = []
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
            for images in (2 * hosts if placement == "data" else 2, 1):
                session.paint(common, images, placement)
        chosen = {}
        for number in range(options.rounds * (1 + MORE)):
            for case in cases:
                _round(session, case, number, options.rounds)
            for images in options.images:
                option = session.plan(common, images, None)
                assert option is not None
                chosen[images] = option
                if option.name != "mixed":
                    continue
                same = [c for c in cases if (c.images, c.placement) == (images, None)]
                if not same:
                    same = [Case(common, images, None, option.seconds, option)]
                    cases += same
                    _round(session, same[0], number, options.rounds)
        found = [case.result for case in sorted(cases, key=lambda case: case.images)]
        for images, option in chosen.items():
            own = {"chosen": option.name, "hosts": list(option.ranks)}
            found.append({**common, "images": images, **own})
        for result in found:
            say(line_of(result))
        results += found
        harness.write_json(options.json, results)
    return results


def _round(session: Session, case: Case, number: int, rounds: int) -> None:
    """One request of a kind, unless there are enough good ones."""
    if len(case.good) >= rounds:
        return
    option = session.plan(case.common, case.images, case.placement)
    if option is None or (case.placement is None and option.name != "mixed"):
        return
    case.option = option
    found = session.paint(case.common, case.images, case.placement)
    cold = option.cold_seconds + option.load_seconds
    case.rounds.append({"round": number, "predicted": option.seconds, "cold": cold, **found})


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    where = f"{_size(result)}, {_images(result)}"
    hosts = len(result["hosts"])
    if "chosen" in result:
        return f"{where}: {result['chosen']} on {hosts} is chosen"
    predicted, measured = result["predicted"], result["measured"]
    return (
        f"{where}, {result['placement']} on {hosts}: {predicted:.3f} s predicted, "
        f"{measured:.3f} measured{_mark(result)}"
    )


def report(results: Sequence[Result]) -> str:
    """Two tables: what was predicted and measured, and what was chosen."""
    cases = [result for result in results if "measured" in result]
    header = ["size", "images", "placement", "hosts", "unseen s", "predicted s", "measured s"]
    header += ["off", "spread", "step predicted ms", "measured ms", "by"]
    rows = [
        [
            _size(case),
            str(case["images"]),
            case["placement"],
            str(len(case["hosts"])),
            "" if case["unseen"] is None else f"{case['unseen']:.3f}",
            f"{case['predicted']:.3f}",
            f"{case['measured']:.3f}{_mark(case)}",
            f"{off(case):+.0%}",
            _spread(case),
            f"{1000 * case['step_predicted']:.1f}",
            f"{1000 * case['step_measured']:.1f}",
            case["figure"] + (", cold" if case["cold"] > COLD else ""),
        ]
        for case in cases
    ]
    tables = [harness.table(header, rows)]
    verdicts = [verdict(result, cases) for result in results if "chosen" in result]
    header = ["size", "images", "chosen", "hosts", "took s", "fastest", "took s", ""]
    tables.append(harness.table(header, verdicts))
    near = sum(abs(off(case)) <= NEAR for case in cases)
    tables.append(f"{near} of {len(cases)} requests took what was predicted, within {NEAR:.0%}.")
    alone = [case for case in cases if not _mark(case) and case["cold"] <= COLD]
    if len(alone) < len(cases):
        near = sum(abs(off(case)) <= NEAR for case in alone)
        tables.append(f"Of the {len(alone)} that were warm and left alone: {near}.")
    best = sum(row[-1] != WRONG for row in verdicts)
    tables.append(f"The default choice was the fastest, or a tie, {best} of {len(verdicts)} times.")
    return "\n\n".join(tables)


def rings(mesh: Mesh) -> Iterator[str]:
    """What the collectives of each ring that was measured take."""
    from fluxmesh.planning.collectives import fitted

    for ring in mesh.view.timings.rings:
        yield (
            f"ring of hosts {ring.ranks} over {ring.backend}: {ring.hidden:.0%} of a gather passes "
            f"beside products; formed in {ring.forming_seconds:.1f} s"
        )
        for what, table in (("gather", ring.gathers), ("sum", ring.sums)):
            latency, rate = fitted(table)
            points = ", ".join(f"{p.nbytes >> 10} KiB {1e3 * p.seconds:.3f} ms" for p in table)
            yield f"  {what}: {1e3 * latency:.3f} ms, {rate / 1e9:.3f} GB/s ({points})"


def off(case: Result) -> float:
    """By how much of the measured time the prediction is too long."""
    return float(case["predicted"] / case["measured"] - 1)


def verdict(result: Result, cases: Sequence[Result]) -> list[str]:
    """Whether what was chosen was the fastest of what was measured for this request."""
    same = [
        case for case in cases if (_size(case), case["images"]) == (_size(result), result["images"])
    ]
    fastest = min(same, key=lambda case: case["measured"])
    own = next((case for case in same if case["placement"] == result["chosen"]), None)
    took = "" if own is None else f"{own['measured']:.3f}"
    if own is fastest:
        judged = "the fastest"
    elif own is not None and own["measured"] <= TIE * fastest["measured"]:
        judged = "a tie"
    else:
        judged = WRONG
    return [
        _size(result),
        str(result["images"]),
        result["chosen"],
        str(len(result["hosts"])),
        took,
        fastest["placement"],
        f"{fastest['measured']:.3f}",
        judged,
    ]


def _mark(case: Result) -> str:
    """A star, where others kept processors busy in every round."""
    return "*" if case["others"] > LOUD else ""


def _spread(case: Result) -> str:
    """The fastest and the slowest round."""
    seconds = [one["measured"] for one in case["rounds"]]
    return f"{min(seconds):.3f}–{max(seconds):.3f}"


def _size(result: Result) -> str:
    return f"{result['height']}x{result['width']}"


def _images(result: Result) -> str:
    return f"{result['images']} image{'' if result['images'] == 1 else 's'}"


if __name__ == "__main__":
    main()
