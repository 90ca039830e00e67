"""`fluxmesh generate` as a user runs it: a process, files, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.models.flux1.tensor_maps import transformer_tensors
from fluxmesh.storage.hashing import sha256_of
from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.checkpoints import TRANSFORMER, write_safetensors
from tests.integration.conftest import Run, environment

SIZE = ("--image-size", "32x48")


def names(folder: Path) -> list[str]:
    """Everything that lies in a folder, hidden files too."""
    return sorted(os.listdir(folder))


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


def test_json_tells_every_step_and_file_and_nothing_else(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    done = fluxmesh(
        *("generate", "dogs", "--model", checkpoint, *SIZE, "--steps", "3", "--seed", "9"),
        *("-n", "2", "--save-raw", "--json"),
    )
    assert (done.code, done.err) == (0, "")
    (start,) = done.of("start")
    assert (start["seed"], start["steps"], start["height"], start["width"]) == (9, 3, 32, 48)
    assert start["model"]["name"] == str(checkpoint)
    steps = [(line["image"], line["step"], line["steps"]) for line in done.of("step")]
    assert steps == [(image, step, 3) for image in (0, 1) for step in (1, 2, 3)]
    assert [line["seeds"] for line in done.of("saved")] == [[9], [10]]
    assert {line["phase"] for line in done.of("peak")} == {"text", "denoise", "decode"}
    assert done.events[-1] == {"event": "done", "files": ["out.0.png", "out.1.png"]}
    assert names(tmp_path) == ["out.0.png", "out.1.png"]


def test_prompts_come_from_a_file_or_stdin_one_a_line(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs  \r\n", encoding="utf-8-sig")
    model = ("--model", checkpoint, *SIZE, "--seed", "3", "--json")
    from_file = fluxmesh("generate", "--prompt-file", "prompts.txt", *model)
    from_stdin = fluxmesh("generate", "-", *model, stdin="two dogs\n")
    assert [line["prompt"] for line in from_file.of("start")] == ["a cat", "two dogs"]
    assert names(tmp_path) == ["out-1.png", "out-2.png", "out.png", "prompts.txt"]
    assert from_stdin.events[-1]["files"] == ["out-2.png"]
    assert (tmp_path / "out-1.png").read_bytes() == (tmp_path / "out-2.png").read_bytes()


def test_stepwise_keeps_the_picture_after_each_step(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "--steps", "3", "--seed", "1")
    assert fluxmesh(*command, "--stepwise", "steps").code == 0
    assert names(tmp_path / "steps") == ["step-01.png", "step-02.png", "step-03.png"]
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "steps").iterdir())]
    final = np.asarray(Image.open(tmp_path / "out.png"))
    assert not (pictures[0] == final).all()
    assert (pictures[2] == final).all()
    again = fluxmesh(*command, "--stepwise", "steps")
    assert again.code == 1
    assert "--stepwise steps is not empty" in again.err


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


def test_verbose_tells_the_peak_of_each_phase(fluxmesh: Run, checkpoint: Path) -> None:
    done = fluxmesh("generate", "dogs", "--model", checkpoint, *SIZE, "--verbose")
    for phase in ("for the text", "for the generation", "for the decoding", "overall"):
        assert f"Peak memory used {phase}:" in done.err


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


def test_an_existing_file_is_kept_unless_forced(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    command = ("generate", "dogs", "--model", checkpoint, *SIZE, "-o", "mine.png")
    refused = fluxmesh(*command)
    assert refused.code == 1
    assert "mine.png exists already: add --force" in refused.err
    assert "Painting" not in refused.err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    assert fluxmesh(*command, "--force").code == 0
    assert read_recipe(tmp_path / "mine.png").prompt == "dogs"
    assert names(tmp_path) == ["mine.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "There is no prompt"),
        (("dog", "--image-size", "big"), "HEIGHTxWIDTH"),
        (("dog", "--steps", "0"), "--steps is 0"),
        (("dog", "--bits", "7"), "7"),
        (("dog", "--seed", "-1"), "--seed is -1"),
        (("dog", "--mask", "missing.png"), "missing.png"),
        (("dog", "--strength", "0.5"), "--strength says how to change --image"),
        (("dog", "--outpaint", "1,2"), "--outpaint"),
        (("dog", "-o", "picture.jpg"), "end it in .png"),
        (("dog", "--prompt-file", "-"), "give one of them"),
        (("--prompt-file", "missing.txt"), "missing.txt can't be read"),
        (("-",), "stdin holds no prompt"),
        (("--from", "missing.png"), "there is no such file"),
        (("dog", "--frobnicate"), "--frobnicate"),
        (("dog", "--low-memory", "--preload-models"), "exclude each other"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence_and_exits_2(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = fluxmesh("generate", *arguments, "--model", checkpoint)
    assert done.code == 2, done.err
    assert sentence in done.err
    assert "Traceback" not in done.err
    assert names(tmp_path) == []


def test_a_missing_model_is_told_in_a_sentence_to_people_and_programs(
    fluxmesh: Run, tmp_path: Path
) -> None:
    done = fluxmesh("generate", "dog", "--model", "nobody/nothing", "--json")
    assert done.code == 1
    assert done.err.startswith("Error: ") and done.err.count("\n") == 1
    (error,) = done.of("error")
    assert error["exit_code"] == 1
    assert error["message"] in done.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("option", ["--output", "--stepwise", "--adapter", "--model"])
def test_a_path_that_can_not_be_is_a_sentence(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, option: str
) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, option, "x" * 300)
    assert done.code == 1, done.err
    assert "Error: " in done.err and "Traceback" not in done.err
    assert names(tmp_path) == []


def test_an_adapter_that_is_missing_is_named(fluxmesh: Run, checkpoint: Path) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, "--adapter", "no.safetensors:0.5")
    assert done.code == 1
    assert "No adapter file no.safetensors" in done.err


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


@pytest.mark.parametrize("raw", [False, True])
def test_ctrl_c_exits_130_and_leaves_nothing_half_written(
    checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, raw: bool
) -> None:
    command = ["generate", "dogs", "--model", str(checkpoint), *SIZE, "--steps", "400", "-n", "50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxmesh_coordinator", *command, "--json"]
        + (["--save-raw", "--steps", "2", "-n", "4000"] if raw else []),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(tmp_path_factory.mktemp("home")),
        text=True,
    )
    assert process.stdout is not None
    awaited = '"saved"' if raw else '"step"'
    for line in process.stdout:
        if awaited in line:
            break
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - sent < 30
    assert err.strip() == "Cancelled."
    assert '"exit_code": 130' in out.splitlines()[-1]
    left = names(tmp_path)
    if not raw:
        assert left == []
        return
    assert left
    for name in left:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.size == (48, 32)


def test_a_reader_that_goes_away_is_no_traceback(
    checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxmesh_coordinator", "generate", "dogs", "--json"]
        + ["--model", str(checkpoint), *SIZE, "--steps", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(tmp_path_factory.mktemp("home")),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    assert names(tmp_path) == []
