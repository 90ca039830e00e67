"""Fill, a control LoRA and a negative prompt from the command line to the file, on one host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import TRANSFORMER, make_checkpoint, write_safetensors
from tests.integration.conftest import Run

D, TOKEN = TRANSFORMER.hidden_size, TRANSFORMER.out_channels
SIZE = ("--image-size", "48x64", "--steps", "2", "--seed", "5")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def model(folder: Path, in_channels: int) -> Path:
    """Guided as dev is."""
    sizes = replace(TRANSFORMER, in_channels=in_channels)
    return make_checkpoint(folder, transformer=sizes, guidance=True).path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_fill_paints_what_the_mask_says_and_again_from_its_own_picture(
    fluxmesh: Run, photo: Path, tmp_path: Path
) -> None:
    fill = model(tmp_path / "fill", 2 * TOKEN + 256)
    refused = fluxmesh("generate", "a dog", "--model", fill, *SIZE)
    assert refused.code == 2 and "paints a part of a picture" in refused.err
    assert "--image" in refused.err and "--mask" in refused.err
    mask = np.zeros((48, 64), np.uint8)
    mask[8:30, 10:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masked = ("--image", photo, "--mask", tmp_path / "mask.png")
    done = fluxmesh("generate", "a dog", "--model", fill, *masked, *SIZE, "-o", "a.png")
    assert done.code == 0, done.err
    painted = pixels(tmp_path / "a.png")
    assert np.array_equal(painted[mask == 0], pixels(photo)[mask == 0])
    assert not np.array_equal(painted[mask > 0], pixels(photo)[mask > 0])
    again = fluxmesh("generate", "--from", "a.png", "-o", "b.png")
    assert again.code == 0, again.err
    assert np.array_equal(pixels(tmp_path / "b.png"), painted)


def test_a_photo_s_edges_are_refused_for_a_depth_model_before_anything_is_fetched(
    fluxmesh: Run, photo: Path
) -> None:
    for command in ("generate", "plan"):
        refused = fluxmesh(command, "a bird", "--model", "depth", "--control-from", photo)
        assert refused.code == 2 and "Traceback" not in refused.err
        said = "--control-from: depth follows a map of depth, and fluxmesh makes those of edges"
        assert said in " ".join(refused.err.split()) and "as --control." in refused.err


def test_a_control_lora_and_a_negative_prompt_change_what_dev_paints(
    fluxmesh: Run, photo: Path, tmp_path: Path
) -> None:
    dev = model(tmp_path / "dev", TOKEN)
    rng = np.random.default_rng(1)
    lora = {
        "img_in.lora_A.weight": rng.standard_normal((4, 2 * TOKEN)).astype(np.float32) / 11,
        "img_in.lora_B.weight": rng.standard_normal((D, 4)).astype(np.float32) / 2,
        "img_in.lora_B.bias": rng.standard_normal(D).astype(np.float32),
        "double_blocks.0.img_attn.norm.query_norm.scale": np.full(32, 1.5, np.float32),
    }
    write_safetensors(tmp_path / "canny-lora.safetensors", lora)
    adapted = ("--adapter", tmp_path / "canny-lora.safetensors")
    painted = {}
    for name, options in {
        "plain": (),
        "negative": ("--negative-prompt", "two dogs", "--cfg", "3"),
        "edges": (*adapted, "--control", photo),
    }.items():
        out = f"{name}.png"
        done = fluxmesh("generate", "a dog", "--model", dev, *SIZE, *options, "-o", out)
        assert done.code == 0, done.err
        painted[name] = pixels(tmp_path / out)
    assert not np.array_equal(painted["plain"], painted["negative"])
    assert not np.array_equal(painted["plain"], painted["edges"])
    idle = ("--negative-prompt", "two dogs", "--cfg", "1", "-o", "idle.png")
    told = fluxmesh("generate", "a dog", "--model", dev, *SIZE, *idle)
    assert told.code == 0 and "--negative-prompt has no effect" in " ".join(told.err.split())
    assert np.array_equal(pixels(tmp_path / "idle.png"), painted["plain"])
    again = fluxmesh("generate", "--from", "negative.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert np.array_equal(pixels(tmp_path / "again.png"), painted["negative"])
    lacking = fluxmesh("generate", "a dog", "--model", dev, *SIZE, *adapted)
    assert lacking.code == 2 and "--control" in lacking.err
