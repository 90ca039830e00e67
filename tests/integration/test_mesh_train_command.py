"""`fluxmesh train` while a mesh is up: a process of its own, that is struck and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.training import checkpoint
from tests.faults.mesh import LIMIT, Up, up
from tests.trainings import asked, final, make_place, run

# Hears Ctrl-C also where its parent was started by a shell that runs it in the background.
PROGRAM = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fluxmesh_coordinator.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def mesh(place, tmp_path_factory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("mesh")
    # An update takes 0.8 s at least: a command is in the next one when it is struck.
    with up(folder, 2, str(place / "model"), delays="step=0.4") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> str:
    """What `OPTIONS` come to in this process."""
    out = tmp_path_factory.mktemp("alone")
    run(asked(place, out, iterations=40, checkpoint_every=12, lora_blocks=2, ema=0.9))
    return final(out)


def arguments(place: Path, out: Path, *more: object) -> list[str]:
    """The command of `alone`, as a user would type it."""
    options: dict[str, object] = {
        "model": place / "model",
        "seed": 7,
        "dtype": "float32",
        "iterations": 40,
        "grad-accumulate": 4,
        "batch-size": 2,
        "num-augmentations": 2,
        "lora-rank": 4,
        "lora-dropout": 0.1,
        "lora-blocks": 2,
        "caption-dropout": 0.2,
        "warmup-steps": 1,
        "learning-rate": 3e-3,
        "ema": 0.9,
        "checkpoint-every": 12,
        "output-dir": out,
        "cache-dir": place / "cache",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["train", str(place / "data"), *words, *map(str, more)]


def struck(mesh: Up, words: list[str], updates: int, number: int) -> tuple[int, list[Any], str]:
    """Runs a command until it has told so many updates, then sends a signal.

    (exit status, events, what it wrote on stderr).
    """
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words, "--json"],
        env=mesh.env,
        cwd=mesh.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if sum(event["event"] == "updated" for event in events) == updates:
            process.send_signal(number)
            break
    _, said = process.communicate(timeout=LIMIT)
    return process.returncode, events, said


def test_the_command_trains_on_the_mesh_and_says_how(mesh, place, tmp_path, alone):
    done = mesh.fluxmesh(*arguments(place, tmp_path / "out"))
    assert "10 updates of 8 images: 4 a host on 2 hosts." in done.stderr
    assert final(tmp_path / "out") == alone
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 11))


@pytest.mark.parametrize("updates", [1, 5])
def test_a_command_that_was_killed_goes_on_to_the_same_bytes(mesh, place, tmp_path, alone, updates):
    words = arguments(place, tmp_path / "out")
    status, _, _ = struck(mesh, words, updates, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "out" / checkpoint.FINAL).exists()
    mesh.fluxmesh(*words, *([] if updates == 1 else ["--resume"]))
    assert final(tmp_path / "out") == alone


def test_ctrl_c_saves_the_last_whole_update_and_exits_130(mesh, place, tmp_path, alone):
    words = arguments(place, tmp_path / "out")
    status, events, said = struck(mesh, words, 2, signal.SIGINT)
    assert status == 130, said
    assert "go on with --resume" in said
    (saved,) = checkpoint.iterations(tmp_path / "out")
    assert saved in (8, 12) and all(event["event"] != "checkpoint" for event in events)
    mesh.fluxmesh(*words, "--resume")
    assert final(tmp_path / "out") == alone
