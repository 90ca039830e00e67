"""`fluxmesh train`, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.datasets import make_dataset, write_lines
from tests.integration.conftest import Run, environment

OPTIONS = (
    *("--iterations", 8, "--grad-accumulate", 2, "--num-augmentations", 1, "--lora-rank", 2),
    *("--warmup-steps", 1, "--learning-rate", 0.01, "--checkpoint-every", 4, "--dtype", "float32"),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


@pytest.fixture
def train(fluxmesh: Run, data: Path, checkpoint: Path, tmp_path: Path) -> Run:
    """Runs `fluxmesh train` on a random model, its cache in `tmp_path`."""

    def run(*more: object, dataset: object = data):
        cache = ("--cache-dir", tmp_path / "cache")
        return fluxmesh("train", dataset, "--model", checkpoint, *cache, *OPTIONS, *more)

    return run


def test_a_data_set_becomes_an_adapter_that_generate_takes(
    train: Run, fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    done = train("--seed", 3, "--progress-prompt", "a dog", "--progress-every", 4)
    assert done.code == 0, done.err
    assert "3 pictures" in done.err and "4 updates of 2 images" in done.err
    out = tmp_path / "mlx_output"
    assert done.out.splitlines()[-1] == "Saved mlx_output/final_adapters.safetensors"
    assert sorted(path.name for path in out.glob("*.png")) == [
        "0000000_progress.png",
        "0000004_progress.png",
        "0000008_progress.png",
    ]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6, 8]
    assert all(line["loss"] > 0 for line in lines)
    assert "iteration 8" in (out / "report.html").read_text()

    painted = fluxmesh("generate", "--from", out / "0000008_progress.png", "--output", "again.png")
    assert painted.code == 0, painted.err
    plain = fluxmesh("generate", "a dog", "--model", checkpoint, "--adapter", "mlx_output")
    assert plain.code == 0, plain.err


def test_a_seed_that_was_drawn_is_told_and_kept_by_a_resume(train: Run, tmp_path: Path) -> None:
    first = train("--json", "--output-dir", "a")
    assert first.code == 0, first.err
    seed = first.of("start")[0]["seed"]
    again = train("--json", "--output-dir", "a", "--resume")
    assert again.code == 0, again.err
    assert again.of("start")[0]["seed"] == seed
    assert again.of("updated") == []
    third = train("--json", "--output-dir", "b", "--seed", seed)
    assert third.code == 0
    files = [tmp_path / name / "final_adapters.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_that_holds_a_training_is_left_alone(train: Run) -> None:
    assert train().code == 0
    refused = train()
    assert refused.code == 1
    assert "--resume" in refused.err and "Traceback" not in refused.err


def test_ctrl_c_saves_and_exits_130_and_resume_goes_on(
    train: Run, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "fluxmesh_coordinator", "train", data, "--model", checkpoint),
        *("--cache-dir", tmp_path / "cache", *OPTIONS, "--iterations", 160, "--seed", 1),
        *("--checkpoint-every", 160, "--json"),
    ]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env=environment(tmp_path / "home") | {"HOME": os.environ.get("HOME", "/")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            if json.loads(line)["event"] == "updated":
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    states = list((tmp_path / "mlx_output").glob("*_state.safetensors"))
    assert len(states) == 1
    stopped = int(states[0].name[:7])
    assert 2 <= stopped < 160
    again = train("--json", "--iterations", 160, "--checkpoint-every", 160, "--resume")
    assert again.code == 0, again.err
    assert again.of("prepared")[0]["begins_at"] == stopped // 2
    metrics = (tmp_path / "mlx_output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in metrics] == list(range(1, 81))


def test_mistakes_in_the_data_set_are_told_and_nothing_is_written(
    train: Run, tmp_path: Path
) -> None:
    write_lines(tmp_path / "bad", [{"image": "no.png", "prompt": "a"}, "", {"image": "x"}])
    done = train(dataset=tmp_path / "bad")
    assert done.code == 2
    assert "3 problems" in done.err
    assert "line 1" in done.err and "line 2" in done.err and "line 3" in done.err
    assert not (tmp_path / "mlx_output").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--resolution", "500x512"), "--resolution"),
        (("--lora-targets", "*.to_q"), "--lora-targets"),
        (("--iterations", 0), "--iterations"),
        (("--bits", 3), "--bits"),
    ],
)
def test_a_wrong_option_is_a_usage_error(train: Run, options: tuple, said: str) -> None:
    done = train(*options)
    assert done.code == 2
    assert said in done.err and "Traceback" not in done.err
