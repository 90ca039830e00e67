"""The yardstick of `tools/same_pictures.py`: its cases miss no option, and it sees what differs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxmesh.weights import hub
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.cli.generate import generate
from tests.flux1_adapters import read_adapter
from tools.same_cases import INPUTS, PICTURES, UPDATES, write_inputs
from tools.same_pictures import compare, differences, fields_of, picture_of, tensors_of

# What becomes of a painted picture, and whether an empty prompt is meant: these change no pixel.
UNSEEN = {"--open", "--show", "--allow-empty-prompt", "--no-metadata", "--preview"}
# Edges are found by a library that need not be there; what is found is `--control`'s.
ELSEWHERE = {"--control-from"}


def test_every_option_of_generate_is_in_some_case() -> None:
    named = {
        option
        for case in PICTURES
        for option in case.command(on_mesh=True)
        if option.startswith("-") and not option.removeprefix("-").isdigit()
    }
    missing = [
        parameter.opts[-1]
        for parameter in generate.params
        if parameter.param_type_name == "option"
        and not (named | UNSEEN | ELSEWHERE) & set(parameter.opts)
    ]
    assert missing == []
    names = {case.name for case in PICTURES}
    assert len(PICTURES) == len(names) == 25
    assert not names & {"lines", "training"}  # what else stands beside a road's cases


def test_the_inputs_are_the_same_every_time_and_fit_the_model(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_inputs(tmp_path / name)
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len([path for path in files if path.parent.parent == tmp_path]) == 6
    for path in files:
        assert (
            path.read_bytes()
            == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()
        )
    config = hub.resolve("tiny").architecture.transformer
    for name, modules in (("peft", 3), ("kohya", 2)):
        assert len(read_adapter(tmp_path / "one" / f"{name}.safetensors", config)) == modules
    assert INPUTS == "inputs" and UPDATES == 20


def test_a_picture_is_known_by_its_pixels_and_what_is_written_into_it(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(pixels, '{"seed": 7}'))
    first = picture_of(path)
    assert (first["size"], first["recipe"]) == ("2x3x3", {"seed": 7})
    path.write_bytes(encode_png(pixels, '{"seed": 8}'))
    assert picture_of(path)["pixels"] == first["pixels"]
    assert [where for where, *_ in differences(first, picture_of(path))] == [
        "file",
        "recipe / seed",
    ]
    pixels[0, 0, 0] = 1
    Image.fromarray(pixels).save(path)
    assert picture_of(path)["pixels"] != first["pixels"]


def test_tensors_are_told_apart_by_name_and_bytes(tmp_path: Path) -> None:
    write_inputs(tmp_path / INPUTS)
    path = tmp_path / INPUTS / "peft.safetensors"
    before = tensors_of(path)
    assert len(before) == 6 and math.prod(len(key) for key in before)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(list(differences(before, tensors_of(path)))) == 1
    assert tensors_of(tmp_path / "absent") == {}


def test_fields_of_lines_are_names_and_types_without_values() -> None:
    lost = {"event": "hostlost", "reason": "a step did not come within 5 s"}
    lines = [lost, {"event": "step", "seconds": 0.1}, {"event": "step", "seconds": 2, "host": None}]
    assert fields_of(lines) == {
        "step": {"event": ["str"], "seconds": ["float", "int"], "host": ["NoneType"]}
    }


def result(**case: Any) -> dict[str, Any]:
    picture = {"pixels": "p", "file": "f", "recipe": {"seed": 1}}
    whole = {
        "exit": 0,
        "values": ["a"],
        "plans": ["tensor on 0, 1"],
        "pictures": {"x.png": picture},
    }
    return {"three": {"wide": whole | case, "lines": {"generate": {"step": {"host": ["int"]}}}}}


@pytest.mark.parametrize(
    "changed",
    [
        {"exit": 1},
        {"values": ["b"]},
        {"values": ["a", "b"]},
        {"pictures": {"x.png": {"pixels": "q", "file": "f", "recipe": {"seed": 1}}}},
        {"pictures": {"x.png": {"pixels": "p", "file": "f", "recipe": {"seed": 2}}}},
        {"pictures": {}},
    ],
)
def test_any_difference_is_found(changed: dict[str, Any], capsys: Any) -> None:
    assert compare(result(), copy.deepcopy(result())) == 0
    assert "1 pictures compared; differences: 0." in capsys.readouterr().out
    assert compare(result(), result(**changed)) == 1


def test_lines_with_other_fields_are_a_difference() -> None:
    now = result()
    now["three"]["lines"]["generate"]["step"]["host"] = ["NoneType", "int"]
    assert compare(result(), now) == 1


def test_pictures_of_more_hosts_are_not_compared_and_said_to_be_so(capsys: Any) -> None:
    other = {"x.png": {"pixels": "q", "file": "g", "recipe": {"seed": 1}}}
    other_ranks = json.loads(json.dumps(result(plans=["tensor on 1, 2"])))
    assert compare(result(), other_ranks) == 0
    assert compare(result(), result(plans=["tensor on 0, 1, 2"], pictures=other)) == 0
    assert "x.png: not compared, planned as ['tensor on 0, 1'] before" in capsys.readouterr().out
    assert compare(result(), result(plans=["tensor on 1, 2"], pictures=other)) == 1
    by_data = [result(plans=[f"data on {ranks}"], pictures=other) for ranks in ("0", "0, 1")]
    assert compare(result(plans=["data on 0"]), by_data[1]) == 1
