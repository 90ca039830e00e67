"""FLUX.2 through the command line, as a user has it: a folder's name and a prompt."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.checkpoints import TRANSFORMER, make_checkpoint
from tests.flux2_checkpoint import WEIGHTS, make_flux2
from tests.integration.conftest import Run


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    return make_flux2(tmp_path / "klein")


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_paints_step_by_step_and_again_from_its_own_picture(
    fluxmesh: Run, klein: Path, tmp_path: Path
) -> None:
    size = ("--image-size", "32x48", "--dtype", "float32")
    done = fluxmesh(
        *("generate", "a dog", "--model", klein, *size, "--seed", "5"),
        *("--stepwise", "steps", "--low-memory", "--no-t5-padding"),
    )
    assert done.code == 0, done.err
    assert "--no-t5-padding has no effect" in " ".join(done.err.split())
    recipe = read_recipe(tmp_path / "out.png")
    assert (recipe.model, recipe.guidance, recipe.steps) == (str(klein), 1.0, 2)
    assert len(list((tmp_path / "steps").glob("*.png"))) == 2
    again = fluxmesh("generate", "--from", "out.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_a_quantized_folder_paints_over_a_picture(
    fluxmesh: Run, klein: Path, tmp_path: Path
) -> None:
    assert fluxmesh("models", "quantize", klein, "small", "--bits", "4").code == 0
    pixels = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    done = fluxmesh(
        *("generate", "a dog", "--model", "small", "--image-size", "32x48", "--seed", "5"),
        *("--image", "in.png", "--mask", "mask.png", "--strength", "1", "--cache", "0.1"),
    )
    assert done.code == 0, done.err
    painted = picture(tmp_path / "out.png")
    assert np.array_equal(painted[:, 16:], pixels[:, 16:])
    assert not np.array_equal(painted[:, :16], pixels[:, :16])


def test_an_adapter_is_trained_shown_converted_and_fused(fluxmesh: Run, tmp_path: Path) -> None:
    model = make_flux2(tmp_path / "base", "base", text_length=40)
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("a thing")
    options = ("--model", model, "--dtype", "float32")
    done = fluxmesh(
        *("train", "data", *options, "--seed", "1", "--iterations", "2", "--grad-accumulate", "1"),
        *("--grad-checkpoint", "--quantize", "--bits", "8", "--ema", "0.9", "--lora-rank", "4"),
        *("--num-augmentations", "1", "--learning-rate", "0.05", "--warmup-steps", "0"),
        *("--progress-prompt", "a cat", "--progress-every", "2", "--checkpoint-every", "1"),
        *("--caption-dropout", "0.3"),
    )
    assert done.code == 0, done.err
    assert len(list((tmp_path / "mlx_output").glob("*.png"))) == 2
    shown = fluxmesh("adapters", "show", "mlx_output", "--model", model)
    assert "22 linears of transformer, as FLUX.2 has them" in shown.out, shown.out + shown.err
    there = ("there.safetensors", "--to", "ai-toolkit", "--model", model)
    assert fluxmesh("adapters", "convert", "mlx_output", *there).code == 0
    assert fluxmesh("adapters", "fuse", model, "mlx_output", "fused").code == 0
    ways = {
        "plain": options,
        "beside": (*options, "--adapter", "mlx_output"),
        "there": (*options, "--adapter", "there.safetensors", "--fuse-adapter"),
        "fused": ("--model", "fused", "--dtype", "float32"),
    }
    for name, how in ways.items():
        done = fluxmesh("generate", "a dog", *how, "--seed", "5", "--output", f"{name}.png")
        assert done.code == 0, done.err
    plain, beside, *others = (picture(tmp_path / f"{name}.png").astype(int) for name in ways)
    assert np.abs(beside - plain).max() > 5
    assert max(np.abs(other - beside).max() for other in others) <= 1


def test_the_best_model_that_is_here_paints_where_none_is_named(
    fluxmesh: Run, home: Path, tmp_path: Path
) -> None:
    """Out of the Hub's cache, and with no network; a half-fetched one is not here."""
    cache = home / "hub" / "hub"
    for repo in ("FLUX.2-klein-4B", "FLUX.2-klein-9B"):
        folder = cache / f"models--black-forest-labs--{repo}"
        snapshot = make_flux2(folder / "snapshots" / "0123456")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123456")
    (snapshot / "vae" / WEIGHTS["vae"]).unlink()
    done = fluxmesh("generate", "a dog", "--seed", "5", "--dtype", "float32")
    assert done.code == 0, done.err
    first, hint = done.err.splitlines()[:2]
    assert first.startswith("Painting with klein-4b (32x32, 2 steps, ")
    assert hint.startswith("klein-4b is the best model that is here; `fluxmesh models list` tells")
    assert "--model names one" in hint
    assert read_recipe(tmp_path / "out.png").model == "klein-4b"
    planned = fluxmesh("plan", "a dog")
    assert planned.out.startswith("klein-4b is the best model that is here; ")
    assert "2 steps with klein-4b" in planned.out
    Image.new("RGB", (48, 32)).save(tmp_path / "edges.png")
    follow = ("plan", "a dog", "--control", "edges.png")
    refused = fluxmesh(*follow)
    assert refused.code == 2
    assert "takes no control picture; no model on this machine does" in refused.err
    folder = cache / "models--black-forest-labs--FLUX.1-Canny-dev"
    wide = replace(TRANSFORMER, in_channels=2 * TRANSFORMER.in_channels)
    make_checkpoint(folder / "snapshots" / "0123456", guidance=True, transformer=wide)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123456")
    done = fluxmesh("generate", *follow[1:], "--steps", "1")
    assert done.code == 0, done.err
    first, hint = done.err.splitlines()[:2]
    assert first.startswith("Painting with canny (")
    assert hint.startswith("canny is the best model that is here for a control map; ")


def test_a_published_model_is_planned_without_its_files(fluxmesh: Run, tmp_path: Path) -> None:
    hosts = ", ".join(f'{{"ssh": "mac{k}", "ips": ["10.0.0.{k + 1}"]}}' for k in range(4))
    (tmp_path / "hosts.json").write_text(f"[{hosts}]")
    (tmp_path / "assume.json").write_text('{"memory": "36GB", "link_rate": 4e9}')
    options = ("--hostfile", "hosts.json", "--assume", "assume.json")
    done = fluxmesh("plan", "a dog", "--model", "flux2-dev", *options)
    assert done.code == 0, done.err
    assert "planned with its published sizes" in done.out + done.err
    assert "tensor on 4 hosts" in done.out and "1024x1024, 50 steps" in done.out


def test_references_make_an_edit_and_its_picture_makes_it_again(
    fluxmesh: Run, klein: Path, tmp_path: Path
) -> None:
    """Two for each prompt of a file; again from the picture, as long as the files are there."""
    for name, (height, width) in {"a.png": (70, 101), "b.jpg": (64, 80)}.items():
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    command = ("generate", "--model", klein, "--dtype", "float32", "--steps", "1", "--seed", "5")
    references = ("--reference", "a.png", "--reference", "b.jpg")
    done = fluxmesh(*command, "--prompt-file", "prompts.txt", *references)
    assert done.code == 0, done.err
    assert done.err.count("a.png is read at 64x96 pixels; it has 70x101.") == 1
    assert picture(tmp_path / "out.png").shape == (64, 96, 3)
    recipe = read_recipe(tmp_path / "out-1.png")
    assert [(file.name, len(file.sha256)) for file in recipe.references] == [
        ("a.png", 64),
        ("b.jpg", 64),
    ]
    again = fluxmesh("generate", "--from", "out-1.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out-1.png").read_bytes()
    os.replace(tmp_path / "b.jpg", tmp_path / "a.png")
    gone = fluxmesh("generate", "--from", "out-1.png", "-o", "gone.png")
    assert gone.code == 2 and "--reference b.jpg does not exist; check the path." in gone.err
    changed = fluxmesh("generate", "--from", "out-1.png", "--reference", "a.png", "-o", "other.png")
    assert changed.code == 0 and "a.png is not the file that it was" in changed.err
    refused = fluxmesh(*command, "a dog", "--control", "a.png")
    assert refused.code == 2 and "takes no control picture" in refused.err
    planned = fluxmesh("plan", "--model", klein, "--reference", "a.png", "--json")
    assert planned.code == 0, planned.err
