"""What `plans.py` prints: predicted beside measured, and what was chosen beside the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks import harness
from benchmarks.harness import Result

if TYPE_CHECKING:
    from fluxmesh_coordinator.runtime.mesh import Mesh

TIE = 1.05
NEAR = 0.15  # off by no more than this counts as predicted
LOUD = 0.05  # of the machine's processors, that others may keep busy
WRONG = "NOT the fastest"
COLD = 0.05  # seconds beside the warm request, which loading and forming a ring may take


def line_of(result: Result) -> str:
    """One result as it comes."""
    where = f"{_size(result)}, {_images(result)}"
    if "first" in result:
        predicted, took = result["predicted"], result["took"]
        first = f"{where}, the first by {result['first']}"
        return f"{first}: {predicted:.3f} s predicted, {took:.3f} taken"
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
    seconds = [measurement["measured"] for measurement in case["rounds"]]
    return f"{min(seconds):.3f}–{max(seconds):.3f}"


def _size(result: Result) -> str:
    return f"{result['height']}x{result['width']}"


def _images(result: Result) -> str:
    return f"{result['images']} image{'' if result['images'] == 1 else 's'}"
