"""`fluxmesh bench`, as a user runs it: on this machine alone, on a mesh, and broken off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import Run, environment
from tests.integration.test_mesh_commands import MeshMachine, machine

__all__ = ["machine"]  # a fixture


def test_a_machine_without_a_mesh_is_measured_with_the_embedded_model(fluxmesh: Run) -> None:
    done = fluxmesh("bench", "--size", "32x32", "--steps", 2, "--json")
    assert done.code == 0, done.err
    (row,) = done.of("benched")
    assert (row["model"], row["placement"], row["hosts"]) == ("tiny", "data", [0])
    assert (row["height"], row["width"], row["weights"]) == (32, 32, "bfloat16")
    figures = ("predicted_step", "step", "predicted_picture", "picture", "first_picture")
    assert all(row[figure] > 0 for figure in figures)
    assert row["picture"] > 2 * row["step"] and row["predicted_from"] == "arithmetic"
    (report,) = done.of("bench")
    row.pop("event")
    assert report["rows"] == [row] and done.events[-1] == report
    (host,) = report["hosts"]
    assert host["chip"] and host["mlx_version"] and host["system"]
    assert len(done.of("step")) == 4 and len(done.of("picture")) == 2  # of two runs


def test_a_mesh_is_measured_by_each_placement(machine: MeshMachine) -> None:
    machine.env |= {"FLUXMESH_DELAYS": "step=0.4"}  # else one host is done before the other begins
    machine.up(machine.hostfile(2), "--no-warm")
    done = machine("bench", "--model", machine.model, "--steps", 2)
    assert done.code == 0, done.err
    head, _, rest = done.out.partition("\nmodel ")
    assert head.count("MLX 0.") == 2
    table, _, below = rest.partition("\n\n")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [(row[3], row[4]) for row in rows] == [
        ("data", "0"),
        ("data", "1"),
        ("sequence", "0,1"),
        ("tensor", "0,1"),
    ]
    assert all(row.count("s") == 5 for row in rows), rows  # figures: "0.1 s"
    assert "Link 0 to 1: " in below and "Ring of hosts 0,1 over ring" in below
    assert str(machine.model) not in done.out  # the folders of a user are nobody's business
    assert "by sequence on hosts 0,1: " in done.err  # told as soon as it was measured

    missing = machine("bench", "--model", "no-such-model")
    assert missing.code == 2 and "no-such-model" in missing.err
    assert machine("bench", "--steps", "0").code == 2


def test_a_bench_that_is_broken_off_leaves_nothing(tmp_path: Path, home: Path) -> None:
    command = [sys.executable, "-m", "fluxmesh_coordinator", "bench", "--json"]
    slow = environment(home) | {"FLUXMESH_DELAYS": "step=0.5"}
    with subprocess.Popen(
        [*command, "--size", "32x32", "--steps", "50"],
        cwd=tmp_path,
        env=slow,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                process.send_signal(signal.SIGINT)
                break
        out, _ = process.communicate(timeout=100)
        last = json.loads(out.splitlines()[-1])
        assert process.returncode == 130 and last["event"] == "error"
        assert last["exit_code"] == 130
