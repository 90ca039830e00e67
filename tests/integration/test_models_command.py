"""`fluxmesh models` as a user runs it: list, pull without a network, quantize, use the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import Run


def test_the_list_names_what_can_be_asked_for(fluxmesh: Run) -> None:
    done = fluxmesh("models", "list", "--json")
    assert done.code == 0
    listed = {line["name"]: line for line in done.of("model")}
    assert set(listed) == {"tiny", "schnell", "dev", "krea-dev"}
    assert not listed["schnell"]["usable"]
    assert listed["schnell"]["note"] == "not here"
    table = fluxmesh("models", "list")
    assert table.code == 0
    assert "(default)" in table.out
    assert "fluxmesh models pull" in table.out


def test_pulling_without_a_network_is_one_sentence(fluxmesh: Run) -> None:
    done = fluxmesh("models", "pull", "schnell")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("Error: ")
    assert "HF_HUB_OFFLINE" in done.err
    assert "Traceback" not in done.err


def test_a_quantized_folder_paints(fluxmesh: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = fluxmesh("models", "quantize", checkpoint, "small", "--bits", 8)
    assert done.code == 0
    assert "small" in done.out
    assert done.err == ""
    painted = fluxmesh("generate", "two dogs", "--model", "small", "--seed", 1, "--json")
    assert painted.code == 0, painted.err
    again = fluxmesh("models", "quantize", checkpoint, "small", "--json")
    assert again.code == 1
    assert "exists already" in again.of("error")[0]["message"]


@pytest.mark.parametrize("bits", ["2", "16", "four"])
def test_other_bits_are_a_usage_error(fluxmesh: Run, checkpoint: Path, bits: str) -> None:
    done = fluxmesh("models", "quantize", checkpoint, "small", "--bits", bits)
    assert done.code == 2
    assert "--bits" in done.err


def test_a_damaged_source_is_refused_and_nothing_is_written(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = next((broken / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    done = fluxmesh("models", "quantize", "broken", "small")
    assert done.code == 1
    assert "truncated" in done.err
    assert not (tmp_path / "small").exists()
