"""`fluxmesh interactive` in a process of its own, fed through a pipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.integration.conftest import Run


def test_prompts_share_one_warm_process(fluxmesh: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    lines = ["two dogs", "/size 48x32", "/steps 3", "two dogs", "/model nobody/nothing", "a cat"]
    done = fluxmesh(
        *("interactive", "--model", checkpoint, "--image-size", "32x32", "--seed", "7"),
        *("-o", "pictures", "--verbose"),
        stdin="\n".join(lines),
    )
    assert done.code == 0, done.err
    assert done.err.count("Read the prompt") == 2
    assert done.err.count("(seen before)") == 1  # the encoders did not run again
    assert done.err.count("Error: ") == 1
    recipes = [read_recipe(tmp_path / "pictures" / name) for name in ("out.png", "out-1.png")]
    assert [(r.height, r.width, r.steps) for r in recipes] == [
        (32, 32, recipes[0].steps),
        (48, 32, 3),
    ]
    alone = fluxmesh(
        *("generate", "two dogs", "--model", checkpoint, "--image-size", "48x32"),
        *("--steps", "3", "--seed", "7", "-o", "alone.png"),
    )
    assert alone.code == 0, alone.err
    warm = (tmp_path / "pictures" / "out-1.png").read_bytes()
    assert warm == (tmp_path / "alone.png").read_bytes()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf8_is_told_and_the_next_is_painted(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", f"utf-8:{errors}")
    done = fluxmesh(
        *("interactive", "--model", checkpoint, "--image-size", "32x32", "--steps", "1"),
        stdin=b"a \xff dog\ntwo dogs\n",
    )
    assert done.code == 0, done.err
    assert done.err.count("Error: The prompt is not valid UTF-8") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_interactive_takes_a_folder_not_a_file(fluxmesh: Run) -> None:
    done = fluxmesh("interactive", "-o", "dog.png")
    assert done.code == 2
    assert "interactive takes a folder" in done.err


def test_a_prompt_that_is_cut_is_told_each_time(fluxmesh: Run, checkpoint: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    done = fluxmesh(
        *("interactive", "--model", checkpoint, "--image-size", "32x32", "--steps", "1"),
        stdin=f"{long}\na dog\n{long}\n",
    )
    assert done.code == 0, done.err
    assert done.err.count("tokens of the prompt; left out is all from “") == 2
