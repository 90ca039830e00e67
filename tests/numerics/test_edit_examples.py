"""The sheet of edits for docs/, from a checkpoint that nobody trained: `tools/tiny/evaluate.py`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.flux2_checkpoint import make_flux2
from tests.paths import ROOT

TOOLS = ROOT / "tools" / "tiny"
NAMES = ("scenes", "edits", "sprites", "score", "example_sheet", "evaluate")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Modules of `tools/tiny`, which import each other by bare names."""
    monkeypatch.syspath_prepend(str(TOOLS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)


def test_a_checkpoint_s_edits_become_a_sheet_in_one_command(
    programs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_flux2(tmp_path / "klein")
    side, sprites = 64, tmp_path / "sprites.npz"
    shape = (len(programs["scenes"].NAMES), programs["sprites"].SIDE, programs["sprites"].SIDE, 4)
    drawn = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(sprites, sprites=drawn)
    options = f"--edits --count 3 --steps 1 --height {side} --width {side} --dtype float32"
    sheet = tmp_path / "edits.png"
    command = ["evaluate.py", "--model", model, "--sprites", sprites, "--examples", sheet]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *options.split()])
    programs["evaluate"].main()
    made = np.asarray(Image.open(sheet))
    asked = programs["edits"].questions(3, 0)
    most = max(len(edit.references) for edit in asked)
    gap, words = programs["example_sheet"].GAP, programs["example_sheet"].WORDS
    assert made.shape == (3 * side + 2 * gap, (most + 1) * (side + gap) + words, 3)
    for row, edit in enumerate(asked):
        part = made[row * (side + gap) : row * (side + gap) + side]
        last = part[:, (most - 1) * (side + gap) : most * (side + gap) - gap]
        expected = programs["sprites"].draw(
            edit.references[-1].scene(side, side), drawn, side, side
        )
        assert np.array_equal(last, expected)
        said = part[:, most * (side + gap) : most * (side + gap) + words]
        assert said.min() < 128 < said.mean(), "dark letters on white"
        assert part[:, -side:].std() > 1, "noise, of an untrained model"


def test_an_instruction_is_broken_into_lines_that_fit(programs: dict[str, Any]) -> None:
    sheet = programs["example_sheet"]
    font = sheet.ImageFont.load_default(sheet.LETTERS)
    text = "Put the dog from the second picture to the right of the apple, and keep the background."
    lines = sheet.wrapped(text, font, sheet.WORDS)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(font.getlength(line) <= sheet.WORDS for line in lines)
