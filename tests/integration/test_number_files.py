"""fp8, GGUF and damaged single files through the command line, as a user has them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.storage.numbers.tensor_source import read_float32
from fluxmesh.storage.tensor_files import read_header
from tests.checkpoints import Arrays, make_checkpoint, write_safetensors
from tests.integration.conftest import Run
from tests.number_files import float8_tensors, gguf_tensors, write_gguf, write_stored

ASK = ("generate", "a dog", "--image-size", "32x32", "--steps", "2", "--seed", "3", "--model")


@pytest.fixture
def arrays(tmp_path: Path) -> Arrays:
    """A transformer in float32; what else a model needs lies in the working folder."""
    made = make_checkpoint(tmp_path, layout="bfl")
    header = read_header(made.path)
    return {name: read_float32(header, name) for name in header.entries}


@pytest.mark.parametrize("form", ["scaled_fp8", "gguf"])
def test_a_file_paints_what_its_numbers_paint(
    fluxmesh: Run, arrays: Arrays, tmp_path: Path, form: str
) -> None:
    file: Path
    if form == "gguf":
        file = write_gguf(tmp_path / "flux1-Q8_0.gguf", gguf_tensors(arrays, "Q8_0"))
        header = read_header(file)
        exact = {name: read_float32(header, name) for name in arrays}
    else:
        stored, exact = float8_tensors(arrays, scale="scale_weight")
        stored["scaled_fp8"] = (np.zeros(0, np.uint8), "F8_E4M3")
        file = write_stored(tmp_path / "flux1-fp8.safetensors", stored)
    write_safetensors(tmp_path / "exact.safetensors", exact)
    for name in (file.name, "exact.safetensors"):
        done = fluxmesh(*ASK, name, "-o", f"{Path(name).stem}.png")
        assert done.code == 0, done.err
    pictures = [Image.open(tmp_path / f"{stem}.png").tobytes() for stem in (file.stem, "exact")]
    assert pictures[0] == pictures[1]


def test_a_weight_that_is_no_number_ends_in_one_sentence_and_no_picture(
    fluxmesh: Run, arrays: Arrays, tmp_path: Path
) -> None:
    arrays["single_blocks.1.linear2.weight"][3, 4] = np.inf
    write_safetensors(tmp_path / "flux1-broken.safetensors", arrays)
    done = fluxmesh(*ASK, "flux1-broken.safetensors", "-o", "out.png")
    assert done.code == 1
    sentence = done.err.splitlines()[-1]
    assert "single_blocks.1.linear2.weight holds numbers that are NaN or infinite" in sentence
    assert sentence.count("flux1-broken.safetensors") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".png")]


@pytest.mark.parametrize("name", ["flux1-q8.gguf", "flux1-fp8.safetensors"])
def test_a_file_that_is_cut_off_ends_in_one_sentence(
    fluxmesh: Run, arrays: Arrays, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name.endswith(".gguf"):
        write_gguf(file, gguf_tensors(arrays, "Q8_0"))
    else:
        write_stored(file, float8_tensors(arrays)[0])
    file.write_bytes(file.read_bytes()[:-500])
    done = fluxmesh(*ASK, name)
    assert done.code == 1
    assert "truncated" in done.err
    assert done.err.count(name) == 1
    assert "Traceback" not in done.err
