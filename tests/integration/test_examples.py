"""The programs in examples/ run as they are, and do what their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.weights.hub import tiny_folder
from tests.integration.conftest import environment

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {  # of the PNG that each writes: height, width
    "text_to_image": (128, 192),
    "seeds": (128, 128),
    "inpaint": (128, 256),
    "custom_loss": (64, 128),
    "mesh": (64, 128),
}


@pytest.fixture
def model(checkpoint: Path) -> str:
    """The embedded checkpoint, where the package has it; else random weights."""
    return "tiny" if (tiny_folder() / "model_index.json").is_file() else str(checkpoint)


def example(name: str, model: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), model],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(folder / f"{name}.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (*SIZES[name], 3)
    assert pixels.std() > 2
    return done.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SIZES)


def test_text_to_image(model: str, tmp_path: Path) -> None:
    assert "step 1 done" in example("text_to_image", model, tmp_path)


def test_seeds(model: str, tmp_path: Path) -> None:
    assert "the third image: True" in example("seeds", model, tmp_path)


def test_inpaint(model: str, tmp_path: Path) -> None:
    assert "nothing changed: True" in example("inpaint", model, tmp_path)


def test_custom_loss(model: str, tmp_path: Path) -> None:
    printed = example("custom_loss", model, tmp_path)
    plain, guided = (float(number) for number in re.findall(r"is (\d\.\d+) away", printed))
    assert guided < plain


def test_mesh(model: str, tmp_path: Path) -> None:
    printed = example("mesh", model, tmp_path)
    assert "data on hosts (0,): The mesh has one host." in printed
    assert "image 1: step 1 of" in printed and "host 0" in printed
