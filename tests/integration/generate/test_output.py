"""What `fluxmesh generate` tells and writes, and what an interrupted one leaves behind."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.integration.conftest import Run, environment
from tests.integration.generate.results import SIZE, names


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


def test_verbose_tells_the_peak_of_each_phase(fluxmesh: Run, checkpoint: Path) -> None:
    done = fluxmesh("generate", "dogs", "--model", checkpoint, *SIZE, "--verbose")
    for phase in ("for the text", "for the generation", "for the decoding", "overall"):
        assert f"Peak memory used {phase}:" in done.err


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
        + ["--model", str(checkpoint), *SIZE, "--steps", "500", "-n", "50"],
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
