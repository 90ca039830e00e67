"""Does the mesh that is up do what the planner predicts, and is its choice the fastest one?

    fluxmesh up mesh.json --model dev && python -m benchmarks.plans
    python -m benchmarks.plans --model tiny --sizes 64x64 128x128 --images 1 3 --steps 4
    python -m benchmarks.plans --limited 2 --rate 125e6 --model tiny     # Linux, as root

For each size and number of images, every placement is asked for, and the time from the request to
its last picture is laid beside what `plan` said before: "unseen" is what it said when no such
request had been made on this mesh, "predicted" after one had. Each request has a prompt of its own,
which is read. Then, for each size and number, what `generate` would choose by itself, and whether
that was the fastest; ways within 5% of each other are a tie.

`--limited N` brings up a mesh of its own: N network namespaces of this machine, joined by links of
`--rate` bytes a second, as slow cables are (`limited.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Result, say

if TYPE_CHECKING:
    from fluxmesh.planning.plan import Option
    from fluxmesh_coordinator.runtime.mesh import Mesh

PLACEMENTS = ("data", "sequence", "tensor")
TIE = 1.05
NEAR = 0.15  # off by no more than this counts as predicted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="else the one that is loaded")
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], type=size)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, help="else the model's own number")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--rounds", type=int, default=1, help="requests of each kind: the median")
    parser.add_argument("--limited", type=int, metavar="N", help="hosts with slow links, here")
    parser.add_argument("--rate", type=float, default=125e6, help="of such a link, in bytes/s")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    with _mesh(options) as mesh:
        for result in measure(mesh, options):
            results.append(result)
            say(line_of(result))
            harness.write_json(options.json, results)
        say("\n" + report(results))
        say("\n" + "\n".join(rings(mesh)))


def size(text: str) -> tuple[int, int]:
    """(height, width) of "512x768"."""
    height, _, width = text.partition("x")
    return int(height), int(width)


@contextlib.contextmanager
def _mesh(options: argparse.Namespace) -> Iterator[Mesh]:
    """The mesh that is up, or one of slow links for the time of the run."""
    from benchmarks.limited import limited
    from fluxmesh.errors import UsageError
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.runtime.mesh import Mesh

    with contextlib.ExitStack() as stack:
        if options.limited:
            stack.enter_context(limited(options.limited, options.rate, options.model or "tiny"))
        up = mesh_file.load()
        if up is None:
            raise UsageError("No mesh is up; run `fluxmesh up` with its hostfile first.")
        if options.model is None:
            options.model = up.weights.model if up.weights else "tiny"
        yield stack.enter_context(Mesh.connect())


# Measuring


def measure(mesh: Mesh, options: argparse.Namespace) -> Iterator[Result]:
    """Every kind of request, warm; then what would have been chosen."""
    prompts = (f"a photo of {number} red apples on a table" for number in itertools.count(2))
    hosts = len(mesh.record.members)
    for height, width in options.sizes:
        common = {"model": options.model, "height": height, "width": width}
        unseen = {
            (placement, images): _seconds(_plan(mesh, options, common, images, placement))
            for placement in options.placements
            for images in options.images
        }
        usable = [
            placement
            for placement in options.placements
            if _plan(mesh, options, common, 1, placement) is not None
        ]
        for placement in usable:  # kernels compile, rings form, all hosts load
            images = 2 * hosts if placement == "data" else 2
            _paint(mesh, options, common, images, placement, next(prompts))
        for images in options.images:
            for placement in usable:
                yield _case(
                    mesh, options, common, images, placement, prompts, unseen[placement, images]
                )
            chosen = _plan(mesh, options, common, images, None)
            assert chosen is not None
            if chosen.name == "mixed":
                first = chosen.seconds
                yield _case(mesh, options, common, images, None, prompts, first)
            yield {
                **common,
                "images": images,
                "chosen": chosen.name,
                "hosts": list(chosen.ranks),
            }


def _case(
    mesh: Mesh,
    options: argparse.Namespace,
    common: dict[str, Any],
    images: int,
    placement: Any,
    prompts: Iterator[str],
    unseen: float | None,
) -> Result:
    predicted: list[float] = []
    measured: list[float] = []
    steps: list[float] = []
    for _ in range(options.rounds):
        option = _plan(mesh, options, common, images, placement)
        assert option is not None
        predicted.append(option.seconds)
        seconds, own = _paint(mesh, options, common, images, placement, next(prompts))
        measured.append(seconds)
        steps += own
    return {
        **common,
        "images": images,
        "placement": placement or option.name,
        "hosts": list(option.ranks),
        "unseen": unseen,
        "predicted": statistics.median(predicted),
        "measured": statistics.median(measured),
        "step_predicted": option.phases[0].step_seconds,
        "step_measured": statistics.median(steps),
        "figure": option.phases[0].figure,
        "cold": option.cold_seconds,
    }


def _request(options: argparse.Namespace, common: dict[str, Any], images: int, text: str) -> Any:
    from fluxmesh.request import GenerateRequest

    return GenerateRequest(text, 7, n_images=images, steps=options.steps, **common)


def _plan(
    mesh: Mesh, options: argparse.Namespace, common: dict[str, Any], images: int, placement: Any
) -> Option | None:
    request = _request(options, common, images, "a plan")
    return mesh.plan(request, placement).winner


def _seconds(option: Option | None) -> float | None:
    return None if option is None else option.seconds


def _paint(
    mesh: Mesh,
    options: argparse.Namespace,
    common: dict[str, Any],
    images: int,
    placement: Any,
    prompt: str,
) -> tuple[float, list[float]]:
    """Seconds from the request to its last picture, and those of each step."""
    from fluxmesh.events import Picture, Step

    start, end, steps = time.perf_counter(), 0.0, list[float]()
    for event in mesh.generate(_request(options, common, images, prompt), placement):
        if isinstance(event, Picture):
            end = time.perf_counter()
        elif isinstance(event, Step):
            steps.append(event.seconds)
    return end - start, steps


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
        f"{measured:.3f} measured"
    )


def report(results: Sequence[Result]) -> str:
    """Two tables: what was predicted and measured, and what was chosen."""
    cases = [result for result in results if "measured" in result]
    header = ["size", "images", "placement", "hosts", "unseen s", "predicted s", "measured s"]
    header += ["off", "step predicted ms", "measured ms", "by"]
    rows = [
        [
            _size(case),
            str(case["images"]),
            case["placement"],
            str(len(case["hosts"])),
            "" if case["unseen"] is None else f"{case['unseen']:.3f}",
            f"{case['predicted']:.3f}",
            f"{case['measured']:.3f}",
            f"{off(case):+.0%}",
            f"{1000 * case['step_predicted']:.1f}",
            f"{1000 * case['step_measured']:.1f}",
            case["figure"] + (", cold" if case["cold"] > 0.05 else ""),
        ]
        for case in cases
    ]
    tables = [harness.table(header, rows)]
    verdicts = [verdict(result, cases) for result in results if "chosen" in result]
    header = ["size", "images", "chosen", "hosts", "took s", "fastest", "took s", ""]
    tables.append(harness.table(header, verdicts))
    near = sum(abs(off(case)) <= NEAR for case in cases)
    tables.append(f"{near} of {len(cases)} requests took what was predicted, within {NEAR:.0%}.")
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
        judged = "NOT the fastest"
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


def _size(result: Result) -> str:
    return f"{result['height']}x{result['width']}"


def _images(result: Result) -> str:
    return f"{result['images']} image{'' if result['images'] == 1 else 's'}"


if __name__ == "__main__":
    main()
