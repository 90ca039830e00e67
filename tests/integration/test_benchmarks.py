"""The benchmarks at their small sizes: what they measure on a large machine works at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.folders import file_shapes
from benchmarks.harness import difference
from benchmarks.products import products
from benchmarks.sizes import FULL
from fluxmesh.models.flux1 import tensor_maps
from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]


def run(
    tmp_path: Path, program: str, *options: str, seconds: float = 100
) -> tuple[str, list[dict[str, Any]]]:
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
        timeout=seconds,
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
        product.columns * product.outputs * product.count
        for product in products(FULL.transformer, 1024, 512)
    )
    used = sum(
        target.shape[0] * target.shape[1]
        for name, target in tensor_maps.transformer_tensors(FULL.transformer).items()
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


def test_memory_tells_the_peak_of_each_phase_on_each_host(tmp_path: Path) -> None:
    variants = ("--what", "schnell", "dev-low-memory", "--engines", "2")
    room = tmp_path / "room"
    room.mkdir()
    printed, results = run(tmp_path, "memory", "--steps", "1", *variants, "--folder", str(room))
    assert [(measurement["what"], len(measurement["peaks"])) for measurement in results] == [
        (what, hosts) for what in ("schnell", "dev-low-memory") for hosts in (1, 2)
    ]
    whole, sharded = (measurement["peaks"] for measurement in results[:2])
    assert all(peak > 0 for peak in whole[0].values())
    # Each of two hosts reads half of the blocks, and only one of them the prompt.
    assert max(own["load"] for own in sharded) < 0.7 * whole[0]["load"]
    assert sharded[0]["text"] > 0 and sharded[1]["text"] == 0
    assert list(room.iterdir()) == []


def test_load_compares_an_engine_with_the_disk(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    printed, results = run(tmp_path, "load", "--no-requests", "--folder", str(room))
    engines = [loading for loading in results if loading["what"] == "engine"]
    disks = [loading for loading in results if loading["what"] == "disk"]
    assert [loading["cache"] for loading in engines] == [loading["cache"] for loading in disks]
    assert engines[-1]["cache"] == "cached"
    for loading in engines:
        assert loading["held"] <= loading["peak"] <= loading["held"] + 2 * loading["largest"]
        assert 0 < loading["check"] < loading["seconds"]
    assert list(room.iterdir()) == []


@pytest.mark.timeout(320)
def test_load_times_the_commands_alone_with_a_model_that_is_there(tmp_path: Path) -> None:
    """Seven commands, each a process: a minute by themselves, more beside other tests."""
    printed, results = run(tmp_path, "load", "--model", "tiny", "--steps", "1", seconds=300)
    assert [measurement["what"] for measurement in results] == [
        *["a process for the request"] * 2,
        "fluxmesh up",
        *[f"{number} request to the warm mesh" for number in ("first", "second", "third")],
    ]
    assert "| third request to the warm mesh |" in printed
    assert "who reads" not in printed


def test_train_times_a_step_of_each_kind_and_repeats_its_gradients(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    whats = ("bf16", "4-bit-checkpointed", "apple")
    options = ("--steps", "2", "--side", "16", "--folder", str(room))
    printed, results = run(tmp_path, "train", *options, "--what", *whats)
    measured = {result["what"]: result for result in results}
    for what in whats[:2]:
        assert len(measured[what]["times"]) == 2
        assert 0 < measured[what]["peak"] <= measured[what]["whole_peak"]
        assert measured[what]["same"] is True
    assert "apple: skipped: --apple names no folder" in printed
    assert list(room.iterdir()) == []


def test_the_full_size_is_that_of_flux() -> None:
    tensors = tensor_maps.transformer_tensors(FULL.transformer)
    assert tensor_maps.parameter_count(tensors) == 11_901_408_320  # of FLUX.1-dev
    shapes = file_shapes(tensors)
    assert shapes["transformer_blocks.18.attn.to_q.weight"] == (3072, 3072)
    assert shapes["norm_out.linear.weight"] == (6144, 3072)


def test_warm_compares_the_first_request_after_up_with_the_next(
    tmp_path: Path, checkpoint: Path
) -> None:
    options = ("--hosts", "1", "--placements", "data", "--requests", "2", "--steps", "1")
    printed, results = run(tmp_path, "warm", *options, "--no-kill", "--model", str(checkpoint))
    up, first, second = results
    assert [(ready["placement"], ready["height"]) for ready in up["ready"]] == [("data", 32)]
    assert (first["number"], second["number"]) == (1, 2)
    assert first["loads"] == [] and first["how"] == "data" and first["ranks"] == [0]
    ratio = f"{first['seconds'] / second['seconds']:.2f}"
    assert f"| data | data on 1 | {first['seconds']:.2f} |" in printed and ratio in printed


def test_plans_holds_what_was_predicted_against_what_agents_took(
    tmp_path: Path, checkpoint: Path
) -> None:
    options = ("--hosts", "2", "--model", str(checkpoint), "--sizes", "32x32", "--steps", "1")
    more = ("--images", "1", "--rounds", "1", "--placements", "data", "sequence")
    printed, results = run(tmp_path, "plans", *options, *more)
    firsts = [first for first in results if "first" in first]
    assert [first["first"] for first in firsts] == ["data", "sequence"]
    assert all(first["took"] > 0 and first["predicted"] > 0 for first in firsts)
    *cases, choice = results[len(firsts) :]
    assert [(case["placement"], len(case["hosts"])) for case in cases] == [
        ("data", 1),
        ("sequence", 2),
    ]
    for case in cases:
        assert case["measured"] > 0 and case["predicted"] > 0 and case["unseen"] > 0
        assert 1 <= len(case["rounds"]) <= 3
    assert choice["chosen"] in ("data", "sequence", "tensor", "mixed")
    for text in (
        "| predicted s | measured s | off |",
        "| chosen |",
        "ring of hosts (0, 1) over ring",
    ):
        assert text in printed
