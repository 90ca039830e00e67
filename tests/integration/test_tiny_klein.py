"""The embedded checkpoint that edits, as someone uses it who has fetched no model at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.integration.conftest import Run

BLUE, YELLOW = (34, 80, 180), (255, 230, 110)  # about what captions call so
NEAR = 60  # by which each colour of a pixel may be off
SIZE = ("--image-size", "64x64")  # a quarter of the time that its own size takes


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def is_ground(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Whether all four corners have a colour, which things of these prompts leave free."""
    corners = pixels[[4, 4, -5, -5], [4, -5, 4, -5]]
    return bool((np.abs(corners - colour) < NEAR).all())


def redness(pixels: np.ndarray) -> np.ndarray:
    """Where it is red, bool [height, width]."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (red > green + 60) & (red > blue + 60)


def test_a_prompt_and_an_edit_of_what_it_painted(fluxmesh: Run, tmp_path: Path) -> None:
    """Without --model references choose the embedded one that reads them, and tell so."""
    done = fluxmesh(
        *("generate", "a red apple on a blue background", "--model", "tiny-klein"),
        *("--seed", "3", "--output", "apple.png", *SIZE),
    )
    assert done.code == 0, done.err
    apple = picture(tmp_path / "apple.png")
    assert apple.shape == (64, 64, 3)
    assert is_ground(apple, BLUE) and redness(apple).mean() > 0.03

    done = fluxmesh(
        *("generate", "make the background yellow", "--reference", "apple.png"),
        *("--seed", "4", "--output", "yellow.png"),
    )
    assert done.code == 0, done.err
    assert "tiny-klein" in done.err + done.out
    yellow = picture(tmp_path / "yellow.png")
    assert is_ground(yellow, YELLOW)
    kept = redness(apple)
    assert (redness(yellow) & kept).sum() > 0.7 * kept.sum(), "the apple stays where it was"
