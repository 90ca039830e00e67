"""Models as people have them, through the command line: the picture of the original folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_safetensors
from tests.integration.conftest import Run
from tests.wild_layouts import LAYOUTS, original

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = ("--seed", 3, "--steps", 2, "--image-size", "64x64", "--output")


def painted(fluxmesh: Run, folder: Path, model: object) -> np.ndarray:
    """The pixels of `fluxmesh generate --model MODEL`, which must fetch nothing."""
    output = folder / "picture.png"
    done = fluxmesh("generate", "a red apple", "--model", model, *OPTIONS, output, "--force")
    assert done.code == 0, done.err
    return np.asarray(Image.open(output))


def test_a_model_of_any_layout_paints_the_same(fluxmesh: Run, tmp_path: Path) -> None:
    """One of each road: a file, a folder of files, a folder of the Hub's cache on another disk."""
    folder = original(tmp_path / "folder")
    expected = painted(fluxmesh, tmp_path, folder)
    repository = tmp_path / "disk" / "models--someone--paints"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    for model in (
        LAYOUTS["all in one file"](tmp_path / "all"),
        LAYOUTS["ComfyUI's models"](tmp_path / "ComfyUI" / "models"),
        repository,
    ):
        np.testing.assert_array_equal(painted(fluxmesh, tmp_path, model), expected)


def test_a_lora_named_as_a_model_is_told_where_it_belongs(fluxmesh: Run, tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    write_safetensors(tmp_path / "dog.safetensors", {key: np.zeros((4, 8))})
    done = fluxmesh("generate", "a dog", "--model", "dog.safetensors")
    assert done.code == 1 and done.out == ""
    assert done.err.count("\n") == 1
    assert "dog.safetensors is an adapter (LoRA)" in done.err and "--adapter" in done.err


@pytest.mark.parametrize("command", ["generate", "up", "plan"])
def test_a_transformer_alone_says_what_it_needs_and_fetches_nothing(
    fluxmesh: Run, tmp_path: Path, command: str
) -> None:
    file = LAYOUTS["files side by side"](tmp_path / "whole")
    shutil.move(file, tmp_path / "alone.safetensors")
    arguments = ["a dog", "--model"] if command == "generate" else ["--model"]
    done = fluxmesh(command, *arguments, "alone.safetensors")
    assert done.code == 1, done.err
    assert "No text encoders (T5 and CLIP)" in done.err
    assert "fluxmesh models pull alone.safetensors" in done.err
    pulled = fluxmesh("models", "pull", "alone.safetensors")
    assert pulled.code == 1 and "HF_HUB_OFFLINE" in pulled.err
