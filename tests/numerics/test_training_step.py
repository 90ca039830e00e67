"""A training's gradients, what it trains, what it saves and what it reads."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.storage.safetensors import read_header
from fluxmesh.training import checkpoint, local_executor
from fluxmesh.training.compute import loss as step
from fluxmesh.training.compute.lora_layers import Dropout
from fluxmesh.training.compute.loss import loss_and_gradient
from fluxmesh.training.data.encode_units import Caption
from fluxmesh.training.events import (
    CheckpointSaved,
    Encoding,
    Prepared,
    Progress,
    Updated,
    Validated,
)
from fluxmesh.training.local_executor import train
from tests import flux1_adapters as lora
from tests.datasets import make_dataset, picture
from tests.trainings import FINAL, asked, final, learner, make_place, of, run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module", params=["dev", "klein-base"])
def either(request, tmp_path_factory) -> Path:
    """As `place`, of FLUX.1 and of FLUX.2."""
    return make_place(tmp_path_factory.mktemp(request.param), request.param)


# --- loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_neither_loss_nor_gradient(either, tmp_path, dtype, bits):
    made = learner(asked(either, tmp_path, dtype=dtype, bits=bits, lora_dropout=0.3))
    (part,) = made.plan.parts(3)
    keys = part.micro.dropout_keys(len(made.adapters.names))
    drawn = mx.random.normal((made.adapters.size,), key=mx.random.key(3))
    weights = made.adapters.unflatten(0.2 * drawn)
    made.adapters.install(weights)

    def step(keys, kept):
        loss, gradient = loss_and_gradient(
            made.runtime, made.adapters, made.batch(part), 4.0, keys, kept
        )
        return loss.item(), np.array(gradient)

    (plain, expected), (again, actual) = step(keys, False), step(keys, True)
    assert again == pytest.approx(plain, rel=1e-5)
    assert np.linalg.norm(expected - actual) <= 1e-5 * np.linalg.norm(expected)
    without, _ = step(None, True)
    assert without != pytest.approx(plain, rel=1e-4)  # dropout did something
    for name, layer in made.adapters.layers.items():  # what was lent is back, without a graph
        assert layer.lora_a is weights[name]["a"] and layer.dropout.key is None


@pytest.mark.parametrize("kept", [False, True])
def test_a_gradient_that_is_traced_once_is_the_one_that_is_not(place, tmp_path, monkeypatch, kept):
    """As on a GPU: weights, batch and dropout's keys reach it, and none of the first ones stay."""
    monkeypatch.setattr(step, "ops", SimpleNamespace(compiled=mx.compile))
    made = learner(asked(place, tmp_path, grad_checkpoint=kept, lora_dropout=0.3))
    for number in (3, 4):
        drawn = mx.random.normal((made.adapters.size,), key=mx.random.key(number))
        made.adapters.install(made.adapters.unflatten(0.2 * drawn))
        (part,) = made.plan.parts(number)
        batch, keys = made.batch(part), part.micro.dropout_keys(len(made.adapters.names))
        traced = made.step(batch, keys)
        wanted = loss_and_gradient(made.runtime, made.adapters, batch, made.request.guidance, keys)
        for actual, expected in zip(traced, wanted, strict=True):
            assert (
                mx.linalg.norm(actual - expected).item() <= 1e-5 * mx.linalg.norm(expected).item()
            )


def test_lora_stays_float32_and_lifts_no_activation(either, tmp_path):
    made = learner(asked(either, tmp_path, dtype="bfloat16"))
    seen = set()

    def watch(block, *arrays):
        out = block(*arrays)
        seen.update(x.dtype for x in (out if isinstance(out, tuple) else (out,)))
        return out

    made.flow.call = watch
    (part,) = made.plan.parts(0)
    _, gradient = loss_and_gradient(made.runtime, made.adapters, made.batch(part), 4.0)
    assert seen == {mx.bfloat16}
    assert gradient.dtype == made.state.weights.dtype == mx.float32


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    dropout = Dropout(0.25)
    x = mx.full((200, 200), 3.0)
    assert (dropout(x) == x).all()
    dropout.key = mx.array([1, 2], dtype=mx.uint32)
    out = np.array(dropout(x))
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.02)
    assert out.mean() == pytest.approx(3.0, rel=0.02)
    assert dropout(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("field", ["lora_dropout", "caption_dropout"])
def test_what_is_dropped_reaches_the_training(place, tmp_path, field):
    """Everything else is equal, so without it the losses would be too."""
    losses = []
    for share in (0.0, 0.6):
        request = asked(place, tmp_path / str(share), lora_dropout=0.0, caption_dropout=0.0)
        request = dataclasses.replace(request, **{field: share}, iterations=8)
        losses.append([event.loss for event in of(run(request), Updated)])
    assert losses[0] != losses[1]


def test_before_the_first_update_the_adapter_changes_nothing(place, tmp_path):
    made = learner(asked(place, tmp_path))
    assert all(not layer.lora_b.any().item() for layer in made.adapters.layers.values())
    assert all(layer.lora_a.any().item() for layer in made.adapters.layers.values())


def test_only_the_adapter_moves(either, tmp_path):
    made = learner(asked(either, tmp_path, bits=4))
    assert isinstance(made.flow.double_blocks[0].img_attn.qkv.linear, nn.QuantizedLinear)

    def base():
        return {
            name: np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
            for name, value in tree_flatten(made.flow.parameters())
            if "lora_" not in name
        }

    before = base()
    made.advance(made.total(range(4), 4))
    after = base()
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_loss_on_what_is_trained_falls(place, tmp_path, bits):
    """One picture, always the same crop: the model learns it by heart."""
    data = make_dataset(tmp_path / "data", sizes=((32, 32),))
    request = asked(
        place,
        tmp_path / "out",
        dataset=str(data),
        bits=bits,
        iterations=120,
        grad_accumulate=2,
        num_augmentations=1,
        lora_dropout=0.0,
        caption_dropout=0.0,
        learning_rate=1e-2,
        lora_rank=8,
    )
    losses = [event.loss for event in of(run(request), Updated)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_short_last_batch_counts_by_its_images(place, tmp_path):
    """Three images of one size in batches of two: the sum is that of single images."""
    data = make_dataset(tmp_path / "data", sizes=((32, 32),) * 3)
    request = asked(place, tmp_path, dataset=str(data), resolution=(32, 32), num_augmentations=1)
    made = learner(request)
    epoch = [made.plan.sampler.micro_batch(n) for n in range(made.plan.sampler.epoch_length)]
    assert sorted(len(micro.items) for micro in epoch) == [1, 2]
    moved = made.advance(made.total(range(2), 2))
    assert moved.images == 3


@pytest.mark.parametrize(
    ("blocks", "targets", "expected"),
    [
        (1, ("*",), {"single_blocks.1"}),
        (3, ("*",), {"double_blocks.1", "single_blocks.0", "single_blocks.1"}),
        (99, ("*attn.qkv",), {"double_blocks.0", "double_blocks.1"}),
    ],
)
def test_blocks_count_from_the_last_and_targets_are_patterns(
    place, tmp_path, blocks, targets, expected
):
    made = learner(asked(place, tmp_path, lora_blocks=blocks, lora_targets=targets))
    assert {".".join(name.split(".")[:2]) for name in made.adapters.names} == expected
    if targets == ("*attn.qkv",):
        assert len(made.adapters.names) == 4


def test_targets_that_match_nothing_are_refused(place, tmp_path):
    with pytest.raises(UsageError, match="to_q"):
        learner(asked(place, tmp_path, lora_targets=("*.to_q",)))


# --- what is saved -------------------------------------------------------------------------------


def test_the_adapter_loads_as_any_other_and_paints_what_training_saw(either, tmp_path):
    request = asked(either, tmp_path, lora_alpha=6.0, lora_dropout=0.0, ema=0.9)
    events = list(train(dataclasses.replace(request, progress_prompt="a cat", progress_every=16)))
    header = read_header(tmp_path / FINAL)
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in header.entries
    assert header.metadata["lora_rank"] == "4" and header.metadata["lora_blocks"] == "-1"
    flux = FluxPipeline(
        request.model, dtype="float32", adapters=[str(tmp_path)], fuse_adapters=True
    )
    painted = flux.generate_images("a cat", seed=request.seed, latent_size=(4, 4))
    pixels = np.round(np.array(painted[0]) * 255)
    shown = of(events, Progress)[-1].pixels
    assert np.abs(pixels - shown).max() <= 1
    assert (of(events, Progress)[0].pixels != shown).any()


def test_every_checkpoint_has_an_adapter_beside_it(place, tmp_path):
    events = run(asked(place, tmp_path))
    assert [event.iteration for event in of(events, CheckpointSaved)] == [4, 8, 12, 16]
    last = checkpoint.adapters_path(tmp_path, 16)
    assert last.read_bytes() == (tmp_path / FINAL).read_bytes()
    config = FluxPipeline(str(place / "model")).checkpoint.architecture.transformer
    for event in of(events, CheckpointSaved)[1:]:
        assert lora.read_adapter(event.path, config)


def test_the_average_of_weights_is_what_is_saved(place, tmp_path):
    run(asked(place, tmp_path / "last"))
    run(asked(place, tmp_path / "average", ema=0.99))
    states = [checkpoint.latest(tmp_path / name).vectors for name in ("last", "average")]
    np.testing.assert_array_equal(states[0]["weights"], states[1]["weights"])
    assert final(tmp_path / "last") != final(tmp_path / "average")


# --- data ----------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(place, tmp_path):
    request = asked(place, tmp_path / "a", cache_dir=str(tmp_path / "cache"), iterations=4)
    first = of(run(request), Encoding)
    assert [(event.what, event.done, event.total) for event in first] == [
        *(("captions", i, 4) for i in range(1, 5)),  # three and the empty one
        *(("pictures", i, 6) for i in range(1, 7)),  # three, two crops each
    ]
    again = dataclasses.replace(request, output_dir=str(tmp_path / "b"))
    assert of(run(again), Encoding) == []
    assert final(tmp_path / "a") == final(tmp_path / "b")
    other = dataclasses.replace(request, output_dir=str(tmp_path / "c"), dtype="bfloat16")
    assert len(of(run(other), Encoding)) == len(first)  # not what float32 has left there


def test_a_new_picture_leaves_the_others_in_the_cache(place, tmp_path):
    data = make_dataset(tmp_path / "data")
    request = asked(place, tmp_path / "a", dataset=str(data), cache_dir=str(tmp_path / "cache"))
    request = dataclasses.replace(request, iterations=4)
    run(request)
    picture(9, (32, 32)).save(data / "new.png")
    with open(data / "train.jsonl", "a") as file:
        file.write('{"image": "new.png", "prompt": "a red dog"}\n')
    more = of(run(dataclasses.replace(request, output_dir=str(tmp_path / "b"))), Encoding)
    assert [(event.what, event.total) for event in more] == [("pictures", 2)] * 2


def test_nothing_is_kept_of_files_that_were_changed_since_the_run_began(place, tmp_path):
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    encoder = learner(asked(place, tmp_path / "out", model=str(model))).features
    (file,) = (model / "text_encoder").glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    caption = Caption("the encoders that read this may be others by now")
    with pytest.raises(WeightsError, match="were changed while they were in use"):
        encoder.store(caption)
    assert encoder.pending([caption]) == [caption]


def test_validation_images_are_not_trained_on(place, tmp_path):
    events = run(asked(place, tmp_path, validation=1))
    prepared = of(events, Prepared)[0]
    assert (prepared.images, prepared.held_out) == (2, 1)
    assert len(of(events, Validated)) == 4
    with pytest.raises(UsageError, match="leaves none"):
        run(asked(place, tmp_path / "b", validation=3))


def test_mistakes_are_told_before_anything_loads(place, tmp_path, monkeypatch):
    def never(*_args, **_more):
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(local_executor, "PipelineStages", never)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"image": "no.png", "prompt": ""}\n')
    with pytest.raises(UsageError, match="2 problems"):
        run(asked(place, tmp_path / "out", dataset=str(tmp_path / "data")))
    assert not (tmp_path / "out").exists()
