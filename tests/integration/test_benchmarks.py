"""The benchmarks at their small sizes: what they measure on a large machine works at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import difference
from benchmarks.products import products
from benchmarks.sizes import FULL
from fluxmesh.flux import layouts
from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, program: str, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """What a program printed, and what it measured."""
    written = tmp_path / "measured.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"benchmarks.{program}",
            "--small",
            *options,
            "--json",
            str(written),
        ],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(written.read_text())["results"]


def test_step_times_fluxmesh_beside_the_sum_and_says_what_is_left_out(tmp_path: Path) -> None:
    whats = ("sum", "fluxmesh", "fluxmesh-low-memory", "apple")
    counts = ("--steps", "2", "--warmup", "1")
    printed, results = run(tmp_path, "step", *counts, "--what", *whats)
    measured = {result["what"]: result for result in results}
    assert len(measured["fluxmesh"]["times"]) == 3
    assert all(measured[what]["seconds"] > 0 for what in whats[:3])
    assert {shape["name"] for shape in measured["sum"]["shapes"]} >= {"attention", "single linear1"}
    assert "apple: skipped: --apple names no folder" in printed
    # The same weights in another process: dropping those of the modulation changes nothing.
    assert measured["fluxmesh-low-memory"]["sample"] == measured["fluxmesh"]["sample"]
    assert measured["fluxmesh"]["sample"]


def test_the_sum_counts_each_matrix_of_the_transformer_once_a_step() -> None:
    counted = sum(
        one.columns * one.outputs * one.count for one in products(FULL.transformer, 1024, 512)
    )
    used = sum(
        target.shape[0] * target.shape[1]
        for name, target in layouts.transformer_tensors(FULL.transformer).items()
        if len(target.shape) == 2 and "mod" not in name and not name.endswith("_in.in_layer.weight")
        and not name.endswith("_in.out_layer.weight")
    )  # fmt: skip
    assert counted == used


def test_mesh_measures_each_placement_beside_what_was_predicted(tmp_path: Path) -> None:
    counts = ("--steps", "2", "--warmup", "1", "--images", "3", "--image-steps", "1")
    printed, results = run(
        tmp_path,
        "mesh",
        *counts,
        "--dtype",
        "float32",
        "--what",
        "one",
        "tensor",
        "sequence",
        "data",
    )
    steps = {result["what"]: result for result in results if "seconds" in result}
    requests = {result["what"]: result for result in results if "request" in result}
    assert set(steps) == {"one", "tensor", "sequence"} and set(requests) == {"one", "data"}
    for what in ("tensor", "sequence"):
        assert steps[what]["engines"] == 2
        assert steps[what]["sent_a_step"] > 0 and steps[what]["rate"] > 0
        assert steps[what]["predicted"] > 0
        assert float(difference(steps[what], steps["one"])) < 1e-5  # the same weights on each rank
    assert requests["data"]["predicted"] == requests["one"]["request"] / 3 * 2
    assert "failed" not in printed
