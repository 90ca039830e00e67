"""What `report.html` says of a run, from its beginning to every kind of end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxmesh.errors import CancelledError
from fluxmesh.training import checkpoint
from fluxmesh.training.data.dataset import load_dataset
from fluxmesh.training.events import CheckpointSaved, Dealt, Finished, Prepared, Updated, Validated
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import DivergedError
from fluxmesh_coordinator.artifacts.training_html import REFRESH
from fluxmesh_coordinator.console.training_page import TrainingPage
from tests.datasets import CAPTIONS, make_dataset


class Story:
    """A run of 40 iterations, 10 updates, whose files are made as events come."""

    def __init__(self, folder: Path, **changed: object) -> None:
        data = make_dataset(folder / "owner" / "dogs")
        self.out = folder / "out"
        self.out.mkdir()
        self.request = TrainRequest(
            **{"dataset": str(data), "seed": 1, "iterations": 40, "output_dir": str(self.out)}
            | changed
        )
        self.clock = 1000.0
        self.page = TrainingPage(self.request, lambda: self.clock)
        self.page.event(
            Prepared(
                images=3, priors=0, sizes={(64, 64): 3}, held_out=0, updates=10, micro_batches=4,
                batch_size=1, numbers=1, warmup=1, rate=1e-4, begins_at=0, revision="",
                examples=load_dataset(str(data)),
            )
        )  # fmt: skip

    def update(self, update: int, seconds: float = 2.0) -> None:
        self.clock += seconds
        event = Updated(update, 4 * update, 0.5, 1e-4, 1.0, 4, seconds, 0)
        self._measured({"event": "updated", "iteration": 4 * update, "loss": 0.5})
        self.page.event(event)

    def look(self, iteration: int, loss: float) -> None:
        self._measured({"event": "validated", "iteration": iteration, "loss": loss})
        self.page.event(Validated(iteration, loss, False))

    def save(self, iteration: int) -> None:
        checkpoint.state_path(self.out, iteration).touch()
        path = checkpoint.adapters_path(self.out, iteration)
        self.page.event(CheckpointSaved(iteration, path))

    def finish(self) -> None:
        (self.out / checkpoint.FINAL).touch()
        self.page.event(Finished(self.out / checkpoint.FINAL))

    def _measured(self, line: dict[str, object]) -> None:
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def text(self) -> str:
        return (self.out / "report.html").read_text()


def test_a_run_that_begins_shows_what_it_is_taught_and_by_whom(tmp_path: Path) -> None:
    story = Story(tmp_path, trigger="")
    assert "<b>Running</b>: iteration 0 of 40." in story.text
    assert "tiny learns dogs" in story.text
    assert all(caption in story.text for caption in CAPTIONS)
    assert "<td>hosts</td><td>this machine</td>" in story.text
    assert "Use it" not in story.text, "nothing is learned yet"
    assert str(tmp_path / "owner") not in story.text, "a friend need not know where it lay"


def test_it_is_written_every_few_seconds_with_the_time_that_is_left(tmp_path: Path) -> None:
    story = Story(tmp_path)
    before = story.text
    story.update(1)
    assert story.text == before
    for update in range(2, 7):
        story.update(update, seconds=REFRESH / 5)
    assert "iteration 20 of 40, about 10 s left" in story.text
    for update in range(7, 10):
        story.update(update, seconds=3600.0)
    assert "about 20 min left" in story.text, "the mean of the latest updates: one is left"


def test_hosts_and_their_shares_are_told(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.page.event(Dealt(updates=10, micro_batches=4, batch_size=1, shares={0: 3, 1: 1}))
    story.save(4)
    assert "2 (batches of an update by host: 0: 3, 1: 1)" in story.text


def test_the_best_is_the_lowest_of_what_was_measured_where_its_checkpoint_is_kept(
    tmp_path: Path,
) -> None:
    story = Story(tmp_path, validation=1)
    for iteration, loss in ((4, 0.1), (8, 0.3), (12, 0.2), (16, 0.4)):
        if iteration > 4:
            checkpoint.state_path(story.out, iteration).touch()
        story.look(iteration, loss)
    assert "iteration 12, with a loss of 0.2000" in story.text
    assert f"--adapter {checkpoint.adapters_path(story.out, 12)}" in story.text
    story.save(40)
    story.look(40, 0.15)
    story.finish()
    assert f"--adapter {story.out / checkpoint.FINAL}" in story.text
    assert f"fluxmesh generate &#x27;{CAPTIONS[0]}&#x27; --model tiny" in story.text


def test_without_a_measure_the_last_is_named_as_such(tmp_path: Path) -> None:
    story = Story(tmp_path, progress_prompt="a dog on the moon")
    story.save(20)
    assert "The last so far, of iteration 20; which is best was not measured" in story.text
    story.finish()
    assert "The last; which is best was not measured" in story.text
    assert "generate &#x27;a dog on the moon&#x27;" in story.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "<b>Stopped</b> at iteration 8 of 40; `--resume` goes on from there"),
        (CancelledError("Stopped."), "<b>Stopped</b> at iteration 8 of 40"),
        (
            DivergedError("The loss <rose>: lower `learning_rate`."),
            "<b>Failed</b>: The loss &lt;ro",
        ),
        (ZeroDivisionError("secret"), "<b>Failed</b>: ZeroDivisionError"),
    ],
)
def test_every_end_is_told_and_nothing_asks_to_be_read_again(
    tmp_path: Path, error: BaseException, said: str
) -> None:
    story = Story(tmp_path)
    story.save(8)
    assert 'http-equiv="refresh"' in story.text
    story.page.ended(error)
    assert said in story.text and 'http-equiv="refresh"' not in story.text
    assert "lower --learning-rate" in story.text or "lower" not in said


def test_a_good_end_says_how_long_it_took(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.update(1, seconds=600.0)
    story.finish()
    assert "<b>Done</b> after 10 min." in story.text and "refresh" not in story.text


def test_an_end_before_the_beginning_writes_no_page(tmp_path: Path) -> None:
    request = TrainRequest("data", 1, output_dir=str(tmp_path))
    TrainingPage(request).ended(KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
