"""A training's checkpoints on the disk: whole or not there, pruned, refused when they don't fit."""

from __future__ import annotations

import numpy as np
import pytest

from fluxmesh.errors import OutputError, UsageError, WeightsError
from fluxmesh.storage import durable
from fluxmesh.training import checkpoint
from fluxmesh.training.checkpoint import RunCounters, Saved
from fluxmesh.training.data.feature_cache import FeatureCache, key

VECTORS = {"weights": np.arange(5, dtype=np.float32), "first": np.ones(5, np.float32)}


def saved(iteration: int = 8, **changed) -> Saved:
    fields = {"request": {"seed": 1, "targets": ["*"]}, "data": "d", "model": "m"} | changed
    return Saved(RunCounters(iteration // 4, iteration, 0.5, 0.25), vectors=VECTORS, **fields)


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, saved(4))
    checkpoint.save(tmp_path, saved(8))
    kept = checkpoint.latest(tmp_path)
    assert kept.counters == RunCounters(2, 8, 0.5, 0.25)
    assert (kept.request, kept.data, kept.model) == (
        {"seed": 1, "targets": ["*"]},
        "d",
        "m",
    )
    for name, vector in VECTORS.items():
        np.testing.assert_array_equal(kept.vectors[name], vector)
    assert checkpoint.iterations(tmp_path) == [4, 8]


def test_a_checkpoint_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, saved(4))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OutputError, match="disk is full"):
        checkpoint.save(tmp_path, saved(8))
    assert [path.name for path in tmp_path.iterdir()] == ["0000004_state.safetensors"]


def test_a_checkpoint_that_is_written_again_takes_the_place_of_the_old_one(tmp_path):
    checkpoint.save(tmp_path, saved(4))
    checkpoint.save(tmp_path, saved(4))
    assert checkpoint.iterations(tmp_path) == [4]


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    for iteration in range(10, 70, 10):
        checkpoint.save(tmp_path, saved(iteration))
        checkpoint.adapters_path(tmp_path, iteration).write_bytes(b"")
    (tmp_path / "final_adapters.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, 2, best=20)
    assert checkpoint.iterations(tmp_path) == [20, 50, 60]
    assert len(list(tmp_path.iterdir())) == 2 * 3 + 2


def test_what_a_run_that_was_killed_had_begun_to_write_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / ".0000070_state.safetensors.ab12cd34.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path, saved(60))
    assert [path.name for path in tmp_path.iterdir()] == ["0000060_state.safetensors"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"request": {"seed": 2, "targets": ["*"]}}, "seed was 1 and is 2"),
        ({"data": "other"}, "pictures or captions have changed"),
        ({"model": "other"}, "the model was m and is other"),
    ],
)
def test_a_resume_with_other_settings_is_refused_by_what_differs(changed, said):
    now = saved(**changed)
    with pytest.raises(UsageError, match=said):
        checkpoint.check_same(saved(), now.request, now.data, now.model)


def test_a_folder_that_holds_a_training_is_not_written_over(tmp_path):
    checkpoint.check_new(tmp_path / "new")
    checkpoint.save(tmp_path, saved())
    with pytest.raises(OutputError, match="`resume`"):
        checkpoint.check_new(tmp_path)


def test_a_damaged_checkpoint_is_told_by_its_name(tmp_path):
    path = checkpoint.save(tmp_path, saved())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="0000008_state"):
        checkpoint.latest(tmp_path)


def test_the_cache_gives_back_what_it_was_given_and_nothing_that_is_damaged(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    name = key(kind="image", content="ab", box=(0.0, 1.0))
    assert cache.get(name) is None and not cache.has(name)
    bits = np.array([[1, 2]], np.uint16)
    cache.put(name, {"t5": (bits, "BF16"), "clip": (VECTORS["weights"], "F32")})
    features = cache.get(name)
    assert features["t5"][1] == "BF16"
    np.testing.assert_array_equal(features["t5"][0], bits)
    np.testing.assert_array_equal(features["clip"][0], VECTORS["weights"])
    path = cache.path(name)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get(name) is None and not cache.has(name)
    cache.put(name, {"t5": (bits, "BF16")})
    assert cache.has(name)
    assert len(list(path.parent.iterdir())) == 1


def test_a_key_depends_on_every_value():
    assert key(a=1, b="x") == key(b="x", a=1)
    assert len({key(a=1, b="x"), key(a=2, b="x"), key(a=1, b="y"), key(a=1)}) == 4
