"""What `fluxmesh generate` paints, by which options, and once more from the picture itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxmesh.models.flux1.tensor_maps import transformer_tensors
from fluxmesh.storage.hashing import sha256_of
from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.checkpoints import TRANSFORMER, write_safetensors
from tests.integration.conftest import Run
from tests.integration.generate.results import SIZE, names


def test_image_k_of_a_seed_is_the_file_of_that_seed_alone(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    model = ("two dogs", "--model", checkpoint, *SIZE)
    three = fluxmesh("generate", *model, "-n", "3", "--seed", "5", "--save-raw")
    alone = fluxmesh("generate", *model, "--seed", "7")
    assert (three.code, alone.code) == (0, 0), three.err + alone.err
    assert names(tmp_path) == ["out-1.png", "out.0.png", "out.1.png", "out.2.png"]
    files = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert files["out.2.png"] == files["out-1.png"]
    assert files["out.1.png"] != files["out-1.png"]


def test_a_grid_holds_the_images_side_by_side(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    model = ("dogs", "--model", checkpoint, *SIZE, "--seed", "1", "-n", "3")
    assert fluxmesh("generate", *model, "--n-rows", "2", "-o", "grid.png").code == 0
    assert fluxmesh("generate", *model, "--save-raw", "-o", "raw.png").code == 0
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    raw = [np.asarray(Image.open(tmp_path / f"raw.{k}.png")) for k in range(3)]
    assert raw[0].shape == (32, 48, 3)
    assert sheet.shape == (32 * 2 + 8, 48 * 2 + 8, 3)
    assert (sheet[:32, 56:] == raw[1]).all()
    assert (sheet[40:, :48] == raw[2]).all()
    assert (sheet[40:, 56:] == 0).all()


def test_a_picture_is_made_again_from_itself(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    first = fluxmesh(
        *("generate", 'a "猫" & dog', "--model", checkpoint, *SIZE, "--steps", "3", "-n", "2"),
        *("--no-t5-padding", "--dtype", "float32", "-o", "first.png"),
    )
    assert first.code == 0, first.err
    again = fluxmesh("generate", "--from", "first.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    other = fluxmesh("generate", "--from", "first.png", "--steps", "2", "-o", "other.png")
    assert other.code == 0, other.err
    recipe = read_recipe(tmp_path / "other.png")
    assert (recipe.steps, recipe.prompt, recipe.dtype) == (2, 'a "猫" & dog', "float32")


def test_float16_paints_nearly_the_same_and_is_written_into_the_picture(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    asked = ("generate", "a dog", "--model", checkpoint, *SIZE, "--seed", "4")
    for dtype in ("float32", "float16"):
        done = fluxmesh(*asked, "--dtype", dtype, "-o", f"{dtype}.png")
        assert done.code == 0, done.err
    assert read_recipe(tmp_path / "float16.png").dtype == "float16"
    exact, half = (
        np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        for name in ("float32", "float16")
    )
    assert 0 < np.abs(exact - half).mean() < 2
    again = fluxmesh("generate", "--from", "float16.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "float16.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_an_outpainted_picture_is_made_again_and_keeps_what_was_there(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    painted = fluxmesh(
        *("generate", "a dog", "--model", checkpoint, "--image", "photo.png"),
        *("--outpaint", "16,0,0,9", "-o", "wide.png"),
    )
    assert painted.code == 0, painted.err
    wide = np.asarray(Image.open(tmp_path / "wide.png")).astype(int)
    assert wide.shape == (64, 80, 3)
    assert np.abs(wide[:40, 24:80] - photo).max() <= 1
    again = fluxmesh("generate", "--from", "wide.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "wide.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    Image.fromarray(255 - photo).save(tmp_path / "photo.png")
    doubted = fluxmesh("generate", "--from", "wide.png", "-o", "third.png")
    assert "photo.png is not the file that it was" in doubted.err


def test_a_cached_picture_says_that_it_is_approximate_and_is_made_again(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "--steps", "8", "--seed", "5")
    first = fluxmesh(*command, "--dtype", "float32", "--cache", "0.7", "-v", "-o", "a.png")
    assert first.code == 0, first.err
    assert "approximate: --cache 0.7)." in first.err
    sentence = re.search(r"Approximate \(--cache 0.7\): (\d) of 8 steps computed, (\d)", first.err)
    assert sentence and 2 <= int(sentence[1]) < 8 and int(sentence[1]) + int(sentence[2]) == 8
    again = fluxmesh("generate", "--from", "a.png", "-o", "b.png", "--json")
    assert again.code == 0, again.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    lines = [json.loads(line) for line in again.out.splitlines()]
    assert [line["cache"] for line in lines if line["event"] == "start"] == [0.7]
    steps = [line["reused"] for line in lines if line["event"] == "step"]
    assert sum(steps) == int(sentence[2]) and len(steps) == 8
    exact = fluxmesh("generate", "--from", "a.png", "--cache", "0", "-o", "c.png")
    assert exact.code == 0, exact.err
    recipes = [read_recipe(tmp_path / name) for name in ("a.png", "c.png")]
    assert [recipe.cache for recipe in recipes] == [0.7, 0.0]
    shown = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "c.png")]
    assert not np.array_equal(*shown)


def test_memory_options_change_no_pixel(fluxmesh: Run, checkpoint: Path, tmp_path: Path) -> None:
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "--seed", "2")
    for name, option in (("a", ()), ("b", ("--low-memory",)), ("c", ("--preload-models",))):
        assert fluxmesh(*command, *option, "-o", f"{name}.png").code == 0
    files = {(tmp_path / f"{name}.png").read_bytes() for name in "abc"}
    assert len(files) == 1


def test_quantize_takes_bits_and_says_so_in_the_picture(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "--seed", "2")
    for name, options in (("plain", ()), ("four", ("-q",)), ("eight", ("-q", "--bits", "8"))):
        done = fluxmesh(*command, *options, "-o", f"{name}.png")
        assert done.code == 0, done.err
    bits = {name: read_recipe(tmp_path / f"{name}.png").bits for name in ("plain", "four", "eight")}
    assert bits == {"plain": None, "four": 4, "eight": 8}
    pixels = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in bits}
    off = {name: np.abs(pixels[name] - pixels["plain"]).mean() for name in ("four", "eight")}
    assert 0 < off["eight"] < off["four"]


def lora(path: Path, module: str) -> None:
    """A kohya LoRA of rank 2 for one linear of the random checkpoint, strong enough to see."""
    out, into = transformer_tensors(TRANSFORMER)["double_blocks.0.img_attn.proj.weight"].shape
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, into), dtype=np.float32)
    up = rng.standard_normal((out, 2), dtype=np.float32)
    arrays = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    write_safetensors(path, arrays)


def test_adapters_act_by_their_scale_and_are_named_in_the_picture(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    lora(tmp_path / "dog.safetensors", "lora_unet_double_blocks_0_img_attn_proj")
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "--seed", "2", "--steps", "2")
    pixels = {}
    for name, options in {
        "plain": (),
        "off": ("--adapter", "dog.safetensors:0"),
        "on": ("--adapter", "dog.safetensors"),
        "fused": ("--adapter", "dog.safetensors:1", "--fuse-adapter", "--dtype", "float32"),
        "twice": ("--adapter", "dog.safetensors:0.5", "--adapter", "dog.safetensors:0.5"),
    }.items():
        done = fluxmesh(*command, *options, "-o", f"{name}.png")
        assert done.code == 0, done.err
        pixels[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert (pixels["off"] == pixels["plain"]).all()
    changed = np.abs(pixels["on"] - pixels["plain"]).mean()
    assert changed > 1
    for same in ("fused", "twice"):
        assert np.abs(pixels[same] - pixels["on"]).mean() < changed / 4
    ((path, scale, sha256),) = read_recipe(tmp_path / "fused.png").adapters
    assert (path, scale) == ("dog.safetensors", 1.0)
    assert sha256 == sha256_of(tmp_path / "dog.safetensors")
    again = fluxmesh("generate", "--from", "twice.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "twice.png").read_bytes()


def test_an_adapter_for_another_model_is_refused_by_its_keys(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    lora(tmp_path / "dog.safetensors", "lora_unet_double_blocks_77_img_attn_proj")
    done = fluxmesh("generate", "dog", "--model", checkpoint, "--adapter", "dog.safetensors")
    assert done.code == 1
    assert "double_blocks_77_img_attn_proj" in done.err and "Traceback" not in done.err
    assert names(tmp_path) == ["dog.safetensors"]


@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_of_zeros_is_refused_and_one_of_ones_paints(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, value: int
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    Image.new("L", (32, 32), value).save(tmp_path / "mask.png")
    done = fluxmesh(
        *("generate", "a dog", "--model", checkpoint, "--image", "photo.png", "--steps", "1"),
        *("--mask", "mask.png", "-o", "out.png"),
    )
    if value:
        assert done.code == 0, done.err
        assert np.asarray(Image.open(tmp_path / "out.png")).std() > 5
    else:
        assert done.code == 2
        assert "--mask mask.png paints nothing" in done.err
        assert not (tmp_path / "out.png").exists()


def test_inpainting_changes_only_what_the_mask_shows(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 16:48] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ("generate", "a dog", "--model", checkpoint, "--image", "photo.png", "--steps", "4")
    assert fluxmesh(*command, "--mask", "mask.png", "-o", "painted.png").code == 0
    painted = np.asarray(Image.open(tmp_path / "painted.png")).astype(int)
    off = np.abs(painted - photo).max(axis=-1)
    assert off[mask == 0].max() <= 1
    assert off[mask == 255].mean() > 10
    half = fluxmesh(*command, "--strength", "0.5", "--json")
    assert [line["steps"] for line in half.of("step")] == [2, 2]


def test_a_photo_of_which_parts_stay_is_painted_at_two_megapixels_unless_told(
    fluxmesh: Run, tmp_path: Path
) -> None:
    """Small ones stay as they are, to the pixel: the other tests of masks hold that."""
    from fluxmesh_coordinator.commands.generate import KEPT_AREA, Painter
    from fluxmesh_coordinator.commands.settings import GenerateSettings
    from fluxmesh_coordinator.console.generate_report import GenerateJsonReporter

    sizes = {"photo.png": (2400, 3200), "small.png": (1024, 1536)}
    for name, (height, width) in sizes.items():
        Image.new("RGB", (width, height), "red").save(tmp_path / name)
    notes: list[str] = []
    reporter = GenerateJsonReporter()
    reporter.note = notes.append  # type: ignore[method-assign]
    painter = Painter(reporter, keep_warm=False)

    def size_of(name: str, **more: Any) -> tuple[int, int]:
        settings = GenerateSettings(
            model="tiny", image=str(tmp_path / name), outpaint=(0, 0, 64, 0), **more
        )
        request = painter.resolve(settings, "a beach", 1).resolved.request
        return request.height, request.width

    assert size_of("small.png") == (1024, 1600)
    assert not any("would take long" in note for note in notes)
    height, width = size_of("photo.png")
    assert 0.9 * KEPT_AREA < height * width <= 1.05 * KEPT_AREA
    (note,) = [note for note in notes if "would take long" in note]
    assert note.startswith("A picture of 2400x3264 would") and "`image_size`" in note
    assert size_of("photo.png", image_size=(2400, 3264)) == (2400, 3264)
