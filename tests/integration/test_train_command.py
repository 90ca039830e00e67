"""`fluxmesh train`, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.datasets import make_dataset, write_lines, write_pictures
from tests.integration.conftest import Run, environment

LONG = 600  # iterations: not done before the command is interrupted, on a busy machine neither
DOCS = Path(__file__).resolve().parents[2] / "docs"
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
        *("--cache-dir", tmp_path / "cache", *OPTIONS, "--iterations", LONG, "--seed", 1),
        *("--checkpoint-every", LONG, "--json"),
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
        out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    states = list((tmp_path / "mlx_output").glob("*_state.safetensors"))
    assert len(states) == 1
    stopped = int(states[0].name[:7])
    assert 2 <= stopped < LONG
    again = train("--json", "--iterations", LONG, "--checkpoint-every", LONG, "--resume")
    assert again.code == 0, again.err
    assert again.of("prepared")[0]["begins_at"] == stopped // 2
    metrics = (tmp_path / "mlx_output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in metrics] == list(range(1, LONG // 2 + 1))


def test_a_misspelt_folder_is_answered_at_once_without_asking_the_hub(
    fluxmesh: Run, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "dog-6")
    began = time.monotonic()
    for name, code in (("dog6", 2), ("owner/dog6", 1)):
        done = fluxmesh("train", name, "--model", "tiny")
        assert done.code == code, done.err
        assert f"There is no folder {name}" in done.err
        assert "Retry" not in done.err and "Traceback" not in done.err
    assert "did you mean dog-6?" in fluxmesh("train", "dog6", "--model", "tiny").err
    assert time.monotonic() - began < 150


def test_json_tells_a_run_in_few_lines_that_end_with_its_files(train: Run) -> None:
    done = train("--json", "--progress-prompt", "a dog", "--progress-every", 8)
    assert done.code == 0, done.err
    kinds = [line["event"] for line in done.events]
    assert kinds[0] == "start" and kinds.count("updated") == 4
    assert kinds.count("checkpoint") == 2 and kinds.count("prepared") == 1
    assert kinds.count("loading") + kinds.count("encoding") < 20
    assert done.events[-1] == {
        "event": "done",
        "files": [line["path"] for line in done.of("saved")],
    }
    assert done.events[-1]["files"][-1] == "mlx_output/final_adapters.safetensors"
    documented = (DOCS / "json.md").read_text(encoding="utf-8")
    assert all(f"| `{kind}` |" in documented for kind in kinds)


def test_captions_of_other_tools_are_trained_on_and_what_is_passed_over_is_told(
    train: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    names = write_pictures(folder / "10_sks dog")
    (folder / "metadata.csv").write_text(f"file_name,text\n10_sks dog/{names[0]},a red dog\n")
    (folder / "10_sks dog" / "1.caption").write_text("a blue dog")
    (folder / "lost.txt").write_text("a green dog")
    done = train("--seed", 1, dataset=folder)
    assert done.code == 0, done.err
    assert (
        "pictures: 1 picture: 10_sks dog/2.png without a caption file; kohya's folder" in done.err
    )
    assert "pictures: 1 text: lost.txt without a picture of the same name." in done.err
    assert "which changes nothing: --iterations says how long the training is" in done.err
    report = (tmp_path / "mlx_output" / "report.html").read_text()
    assert all(caption in report for caption in ("a red dog", "a blue dog", "sks dog"))
    notes = train("--json", "--output-dir", "other", dataset=folder).of("note")
    assert len(notes) == 3 and all("--" in n["text"] or "pictur" in n["text"] for n in notes)


def test_what_a_run_worked_out_is_told_and_kept_by_its_resume(
    fluxmesh: Run, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    words = ("train", data, "--model", checkpoint, "--cache-dir", tmp_path / "cache", "--json")
    words += ("--iterations", 40, "--num-augmentations", 1, "--checkpoint-every", 40)
    words += ("--resolution", "32x32", "--lora-rank", 2, "--dtype", "float32")
    first = fluxmesh(*words)
    assert first.code == 0, first.err
    (prepared,) = first.of("prepared")
    assert (prepared["updates"], prepared["warmup"]) == (10, 1)
    assert prepared["rate"] > 1e-4, "a narrow model learns at a higher rate"
    again = fluxmesh(*words, "--resume")
    assert again.code == 0, again.err
    assert again.of("prepared")[0]["begins_at"] == 10
    other = fluxmesh(*words, "--resume", "--learning-rate", 0.5)
    assert other.code == 2 and "learning_rate was" in other.err


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
        (("--prior-weight", 0.5), "--prior-weight has no effect without --prior-folder"),
        (("--progress-every", 10), "--progress-every has no effect without --progress-prompt"),
        (("--progress-steps", 2), "--progress-steps has no effect without --progress-prompt"),
        (("--weight-decay", 0.1), "--weight-decay is of adamw"),
        (("--caption-column", "words"), "the key 'words' is missing"),
        (("--split", "test"), "--split is 'test', for which"),
        (("--resume",), "--resume goes on from a checkpoint, and mlx_output holds none"),
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
