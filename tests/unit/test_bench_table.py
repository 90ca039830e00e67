"""The table of `bench`: every figure in its column, on lines that fit, with what explains them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import CollectiveTime, LinkInfo, MeshView, Placement, RingTiming
from fluxmesh.errors import HostUnreachableError
from fluxmesh.request import GenerateRequest
from fluxmesh.version import __version__
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.commands.bench import Bench, _Run, host_of, slower
from fluxmesh_coordinator.console.bench_table import (
    BenchHost,
    BenchReport,
    BenchRow,
    as_json,
    lines,
    sentence,
)
from tests.messages import sample
from tests.unit.meshes import full, mac, small
from tests.unit.test_macos_checks import GOOD, MAC

HOST = BenchHost(
    rank=0,
    name="studio",
    chip="Apple M2 Ultra",
    memory_bytes=192 * 10**9,
    mlx_version="0.32.4",
    system="macOS 26.2",
)
ROW = BenchRow(
    model="dev",
    weights="bfloat16",
    height=1024,
    width=512,
    placement="data",
    hosts=(0,),
    predicted_step=2.5,
    predicted_from="step",
    step=2.75,
    predicted_picture=12.0,
    picture=12.5,
    first_picture=33.0,
)
RING = replace(ROW, placement="sequence", hosts=(0, 1), step=1.5)
UNFIT = BenchRow(
    model="/Users/ada/models/mine",
    weights="4 bits",
    height=64,
    width=64,
    placement="tensor",
    hosts=(0, 1),
    problem="It does not fit.",
)
REPORT = BenchReport(hosts=(HOST,), rows=(ROW, RING, UNFIT))


def test_the_table_has_a_row_for_each_way_under_its_headings() -> None:
    assert lines(REPORT, 200, 0.0) == [
        f"fluxmesh {__version__}",
        "Host 0 (studio): Apple M2 Ultra, 192 GB, macOS 26.2, MLX 0.32.4",
        "",
        "model  weights   size      placement  hosts  predicted step    step  predicted picture  "
        "picture  first picture",
        "dev    bfloat16  1024x512  data       0               2.5 s  2.75 s               12 s   "
        "12.5 s           33 s",
        "dev    bfloat16  1024x512  sequence   0,1             2.5 s   1.5 s               12 s   "
        "12.5 s           33 s",
        "mine   4 bits    64x64     tensor     0,1",
        "",
        "mine at 64x64 by tensor on hosts 0,1: not measured: It does not fit.",
    ]


def test_a_narrow_terminal_gets_the_steps_and_no_folded_line() -> None:
    report = replace(REPORT, rows=(ROW, RING))
    table = lines(report, 70, 0.0)[3:]
    assert max(map(len, table)) <= 70
    assert "first picture" not in table[0] and "predicted step" in table[0] and "2.75 s" in table[1]


def test_links_rings_and_what_explains_the_figures_stand_below() -> None:
    times = (CollectiveTime(4096, 1e-4), CollectiveTime(1 << 24, 1e-2))
    ring = RingTiming(
        backend="jaccl", ranks=(0, 1), gathers=times, sums=times, hidden=0.5, when=100.0
    )
    report = replace(
        REPORT,
        hosts=(replace(HOST, remarks=("Low Power Mode slows the GPU",)),),
        rows=(replace(ROW, slower=1.5, predicted_from="arithmetic"), RING),
        links=(LinkInfo(source=0, target=1, rate=1.25e9, latency=1e-4),),
        rings=(ring,),
        notes=("Hosts 0, 1 go on over ring.",),
    )
    below = lines(report, 200, 100.0)[7:]
    assert below[0] == "Link 0 to 1: 1.25 GB/s, 0.10 ms"
    assert below[1].startswith("Ring of hosts 0,1 over jaccl, measured 0 s ago: gathers take ")
    assert below[2:4] == ["Hosts 0, 1 go on over ring.", "Host 0: Low Power Mode slows the GPU."]
    assert below[4].startswith("dev at 1024x512 by data on hosts 0: its last steps took 1.50 times")
    assert below[5].startswith("Steps that nobody had timed before were predicted from the rate")


def test_programs_read_all_of_it() -> None:
    told = json.loads(json.dumps(as_json(REPORT)))
    assert (told["event"], told["version"]) == ("bench", __version__)
    assert told["hosts"][0]["chip"] == "Apple M2 Ultra"
    assert [row["step"] for row in told["rows"]] == [2.75, 1.5, None]


def test_a_row_is_told_as_soon_as_it_is_measured() -> None:
    assert (
        sentence(RING) == "dev at 1024x512 by sequence on hosts 0,1: 1.5 s a step, 12.5 s in all."
    )
    assert sentence(UNFIT) == "mine at 64x64 by tensor on hosts 0,1: not measured: It does not fit."


def test_steps_that_grow_slower_are_compared_with_the_first() -> None:
    assert slower([1.0, 1.0, 2.0, 2.0]) == 2.0
    assert slower([9.0]) == slower([]) == 1.0
    assert slower([0.01, 0.02]) == 1.0  # that says nothing of heat


def test_a_row_without_figures_costs_the_others_no_column() -> None:
    why = "dev does not fit: host 1 (mini) has 16 GB and needs 24 GB; take --bits 4, or more hosts."
    report = replace(REPORT, rows=(ROW, RING, replace(UNFIT, problem=why)))
    for width in (40, 80, 120, 200):
        fits, alone = (
            lines(replace(REPORT, rows=rows), width, 0.0) for rows in (report.rows, (ROW, RING))
        )
        assert fits[3] == alone[3]
        assert width < 80 or max(map(len, fits[3:7])) <= width
        assert sum(why in line for line in fits) == 1


def run_of(steps: dict[int, list[float]], placement: str = "data") -> _Run:
    run = _Run()
    run.seconds, run.placement, run.steps = 9.0, placement, steps
    run.hosts = tuple(steps) or (0, 1)
    return run


def measured(
    monkeypatch: pytest.MonkeyPatch, placement: Placement, *runs: _Run
) -> tuple[list[BenchRow], int]:
    """The rows of two hosts, and how many of the runs it took."""
    left = list(runs)
    sizes = small()
    request = sizes.fill(GenerateRequest("a cat", 0, model="m", n_images=2))
    resolved = SimpleNamespace(request=request, model=SimpleNamespace(sizes=sizes))
    monkeypatch.setattr(Bench, "_view", lambda _: full(mac(0), mac(1)))
    monkeypatch.setattr(Bench, "_resolved", lambda *_: resolved)
    monkeypatch.setattr(Bench, "_run", lambda *_: left.pop(0))
    painter: Any = SimpleNamespace(reporter=SimpleNamespace(note=lambda text: None))
    return Bench(painter)._measured("m", None, placement), len(runs) - len(left)


def test_a_way_that_cannot_be_gone_says_why_and_not_that_somebody_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.unit.test_bench_table.full", lambda *hosts: MeshView(hosts))
    (row,), count = measured(monkeypatch, "sequence")
    assert count == 0 and row.problem == "no link from host 0 to host 1"


def test_a_host_that_was_cold_in_the_run_that_counts_has_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run may be over before a slow host has loaded."""
    first, cold = run_of({0: [1.0, 1.0]}), run_of({0: [1.0], 1: [8.0]})
    rows, count = measured(monkeypatch, "data", first, cold, run_of({0: [1.0], 1: [2.0]}))
    assert count == 3
    assert [(row.hosts, row.step) for row in rows] == [((0,), 1.0), ((1,), 2.0)]


@pytest.mark.parametrize("placement", ["data", "sequence"])
def test_a_run_of_which_no_step_was_left_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch, placement: Placement
) -> None:
    """A host was lost when all steps were made: what was planned then was a decode alone."""
    runs = run_of({0: [1.0]}, placement), run_of({}, placement)
    (row,), _ = measured(monkeypatch, placement, *runs)
    assert row.step is None and row.problem == "a host was lost meanwhile"


def test_a_mac_is_named_by_its_system_and_what_slows_it_down() -> None:
    status, here = sample(Status, random.Random(0)), Host(0, "127.0.0.1")
    hot = {**MAC, "low_power": True, "heat": 2, "hidden": ["/a.pth"]}
    host = host_of(here, status, {**GOOD, "memory_bytes": 1 << 36, "mac": hot}, "ring")
    assert (host.system, host.chip, host.mlx_version) == (
        "macOS 26.2",
        status.kind,
        status.mlx_version,
    )
    assert [remark.split()[:2] for remark in host.remarks] == [["Low", "Power"], ["so", "hot"]]
    assert host_of(here, status, {"system": "Linux x86_64"}, "ring").system == "Linux x86_64"
    assert host_of(here, status, {}, "ring").system == ""


def test_a_mesh_of_which_nobody_answers_is_not_measured() -> None:
    mesh = SimpleNamespace(
        view=MeshView(()),
        status=lambda: {0: "studio: its agent does not answer."},
        record=SimpleNamespace(name="mesh.json"),
    )
    painter: Any = SimpleNamespace(mesh=mesh)
    with pytest.raises(HostUnreachableError, match="mesh.json answers: studio: its agent") as told:
        list(Bench(painter).rows(["tiny"], []))
    assert told.value.exit_code == 3
