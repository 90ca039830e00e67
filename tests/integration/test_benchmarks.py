"""The benchmarks at their small sizes: what they measure on a large machine works at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import trace
from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.folders import file_shapes
from benchmarks.harness import difference, typical
from benchmarks.overlap import ANEW
from benchmarks.packed import pays_from
from benchmarks.peers import Fluxmesh
from benchmarks.products import products
from benchmarks.sizes import FULL, SMALL_TRANSFORMERS, TRANSFORMERS
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux2 import tensor_maps as flux2_tensor_maps
from fluxmesh.models.flux2.config import Flux2Config
from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]


def run(
    tmp_path: Path, program: str, *options: str, seconds: float = 200
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


def test_step_times_klein_too(tmp_path: Path) -> None:
    printed, results = run(
        *(tmp_path, "step", "--model", "klein-4b", "--steps", "2", "--warmup", "1"),
        *("--what", "sum", "fluxmesh", "fluxmesh-low-memory"),
    )
    measured = {result["what"]: result for result in results}
    assert len(measured["fluxmesh"]["times"]) == 3 and measured["sum"]["seconds"] > 0
    assert measured["fluxmesh-low-memory"]["sample"] == measured["fluxmesh"]["sample"]
    assert measured["fluxmesh"]["sample"] and "failed" not in printed


def test_step_times_an_edit_beside_what_a_reference_adds_to_the_sum(tmp_path: Path) -> None:
    counts = ("--steps", "2", "--warmup", "1", "--what", "sum", "fluxmesh", "apple")
    printed, results = run(tmp_path, "step", "--model", "klein-9b-kv", "--references", "1", *counts)
    measured = {result["what"]: result for result in results}
    shapes = {shape["name"]: shape["shape"] for shape in measured["sum"]["shapes"]}
    assert shapes["attention"] == "8×48×8"  # 16 tokens each of the text, the image, the reference
    assert measured["fluxmesh"]["first"] > 0 and len(measured["fluxmesh"]["times"]) == 3
    assert "apple is not timed with a reference" in printed and "failed" not in printed


@pytest.mark.parametrize("model", ["kontext", "klein-4b", "klein-9b-kv"])
def test_the_references_of_a_benchmark_reach_the_transformer(model: str) -> None:
    config = SMALL_TRANSFORMERS[model]
    peer = (FluxmeshKlein if isinstance(config, Flux2Config) else Fluxmesh)(
        config, "float32", None, low_memory=False
    )
    alone = peer.denoise(64, 64, 1, 16, lambda: None)
    peer.references, peer.keeps_references = 1, model == "klein-9b-kv"
    edited = peer.denoise(64, 64, 1, 16, lambda: None)
    assert edited.shape == alone.shape
    assert np.linalg.norm(edited - alone) > 1e-3 * np.linalg.norm(alone)


def test_packed_times_three_products_of_each_number_of_rows(tmp_path: Path) -> None:
    printed, results = run(tmp_path, "packed", "--bits", "3", "8", "--steps", "1")
    assert [(result["bits"], result["number"]) for result in results] == [
        (bits, rows) for bits in (3, 8) for rows in (1, 16)
    ]
    for result in results:
        assert min(result[way] for way in ("quantized", "unpacked", "plain", "unpacking")) > 0
        assert 0 < result["apart"] < 3e-2  # both round to bfloat16
    assert "128→96, 8 bits: unpacking alone" in printed


@pytest.mark.parametrize(
    ("quantized", "unpacked", "expected"),
    [((1, 5, 9), (2, 3, 4), 8), ((1, 2, 3), (2, 3, 4), None), ((4, 1, 9), (2, 3, 4), 64)],
)
def test_unpacking_pays_from_where_it_is_faster_ever_after(quantized, unpacked, expected) -> None:
    numbers = zip((1, 8, 64), quantized, unpacked, strict=True)
    results = [{"number": n, "quantized": q, "unpacked": u} for n, q, u in numbers]
    assert pays_from(results) == expected


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_the_sum_counts_each_matrix_of_the_transformer_once_a_step(model: str) -> None:
    config = TRANSFORMERS[model]
    maps = flux2_tensor_maps if isinstance(config, Flux2Config) else tensor_maps
    counted = sum(
        product.columns * product.outputs * product.count for product in products(config, 1024, 512)
    )
    used = sum(
        target.shape[0] * target.shape[1]
        for name, target in maps.transformer_tensors(config).items()
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


def test_overlap_times_placements_with_a_link_and_without(tmp_path: Path) -> None:
    counts = ("--backend", "ring", "--steps", "2", "--warmup", "1", "--settings", "plain")
    printed, results = run(tmp_path, "overlap", *counts)
    steps = [result for result in results if "ranks" in result]
    ways = [f"{placement}{way}" for way in ("", ANEW) for placement in ("sequence", "tensor")]
    spread = [(way, linked) for way in ways for linked in (True, False)]
    assert [(r["way"], r["linked"]) for r in steps] == [("one", True), *spread]
    one = steps[0]
    for result in steps:
        assert len(result["ranks"]) == 2 and result["seconds"] == max(result["ranks"]) > 0
        if result["linked"] and result is not one:
            assert float(difference(result, one)) < 1e-5  # the same weights, the same picture
    assert "plain, bare gathers, 64²" in printed and "fail" not in printed


def test_overlap_computes_both_ends_of_a_group_without_one(tmp_path: Path) -> None:
    counts = ("--backend", "none", "--engines", "4", "--steps", "2", "--warmup", "1")
    ways = ("one", "bare gathers", "sequence")
    printed, results = run(tmp_path, "overlap", *counts, "--settings", "plain", "--ways", *ways)
    assert [(result["way"], len(result.get("ranks", ()))) for result in results] == [
        *(("one", 1), ("bare gathers", 0), ("sequence", 2))
    ]
    assert "bare gathers: skipped: a rank alone gathers nothing" in printed
    assert "| plain | sequence | 64² |" in printed and "failed" not in printed


def test_a_step_that_is_reported_late_counts_with_its_neighbours() -> None:
    assert typical([0.3, 0.1, 0.2, 0.3, 0.1, 0.2]) == pytest.approx(0.2)
    assert typical([0.4]) == 0.4


def test_overlap_gives_up_a_way_that_hangs_and_goes_on(tmp_path: Path) -> None:
    options = ("--backend", "none", "--settings", "plain", "--limit", "0.01")
    _, results = run(tmp_path, "overlap", *options, "--ways", "one", "sequence")
    assert [result["way"] for result in results] == ["one", "sequence"]
    assert all("failed" in result for result in results)


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


def test_memory_tells_the_peaks_of_klein(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    variants = ("--what", "klein-4b", "klein-4b-4-bit", "--folder", str(room))
    _, results = run(tmp_path, "memory", "--steps", "1", *variants)
    plain, packed = (measurement["peaks"][0] for measurement in results)
    assert all(plain[phase] > 0 for phase in ("load", "text", "denoise", "decode"))
    assert packed["load"] < plain["load"] and packed["text"] < plain["text"]
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
def test_load_times_the_commands_alone_with_a_model_that_is_there(
    tmp_path: Path, checkpoint: Path
) -> None:
    """Seven commands, each a process: half a minute by themselves, more beside other tests."""
    printed, results = run(
        *(tmp_path, "load", "--model", str(checkpoint), "--steps", "1"), seconds=300
    )
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


def test_unequal_hosts_are_timed_with_equal_shares_and_with_the_planners(tmp_path: Path) -> None:
    printed, results = run(tmp_path, "unequal", "--steps", "1", "--placements", "sequence")
    assert [result["name"] for result in results] == ["equal", "chosen"]
    for result in results:
        assert len(result["alone"]) == len(result["compute"]) == 2
        assert min(result["seconds"], *result["compute"], result["predicted"]) > 0
    assert results[0]["shares"] == [] and "| sequence | equal |" in printed


def test_a_trace_tells_the_host_s_time_and_needs_a_gpu_for_the_rest(tmp_path: Path) -> None:
    for options in ((), ("--engines", "2", "--backend", "ring")):
        printed, (host, gpu) = run(tmp_path, "trace", *options)
        assert host["described"] > 0 and host["handed"] > 0
        assert "The host, ms a step: described in " in printed
        assert gpu["skipped"] == "kernels are traced on NVIDIA GPUs"


def test_a_trace_is_summed_up_by_kernels_and_pauses() -> None:
    def kernel(name: str, begins: float, lasts: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begins, "dur": lasts}

    events = [
        kernel("b", 105, 20),  # with a; then a pause of 5 µs
        kernel("a", 100, 10),
        {"ph": "X", "cat": "cpu_op", "name": "no kernel", "ts": 0, "dur": 999},
        kernel("a", 130, 10),
        kernel("c", 240, 60),  # after a pause of 100
    ]
    found = trace.summary(events, steps=2)
    assert found["kernels"] == [("c", 1, 60e-6), ("a", 2, pytest.approx(20e-6)), ("b", 1, 20e-6)]
    assert found["whole"] == pytest.approx(200e-6)
    assert found["busy"] == pytest.approx(95e-6)
    assert found["short_pauses"] == pytest.approx(5e-6)
    assert found["long_pauses"] == [(pytest.approx(100e-6), "a", "c")]
    printed = trace.told(found, top=2)
    assert "0.10 in all, busy 0.05" in printed
    assert "| a | 1.0 | 10.0 | 0.01 |" in printed and "| b |" not in printed
    assert "| 0.10 | a | c |" in printed
