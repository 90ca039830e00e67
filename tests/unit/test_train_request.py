"""A training request: what it refuses, how long it is, and its learning rates."""

from __future__ import annotations

import pytest

from fluxmesh.errors import UsageError
from fluxmesh.training.compute.lr_schedule import learning_rate, warmup_updates
from fluxmesh.training.defaults import fill
from fluxmesh.training.request import TrainRequest

FLUX1 = 3072  # channels


def request(**fields):
    return TrainRequest("data", 1, **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("dtype", "float16"),
        ("bits", 3),
        ("resolution", (512, 500)),
        ("num_augmentations", 0),
        ("iterations", 0),
        ("batch_size", 0),
        ("grad_accumulate", 0),
        ("lora_rank", 0),
        ("lora_blocks", 0),
        ("lora_alpha", 0.0),
        ("lora_dropout", 1.0),
        ("caption_dropout", -0.1),
        ("ema", 1.0),
        ("learning_rate", float("nan")),
        ("clip_norm", float("inf")),
        ("timesteps", "sigmoid"),
        ("optimizer", "sgd"),
        ("lr_schedule", "step"),
        ("progress_steps", 0),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(UsageError, match=f"`{field}` "):
        TrainRequest(**{"dataset": "data", "seed": 1, field: value})


def test_the_seed_document_s_defaults_stand():
    asked = request()
    assert (asked.iterations, asked.batch_size, asked.grad_accumulate) == (600, 1, 4)
    assert (asked.lora_rank, asked.lora_blocks) == (8, -1)
    assert (asked.guidance, asked.num_augmentations) == (4.0, 5)
    assert asked.output_dir == "mlx_output" and asked.scale == 1.0
    assert fill(asked, FLUX1).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("width", "rate"), [(3072, 1e-4), (192, 1.6e-3), (4096, 7.5e-5), (6144, 5e-5)]
)
def test_the_rate_goes_as_one_over_the_model_s_width_unless_it_is_given(width, rate):
    assert fill(request(), width).learning_rate == rate
    assert fill(request(learning_rate=3e-4), width).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("iterations", "warmup"), [(1, 1), (4, 1), (40, 1), (600, 15), (1200, 30), (20_000, 100)]
)
def test_the_warm_up_is_a_tenth_of_the_updates_unless_it_is_given(iterations, warmup):
    assert fill(request(iterations=iterations), FLUX1).warmup_steps == warmup
    asked = request(iterations=iterations, warmup_steps=100)
    assert fill(asked, FLUX1).warmup_steps == 100
    assert fill(request(iterations=iterations, warmup_steps=0), FLUX1).warmup_steps == 0


def test_the_last_update_takes_what_is_left():
    asked = request(iterations=10, grad_accumulate=4)
    assert asked.updates == 3
    parts = [list(asked.micro_batches(update)) for update in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_does_not_reach_the_adapter_may_change_on_resume():
    asked = request().identity()
    assert request(output_dir="x", resume=True, checkpoint_every=7).identity() == asked
    for field, value in {"seed": 2, "lora_rank": 4, "dtype": "float32", "ema": 0.9}.items():
        changed = TrainRequest(**{"dataset": "data", "seed": 1, field: value}).identity()
        assert [name for name in asked if asked[name] != changed[name]] == [field]


@pytest.mark.parametrize("updates", [1, 2, 3, 20, 100, 101, 150, 600])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_is_full_and_falls_to_nothing_whatever_the_length(updates, schedule):
    asked = request(
        iterations=updates,
        grad_accumulate=1,
        lr_schedule=schedule,
        learning_rate=1e-4,
        warmup_steps=100,
    )
    rates = [learning_rate(asked, update) for update in range(updates)]
    warmup = warmup_updates(asked)
    assert warmup == (100 if updates > 100 else updates // 2)
    assert rates[warmup] == max(rates) == asked.learning_rate
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates) > 0
    after_the_last = learning_rate(asked, updates)
    assert after_the_last == pytest.approx(0, abs=1e-12)


def test_a_constant_rate_stays():
    asked = request(
        iterations=8, grad_accumulate=1, warmup_steps=2, lr_schedule="constant", learning_rate=0.1
    )
    rates = [learning_rate(asked, update) for update in range(8)]
    assert rates[2:] == [asked.learning_rate] * 6 and rates[0] < rates[1] < rates[2]
