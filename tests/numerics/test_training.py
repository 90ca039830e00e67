"""Training end to end on a random model: the same bytes however the work is cut up."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import (
    CancelledError,
    DoesNotFitError,
    FluxmeshError,
    NotFiniteError,
    OutputError,
    UsageError,
)
from fluxmesh.storage.safetensors import read_header
from fluxmesh.training import checkpoint
from fluxmesh.training.compute.learner import Learner, UpdateResult
from fluxmesh.training.data.dataset import load_dataset
from fluxmesh.training.events import (
    Note,
    Prepared,
    Progress,
    Updated,
    Validated,
)
from fluxmesh.training.local_executor import DivergedError, train
from fluxmesh.training.micro_batches import deal
from fluxmesh.training.notes import notes_of
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import Run
from fluxmesh.weights.hub import resolve
from tests.datasets import make_dataset, write_lines
from tests.overflowing import overflowing as overflowing_model
from tests.trainings import FINAL, asked, final, learner, make_place, of, run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def place_of(tmp_path_factory) -> Callable[[str], Path]:
    """As `place`, of any model."""
    return functools.cache(lambda model: make_place(tmp_path_factory.mktemp(model), model))


# --- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype", "updates"),
    [
        ("dev", "float32", 5),
        ("dev", "bfloat16", 5),
        ("klein-base", "float32", 3),
        ("flux2-dev", "bfloat16", 3),
    ],
)
def test_any_number_of_hosts_gives_the_same_bytes(place_of, tmp_path, model, dtype, updates):
    """Updates of 8 micro-batches, which 3 hosts don't divide. Each deal is summed on its own."""
    short = {"iterations": 8 * updates, "grad_accumulate": 8, "batch_size": 1, "lora_blocks": 2}
    request = asked(place_of(model), tmp_path, dtype=dtype, **short)
    made = learner(request)
    start = made.state
    trained = []
    for hosts in (1, 2, 3):
        made.state = start
        made.adapters.install(made.adapters.unflatten(start.weights))
        for update in range(request.updates):
            numbers = request.micro_batches(update)
            totals = [made.total(hand, len(numbers)) for hand in deal(numbers, [1.0] * hosts)]
            total = totals[-1]
            for other in totals[:-1]:
                total = total + other
            assert made.advance(total).bad == 0
        trained.append(np.array(made.state.weights).tobytes())
    assert trained[0] == trained[1] == trained[2]
    assert trained[0] != np.array(start.weights).tobytes()


@pytest.mark.parametrize("model", ["dev", "klein", "klein-base"])
def test_what_is_looked_at_on_the_way_changes_nothing(place_of, tmp_path, model):
    place = place_of(model)
    run(asked(place, tmp_path / "a"))
    events = run(
        asked(
            place,
            tmp_path / "b",
            progress_prompt="a cat",
            progress_every=4,
            checkpoint_every=16,
            grad_checkpoint=True,
        )
    )
    assert final(tmp_path / "a") == final(tmp_path / "b")
    pictures = of(events, Progress)
    assert [event.iteration for event in pictures] == [0, 4, 8, 12, 16]
    assert pictures[0].pixels.shape == (32, 32, 3)
    assert (pictures[0].pixels != pictures[-1].pixels).any()


def test_another_seed_gives_another_adapter(place, tmp_path):
    run(asked(place, tmp_path / "a"))
    run(asked(place, tmp_path / "b", seed=8))
    assert final(tmp_path / "a") != final(tmp_path / "b")


# --- resume --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> str:
    """The adapter of a run that nothing stopped, with an average of weights and validation."""
    return _straight(place, tmp_path_factory.mktemp("straight"))


def _straight(place: Path, out: Path) -> str:
    run(asked(place, out, **RESUMED))
    return final(out)


RESUMED = {"ema": 0.95, "validation": 1, "optimizer": "adamw"}


@pytest.mark.parametrize("updates", [1, 3])
def test_a_run_that_was_closed_goes_on_to_the_same_bytes(place, tmp_path, straight, updates):
    events = train(asked(place, tmp_path, checkpoint_every=16, **RESUMED))
    for event in events:
        if isinstance(event, Updated) and event.update == updates:
            break
    events.close()
    assert checkpoint.iterations(tmp_path) == [4 * updates]
    again = run(asked(place, tmp_path, resume=True, **RESUMED))
    assert of(again, Prepared)[0].begins_at == updates
    assert [event.update for event in of(again, Updated)] == list(range(updates + 1, 5))
    assert final(tmp_path) == straight


def test_a_run_of_flux2_that_was_closed_goes_on_to_the_same_bytes(place_of, tmp_path):
    place = place_of("klein-base")
    wanted = _straight(place, tmp_path / "straight")
    test_a_run_that_was_closed_goes_on_to_the_same_bytes(place, tmp_path / "closed", wanted, 1)


# Stands still in the middle of what comes behind an event: it can't be over before it is killed.
PROGRAM = """
import os, signal, sys, threading
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.local_executor import train
fields, word, left = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for event in train(TrainRequest(**fields)):
    left -= type(event).__name__ == word
    if not left:
        left = -1
        print(word, flush=True)
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGSTOP)).start()
"""


@pytest.mark.parametrize(("word", "count"), [("Updated", 2), ("CheckpointSaved", 2)])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(place, tmp_path, straight, word, count):
    fields = dataclasses.asdict(asked(place, tmp_path, **RESUMED))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, repr(fields), word, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            assert process.stdout.readline().strip() == word
            os.waitpid(process.pid, os.WUNTRACED)  # it stands still
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / FINAL).exists()
    run(asked(place, tmp_path, resume=True, **RESUMED))
    assert final(tmp_path) == straight


def test_resuming_a_run_that_is_done_trains_nothing(place, tmp_path):
    run(asked(place, tmp_path))
    before = final(tmp_path)
    assert of(run(asked(place, tmp_path, resume=True)), Updated) == []
    assert final(tmp_path) == before


def test_a_resume_of_another_run_is_refused(place, tmp_path):
    run(asked(place, tmp_path))
    with pytest.raises(UsageError, match="lora_rank was 4 and is 8"):
        run(asked(place, tmp_path, resume=True, lora_rank=8))
    with pytest.raises(OutputError, match="`resume`"):
        run(asked(place, tmp_path))


def test_ctrl_c_leaves_a_checkpoint_of_the_last_whole_update(
    place, tmp_path, straight, monkeypatch
):
    gradient = Learner.gradient

    def interrupted(self, part, *more):
        if part.micro.number == 10:  # in the third update
            raise KeyboardInterrupt
        return gradient(self, part, *more)

    monkeypatch.setattr(Learner, "gradient", interrupted)
    with pytest.raises(CancelledError, match="iteration 8"):
        run(asked(place, tmp_path, checkpoint_every=16, **RESUMED))
    assert checkpoint.iterations(tmp_path) == [8]
    monkeypatch.undo()
    run(asked(place, tmp_path, resume=True, **RESUMED))
    assert final(tmp_path) == straight


def test_ctrl_c_before_an_update_is_counted_loses_nothing(place, tmp_path, straight, monkeypatch):
    count, counted = Run._count, []

    def interrupted(self, moved):
        counted.append(moved)
        if len(counted) == 3:
            raise KeyboardInterrupt
        count(self, moved)

    monkeypatch.setattr(Run, "_count", interrupted)
    with pytest.raises(CancelledError, match="iteration 12"):
        run(asked(place, tmp_path, checkpoint_every=16, **RESUMED))
    assert counted[3] is counted[2]
    monkeypatch.undo()
    run(asked(place, tmp_path, resume=True, **RESUMED))
    assert final(tmp_path) == straight


def test_old_checkpoints_go_but_the_best_stays(place, tmp_path):
    events = run(asked(place, tmp_path, validation=1, keep_checkpoints=1, learning_rate=0.5))
    losses = {event.iteration: event.loss for event in of(events, Validated)}
    best = min(losses, key=losses.__getitem__)
    assert [event.iteration for event in of(events, Validated) if event.best][-1] == best
    assert checkpoint.iterations(tmp_path) == sorted({best, 16})


# --- when it goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(place, tmp_path, monkeypatch):
    gradient = Learner.gradient

    def broken(self, part, *more):
        if part.micro.number == 9:
            self.flow.img_in.bias = self.flow.img_in.bias * float("nan")
        return gradient(self, part, *more)

    monkeypatch.setattr(Learner, "gradient", broken)
    sentence = r"not finite \(NaN or infinity\) in update 3, by iteration 12.*0000008_adapters"
    with pytest.raises(DivergedError, match=sentence):
        run(asked(place, tmp_path))
    assert checkpoint.iterations(tmp_path) == [4, 8]
    saved = checkpoint.latest(tmp_path)
    assert all(np.isfinite(vector).all() for vector in saved.vectors.values())


def test_a_gradient_that_overflows_is_told_as_the_loss_is(place, tmp_path, monkeypatch):
    advance = Learner.advance

    def overflowing(self, total) -> UpdateResult:
        moved = advance(self, total)
        return dataclasses.replace(moved, norm=math.inf) if self.state.update == 2 else moved

    monkeypatch.setattr(Learner, "advance", overflowing)
    with pytest.raises(DivergedError, match=r"in update 2, .*0000004_adapters"):
        run(asked(place, tmp_path))
    assert checkpoint.iterations(tmp_path) == [4]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e30])  # the last is what a mesh sends
def test_what_was_held_out_may_show_it_first(place, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(Learner, "validate", lambda self: 1.0 if self.state.update < 2 else loss)
    with pytest.raises(DivergedError, match=r"held out was not finite .* after update 2, "):
        run(asked(place, tmp_path, validation=1))
    assert checkpoint.iterations(tmp_path) == [4]


def test_a_picture_on_the_way_that_is_not_finite_is_no_file(place, tmp_path, monkeypatch):
    advance = Learner.advance

    def broken(self, total) -> UpdateResult:
        moved = advance(self, total)
        if self.state.update == 2:
            weights = self.state.weights * float("nan")
            self.state = dataclasses.replace(self.state, weights=weights)
        return moved

    monkeypatch.setattr(Learner, "advance", broken)
    with pytest.raises(NotFiniteError, match="NaN or infinity came out of"):
        run(asked(place, tmp_path, progress_prompt="a dog", progress_every=8))
    assert [path.name for path in tmp_path.glob("*.png")] == []


def test_a_picture_of_the_data_set_that_overflows_the_autoencoder_is_told(tmp_path):
    model = overflowing_model(tmp_path / "model", "encoder")
    make_dataset(tmp_path / "data")
    request = TrainRequest(
        dataset=str(tmp_path / "data"),
        model=str(model),
        dtype="float32",
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        seed=1,
    )
    with pytest.raises(NotFiniteError, match="the autoencoder, which read the picture"):
        run(request)
    kept = [read_header(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert kept and not any("latents" in header.entries for header in kept)


def test_a_loss_that_explodes_stops_the_run(place, tmp_path, monkeypatch):
    advance = Learner.advance

    def exploding(self, total) -> UpdateResult:
        moved = advance(self, total)
        factor = 1000 if self.state.update > 12 else 1
        return dataclasses.replace(moved, loss=factor * moved.loss)

    monkeypatch.setattr(Learner, "advance", exploding)
    with pytest.raises(DivergedError, match="rose from"):
        run(asked(place, tmp_path, iterations=40, grad_accumulate=2))


# --- the device ----------------------------------------------------------------------------------

METAL = "[METAL] Command buffer execution failed: "


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        (
            f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            DoesNotFitError,
            "Memory ran out while training .*; try `grad_checkpoint`, `quantize`",
        ),
        (
            f"{METAL}Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            FluxmeshError,
            "macOS ended the GPU's work while training, because the display had to wait",
        ),
        ("shapes (2) and (3) can't be added", RuntimeError, "shapes"),  # a mistake of ours
    ],
)
def test_what_the_device_fails_of_is_told_with_what_helps(
    place, tmp_path, monkeypatch, said, kind, sentence
):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(Learner, "total", fail)
    with pytest.raises(kind, match=sentence) as caught:
        run(asked(place, tmp_path))
    assert type(caught.value) is kind


def test_captions_that_are_cut_are_told_with_their_pictures_before_anything_is_encoded(
    place, tmp_path
):
    data = make_dataset(tmp_path / "data", sizes=((40, 40), (48, 24)))
    long = "one two three four five six seven eight nine ten eleven twelve"
    rows = [{"image": "0.png", "prompt": long}, {"image": "1.png", "prompt": "a dog"}]
    write_lines(data, rows)
    request = asked(place, tmp_path / "out", dataset=str(data), progress_prompt=long, iterations=8)
    events = run(dataclasses.replace(request, progress_steps=1))
    captions, prompt = of(events, Note)
    assert events[0] is captions
    assert captions.text.startswith("The model reads 16 tokens of a caption, and not the end of 1 ")
    assert "longer one: train.jsonl line 1 (from “" in captions.text
    assert prompt.text.startswith("The model reads 16 of the ")
    assert "tokens of the progress prompt; left out is all from “" in prompt.text
    assert not of(run(asked(place, tmp_path / "short", iterations=8)), Note)


def test_settings_that_do_nothing_are_told(tmp_path):
    make_dataset(tmp_path / "data")
    examples = load_dataset(str(tmp_path / "data"))

    def notes(**changed) -> list[str]:
        request = TrainRequest(str(tmp_path / "data"), 1, iterations=40, **changed)
        base = resolve("tiny")
        return [note.text for note in notes_of(prepare(request, examples, base), base)]

    assert notes() == notes(warmup_steps=9) == []
    assert notes(guidance=2.5) == ["`guidance` is 2.5, and tiny takes none."]
    assert notes(warmup_steps=100) == [
        "`warmup_steps` is 100 of 10 updates; the rate rises for 5 of them."
    ]
