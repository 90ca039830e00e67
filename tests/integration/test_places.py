"""Files that are named: missing ones, places that take nothing, `~`, and what a PNG tells."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.datasets import make_dataset
from tests.integration.conftest import Run
from tests.overflowing import write_lora
from tests.unwritable import unwritable_folder

SIZE = ("--image-size", "32x48", "--steps", "1", "--seed", "1")
PAINT = ("generate", "a dog", *SIZE)
GONE = "gone.safetensors"
# A file that is not there is what the user typed wrong, in whatever command and option.
MISSING = [
    (*PAINT, "--model", "./gone"),
    (*PAINT, "--model", GONE),
    (*PAINT, "--adapter", GONE),
    (*PAINT, "--image", "gone.png"),
    (*PAINT, "--image", "photo.png", "--mask", "gone.png"),
    (*SIZE, "--prompt-file", "gone.txt"),
    (*SIZE, "--from", "gone.png"),
    ("interactive", "--image", "gone.png"),
    ("plan", "--model", "./gone"),
    ("plan", "--adapter", GONE),
    ("plan", "--hostfile", "gone.json", "--assume", "gone.json"),
    ("train", "./gone", "--model", "tiny"),
    ("train", "data", "--model", "./gone"),
    ("adapters", "convert", GONE, "out.safetensors", "--to", "kohya"),
    ("adapters", "convert", "lora.safetensors", "o.safetensors", "--to", "bfl", "-m", "./gone"),
    ("adapters", "fuse", "tiny", GONE, "folder"),
    ("adapters", "fuse", "./gone", "lora.safetensors", "folder"),
    ("models", "quantize", "./gone", "folder"),
    ("up", "gone.json"),
    ("up", "--model", "./gone"),
    ("doctor", "gone.json"),
]


@pytest.mark.parametrize("command", MISSING, ids=" ".join)
def test_a_file_that_is_not_there_is_told_alone_and_exits_2(
    fluxmesh: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    write_lora(tmp_path / "lora.safetensors", 0.1)
    make_dataset(tmp_path / "data")
    before = sorted(os.listdir(tmp_path))
    whole = command if command[0][0] != "-" else ("generate", *command)
    done = fluxmesh(*whole)
    assert done.code == 2, done.err
    (error,) = (line for line in done.err.splitlines() if line.startswith("Error: "))
    assert "gone" in error and "lost" not in done.err and "Traceback" not in done.err
    assert sorted(os.listdir(tmp_path)) == before


def unwritable(tmp_path: Path, folder: Path) -> list[tuple[str, ...]]:
    """Commands that would write into `folder`, or into a file."""
    return [
        (*PAINT, "-o", f"{folder}/dog.png"),
        (*PAINT, "-o", f"{folder}", "--save-raw"),
        (*PAINT, "-o", "file/dog.png"),
        (*PAINT, "--stepwise", f"{folder}/steps"),
        (*PAINT, "--stepwise", "file/steps"),
        ("interactive", "-o", f"{folder}"),
        ("train", "data", "--model", "tiny", "--output-dir", f"{folder}/out"),
        ("train", "data", "--model", "tiny", "--output-dir", "file"),
        ("train", "data", "--model", "tiny", "--cache-dir", f"{folder}/cache"),
        ("adapters", "convert", "lora.safetensors", f"{folder}/a.safetensors", "--to", "kohya"),
        ("adapters", "convert", "lora.safetensors", "file/a.safetensors", "--to", "kohya"),
        # These names can't be fetched without a network: the place is looked at first.
        ("adapters", "fuse", "schnell", "lora.safetensors", f"{folder}/fused"),
        ("adapters", "fuse", "schnell", "lora.safetensors", "file/fused"),
        ("models", "quantize", "schnell", f"{folder}/small"),
        ("models", "quantize", "schnell", "no/small"),
        (*PAINT, "-o", "no/dog.png"),
        (*PAINT, "-o", "no/"),
        ("interactive", "-o", "no/"),
        ("adapters", "convert", "lora.safetensors", "no/a.safetensors", "--to", "kohya"),
        ("adapters", "fuse", "schnell", "lora.safetensors", "no/fused"),
    ]


def test_a_place_that_takes_nothing_is_told_before_anything_is_loaded(
    fluxmesh: Run, tmp_path: Path
) -> None:
    write_lora(tmp_path / "lora.safetensors", 0.1)
    make_dataset(tmp_path / "data")
    (tmp_path / "file").write_text("")
    with unwritable_folder(tmp_path / "locked") as folder:
        before = sorted(os.listdir(tmp_path))
        for command in unwritable(tmp_path, folder):
            done = fluxmesh(*command)
            # What can't be a folder was named wrongly; what takes nothing may take it later.
            named_wrongly = any(word.startswith(("file", "no/")) for word in command)
            assert done.code == (2 if named_wrongly else 1), (command, done.err)
            (error,) = (line for line in done.err.splitlines() if line.startswith("Error: "))
            assert any(place in error for place in (str(folder), "/file", "/no", " no/")), error
            assert "Painting with" not in done.err and "Fetching" not in done.err
            assert sorted(os.listdir(tmp_path)) == before, command
        if os.geteuid():  # else it is /proc, which is no folder to work in
            return
        here = fluxmesh(*PAINT, "--model", "tiny", "-o", f"{folder}")
        assert here.code == 1 and "Painting with" not in here.err


def test_a_tilde_is_home_in_every_path(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(home / "photo.png")
    Image.fromarray(np.tile(np.uint8([[0, 255]]), (32, 24))).save(home / "mask.png")
    (home / "prompts.txt").write_bytes(b"\xef\xbb\xbfa dog\n")
    write_lora(home / "lora.safetensors", 0.1)
    (home / "model").symlink_to(checkpoint)
    done = fluxmesh(
        *("generate", "--prompt-file=~/prompts.txt", "--model=~/model", *SIZE[2:]),
        *("--image=~/photo.png", "--mask=~/mask.png", "--adapter=~/lora.safetensors:0.5"),
        *("-o", "~/dog.png", "--stepwise=~/steps"),
    )
    assert done.code == 0, done.err
    assert (home / "dog.png").is_file() and list((home / "steps").iterdir())
    again = fluxmesh("generate", "--from=~/dog.png", "-o", "~/again.png")
    assert again.code == 0, again.err
    assert (home / "again.png").read_bytes() == (home / "dog.png").read_bytes()
    converted = fluxmesh(
        *("adapters", "convert", "~/lora.safetensors", "~/k.safetensors", "--to", "kohya"),
        *("--model", "~/model"),
    )
    assert converted.code == 0, converted.err
    assert (home / "k.safetensors").is_file()
    assert sorted(os.listdir(tmp_path)) == ["home"]


def test_no_metadata_leaves_everything_but_the_pixels_out(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    asked = ("generate", "a secret", "--model", checkpoint, *SIZE, "-n", "2")
    assert fluxmesh(*asked, "-o", "told.png").code == 0
    told = Image.open(tmp_path / "told.png")
    assert "a secret" in told.text["fluxmesh"]
    done = fluxmesh(*asked, "--no-metadata", "-o", "bare.png", "--stepwise", "steps", "--json")
    assert done.code == 0, done.err
    raw = fluxmesh(*asked, "--no-metadata", "-o", "raw.png", "--save-raw")
    assert raw.code == 0, raw.err
    names = ["bare.png", "raw.0.png", "raw.1.png", *map(str, (tmp_path / "steps").iterdir())]
    assert len(names) == 5
    for name in names:
        path = tmp_path / name
        assert Image.open(path).info == {}, name
        assert b"secret" not in path.read_bytes() and b"fluxmesh" not in path.read_bytes()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "bare.png")), np.asarray(told))
    assert done.of("start")[0]["prompt"] == "a secret", "a program hears what it asked for"
    again = fluxmesh("generate", "--from", "bare.png")
    assert again.code == 2 and "--no-metadata" in again.err
    spoken = fluxmesh(
        *("interactive", "--model", checkpoint, *SIZE, "--no-metadata"), stdin="a secret\n"
    )
    assert spoken.code == 0, spoken.err
    assert Image.open(tmp_path / "out.png").info == {}


def test_what_has_no_effect_is_told(fluxmesh: Run, checkpoint: Path, tmp_path: Path) -> None:
    asked = ("generate", "a dog", "--model", checkpoint, *SIZE, "--n-rows", "2")
    one = fluxmesh(*asked, "--fuse-adapter", "-o", "one.png")
    assert one.code == 0 and "--n-rows has no effect: it is of a grid, and there is one" in one.err
    assert "--fuse-adapter has no effect" in one.err
    raw = fluxmesh(*asked, "-n", "2", "--save-raw", "-o", "raw.png")
    assert raw.code == 0 and "--n-rows has no effect" in raw.err
    grid = fluxmesh(*asked, "-n", "2", "-o", "grid.png")
    assert grid.code == 0 and "no effect" not in grid.err
    make_dataset(tmp_path / "data")
    for option in (
        ("--prior-weight", "2"),
        ("--progress-every", "5"),
        ("--progress-steps", "5"),
        ("--weight-decay", "0.1"),
    ):
        done = fluxmesh("train", "data", "--model", "tiny", *option)
        assert done.code == 2 and option[0] in done.err, done.err


@pytest.mark.parametrize("pair", ["LD_PRELOAD=x.so", "DYLD_INSERT_LIBRARIES=x", "MLX_RANK=3"])
def test_engines_take_only_variables_that_the_hostfile_page_names(
    fluxmesh: Run, tmp_path: Path, pair: str
) -> None:
    done = fluxmesh("up", "--model", "tiny", "--env", pair)
    assert done.code == 2, done.err
    assert f"--env {pair.partition('=')[0]}: " in done.err and "hostfiles/README.md" in done.err
