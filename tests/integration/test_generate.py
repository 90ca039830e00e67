"""`fluxmesh generate` as a user runs it: a process, files, exit codes."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def test_previews_are_told_where_they_are_asked_for_and_change_no_byte(
    fluxmesh: Run, tmp_path: Path
) -> None:
    asked = ("generate", "a red apple", "--model", "tiny", *SIZE, "--steps", "3", "--seed", "2")
    plain = fluxmesh(*asked, "--json", "-o", "plain.png")
    shown = fluxmesh(*asked, "--json", "--preview", "-o", "shown.png")
    piped = fluxmesh(*asked, "--preview", "-o", "piped.png")
    assert (plain.code, shown.code, piped.code) == (0, 0, 0), plain.err + shown.err + piped.err
    files = [(tmp_path / f"{name}.png").read_bytes() for name in ("plain", "shown", "piped")]
    assert files[0] == files[1] == files[2]
    assert '"event": "preview"' not in plain.out and "\x1b" not in piped.out + piped.err
    told = [json.loads(line) for line in shown.out.splitlines()]
    previews = [each for each in told if each["event"] == "preview"]
    assert [(each["step"], each["steps"]) for each in previews] == [(1, 3), (2, 3), (3, 3)]
    with Image.open(io.BytesIO(base64.b64decode(previews[-1]["png"]))) as preview:
        assert preview.size == (6, 4)


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


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_a_prompt_that_is_cut_says_from_which_word_on_to_people_and_programs(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a cat\n{LONG}\n", encoding="utf-8")
    command = ("generate", "--prompt-file", "prompts.txt", "--model", checkpoint, *SIZE)
    told = fluxmesh(*command, "--steps", "1")
    assert told.code == 0, told.err
    (sentence,) = [line for line in told.err.splitlines() if "left out" in line]
    pattern = r"The model reads (\d+) of the (\d+) tokens of the prompt; .* from “(.+)” on\."
    kept, tokens, start = re.fullmatch(pattern, sentence).groups()
    lines = fluxmesh(*command, "--steps", "1", "--json").of("encoded")
    assert [line["dropped"] for line in lines] == ["", LONG[LONG.index(start.removesuffix(" …")) :]]
    assert lines[1]["kept"] == int(kept) == 16 < lines[1]["tokens"] == int(tokens)
    read = LONG.removesuffix(lines[1]["dropped"])
    assert (
        fluxmesh("generate", f"{read}", "--model", checkpoint, *SIZE, "--steps", "1").err.count(
            "left out"
        )
        == 0
    )


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


@pytest.mark.parametrize(
    ("option", "code"), [("--output", 1), ("--stepwise", 1), ("--adapter", 2), ("--model", 2)]
)
def test_a_path_that_can_not_be_is_a_sentence(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, option: str, code: int
) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, option, "x" * 300)
    assert done.code == code, done.err
    assert "Error: " in done.err and "Traceback" not in done.err
    assert names(tmp_path) == []


def test_an_adapter_that_is_missing_is_named(fluxmesh: Run, checkpoint: Path) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, "--adapter", "no.safetensors:0.5")
    assert done.code == 2
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
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert time.monotonic() - sent < 60
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
    assert process.wait(timeout=100) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    assert names(tmp_path) == []


def test_mlx_without_a_backend_is_told_with_what_to_install(
    fluxmesh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux without `[cpu]` or `[cuda]`: mlx is installed, and can't be imported."""
    (tmp_path / "bare" / "mlx").mkdir(parents=True)
    (tmp_path / "bare" / "mlx" / "__init__.py").touch()
    why = "libmlx.so: cannot open shared object file: No such file or directory"
    (tmp_path / "bare" / "mlx" / "core.py").write_text(f"raise ImportError({why!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    remedy = "fluxmesh[cpu]" if sys.platform == "linux" else "pip install mlx"

    painted = fluxmesh("generate", "dogs", "--model", "tiny")
    assert painted.code == 1 and "Traceback" not in painted.err
    assert f"ended with exit code 1: ImportError: {why}; run " in painted.err
    assert remedy in painted.err

    looked = fluxmesh("doctor", "--json")
    (mlx,) = [line for line in looked.of("check") if line["check"] == "MLX"]
    assert looked.code == 1 and mlx["level"] == "fail"
    assert why in mlx["text"] and remedy in mlx["text"]


def test_a_home_that_cannot_be_written_keeps_nobody_from_painting(
    fluxmesh: Run, home: Path, tmp_path: Path
) -> None:
    """Root can write everywhere: a link that leads nowhere stands where the folder would be."""
    (home / "mesh").symlink_to(tmp_path / "nowhere")
    painted = fluxmesh("generate", "dogs", "--model", "tiny", "--image-size", "64x64")
    assert painted.code == 0, painted.err
    refused = fluxmesh("up", "--model", "tiny")
    assert refused.code == 1 and "Traceback" not in refused.err
    assert "can't be used" in refused.err and "set FLUXMESH_HOME to a folder" in refused.err


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
