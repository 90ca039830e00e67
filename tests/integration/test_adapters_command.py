"""`fluxmesh adapters convert|fuse`, and what `generate` makes of their files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.errors import UsageError
from fluxmesh.storage.safetensors import read_header
from fluxmesh.weights import hub, loading
from fluxmesh.weights.quantize import quantize_checkpoint
from tests import flux1_adapters as lora
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import Run
from tests.numerics.loading import assert_same, load_clip, load_t5, parameters
from tests.numerics.test_lora import assert_same_change, random_adapter

PAINT = ("generate", "a dog", "--seed", 3, "--steps", 2, "--dtype", "float32")
MODULES = ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.2", "single_blocks.1.linear1"]


def some_adapter(config, scale: float = 1.0) -> dict[str, LowRank]:
    """A small change of linears of each kind, for any model's sizes."""
    rng = np.random.default_rng(5)
    shapes = {name: lora_shape for name, lora_shape in _shapes(config).items() if name in MODULES}
    return {
        name: LowRank(
            rng.standard_normal((3, into), dtype=np.float32) / 4,
            rng.standard_normal((out, 3), dtype=np.float32) / 4,
            scale,
        )
        for name, (out, into) in shapes.items()
    }


def _shapes(config) -> dict[str, tuple[int, ...]]:
    from fluxmesh.models.flux1.tensor_maps import transformer_tensors

    return {
        name.removesuffix(".weight"): target.shape
        for name, target in transformer_tensors(config).items()
        if name.endswith(".weight")
    }


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    """A file in diffusers' keys, with settings of PEFT's that scale it by 12/3."""
    config = hub.resolve(str(checkpoint)).architecture.transformer
    metadata = {
        "lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 12}),
        "lora_blocks": "2",
        "about": "a dog",
    }
    lora.write_adapter(tmp_path / "dog.safetensors", some_adapter(config), config, "diffusers",
                       metadata)  # fmt: skip
    return tmp_path / "dog.safetensors"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "bfl", "mlx"])
def test_generate_paints_the_same_with_a_converted_adapter_there_and_back(
    fluxmesh: Run, checkpoint: Path, adapter: Path, tmp_path: Path, file_format: str
) -> None:
    model = ("--model", checkpoint)
    there = fluxmesh("adapters", "convert", adapter, "there.safetensors", "--to", file_format,
                     *model)  # fmt: skip
    assert there.code == 0, there.err
    assert "3 linears" in there.out
    back = fluxmesh("adapters", "convert", "there.safetensors", "back.safetensors", *model,
                    "--to", "diffusers", "--json")  # fmt: skip
    assert back.of("converted")[0]["format"] == "diffusers", back.err
    config = hub.resolve(str(checkpoint)).architecture.transformer
    original = lora.read_adapter(adapter, config)
    assert original[MODULES[1]].scale == 4
    for name in ("there", "back"):
        assert_same_change(lora.read_adapter(tmp_path / f"{name}.safetensors", config), original)
    for name in ("dog", "there"):
        done = fluxmesh(*PAINT, *model, "--adapter", f"{name}.safetensors:0.5",
                        "--output", f"{name}.png")  # fmt: skip
        assert done.code == 0, done.err
    assert np.abs(pixels(tmp_path / "dog.png") - pixels(tmp_path / "there.png")).max() <= 1


def test_converting_tells_the_mlx_examples_what_they_ask_for_and_keeps_the_rest(
    fluxmesh: Run, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    done = fluxmesh("adapters", "convert", adapter, "m.safetensors", "--to", "mlx",
                    "--model", checkpoint)  # fmt: skip
    assert done.code == 0, done.err
    header = read_header(tmp_path / "m.safetensors")
    assert set(header.entries) >= {"double_blocks.0.img_mlp.layers.2.lora_a"}
    rank = max(entry.shape[1] for key, entry in header.entries.items() if key.endswith("lora_a"))
    assert header.metadata["lora_rank"] == str(rank)
    assert header.metadata["lora_blocks"] == "2"
    assert header.metadata["about"] == "a dog"
    assert "lora_adapter_metadata" not in header.metadata  # its scale is in the weights now


def test_an_adapter_of_the_embedded_model_is_known_without_naming_it(
    fluxmesh: Run, tmp_path: Path
) -> None:
    config = hub.resolve("tiny").architecture.transformer
    lora.write_adapter(tmp_path / "a.safetensors", some_adapter(config), config)
    done = fluxmesh("adapters", "convert", "a.safetensors", "b.safetensors", "--to", "kohya")
    assert done.code == 0, done.err
    there = lora.read_adapter(tmp_path / "b.safetensors", config)
    assert_same_change(there, some_adapter(config))


def test_converting_never_overwrites_and_names_what_matches_nothing(
    fluxmesh: Run, adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    over = fluxmesh("adapters", "convert", adapter, "there.safetensors", "--to", "kohya",
                    "--model", checkpoint)  # fmt: skip
    assert over.code == 1 and "exists already" in over.err
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"
    other = fluxmesh("adapters", "convert", adapter, "new.safetensors", "--to", "kohya")
    assert other.code == 1 and "another model" in other.err and "--model" in other.err
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_generate_paints_the_same_from_a_fused_folder(
    fluxmesh: Run, tmp_path: Path, layout: str
) -> None:
    made = make_checkpoint(tmp_path / "model", seed=2, layout=layout, guidance=True)
    config = hub.resolve(str(made.path)).architecture.transformer
    for name, scale in (("one", 1.0), ("two", 0.5)):
        lora.write_adapter(tmp_path / f"{name}.safetensors", some_adapter(config, scale), config)
    loras = ("one.safetensors:0.8", "two.safetensors")
    fused = fluxmesh("adapters", "fuse", made.path, *loras, "fused")
    assert fused.code == 0, fused.err
    size = ("--image-size", "32x32")
    runs = {
        "beside": ("--model", made.path, "--adapter", loras[0], "--adapter", loras[1]),
        "fused": ("--model", "fused"),
        "plain": ("--model", made.path),
    }
    for name, options in runs.items():
        done = fluxmesh(*PAINT, *size, *options, "--output", f"{name}.png")
        assert done.code == 0, done.err
    beside, fused_picture, plain = (pixels(tmp_path / f"{name}.png") for name in runs)
    assert np.abs(beside - fused_picture).max() <= 1
    assert np.abs(beside - plain).max() > 5
    description = json.loads((tmp_path / "fused" / "fluxmesh.json").read_text())
    assert [entry["scale"] for entry in description["fused"]] == [0.8, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_folder_holds_what_fusing_on_the_way_gives_in_the_dtype_of_the_source(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxmesh.adapters import fuse

    made = make_checkpoint(tmp_path / "model", guidance=True, dtype=dtype)
    source = hub.resolve(str(made.path))
    path = tmp_path / "a.safetensors"
    lora.write_adapter(path, random_adapter(3), source.architecture.transformer)
    monkeypatch.setattr(fuse, "SHARD_BYTES", 100_000)
    heard: list[tuple[int, int]] = []
    fuse_checkpoint(source, tmp_path / "fused", [(path, 0.7)], lambda *seen: heard.append(seen))
    checkpoint = hub.resolve(str(tmp_path / "fused"))
    loading.verify(checkpoint)
    assert heard == sorted(heard) and heard[-1][0] > 0.99 * heard[-1][1]  # headers are no weights
    files = checkpoint.components["transformer"].files
    assert len(files) > 2
    kinds = {entry.dtype for file in files for entry in read_header(file).entries.values()}
    assert kinds == {"F32" if dtype == "float32" else "BF16"}
    expected = loading.load_transformer(source, getattr(mx, dtype))
    lora.apply_adapters(expected, [(path, 0.7)], fuse=True)
    ours = parameters(loading.load_transformer(checkpoint, getattr(mx, dtype)))
    theirs = parameters(expected)
    assert ours.keys() == theirs.keys()
    step = 1e-6 if dtype == "float32" else 2**-7  # sums that differ in float32's last place
    for name, values in theirs.items():
        actual, wanted = (np.array(x.astype(mx.float32)) for x in (ours[name], values))
        assert np.abs(actual - wanted).max() <= step * np.abs(wanted).max(), name
    for load in (load_t5, load_clip, loading.load_autoencoder):
        assert_same(parameters(load(checkpoint)), parameters(load(source)))


def test_fusing_never_overwrites_and_an_interrupted_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fluxmesh: Run
) -> None:
    made = make_checkpoint(tmp_path / "model", guidance=True)
    source = hub.resolve(str(made.path))
    path = tmp_path / "a.safetensors"
    lora.write_adapter(path, random_adapter(3), source.architecture.transformer)
    (tmp_path / "there").mkdir()
    done = fluxmesh("adapters", "fuse", "model", "a.safetensors", "there")
    assert done.code == 1 and "exists already" in done.err
    assert list((tmp_path / "there").iterdir()) == []

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", failing)  # all is there but its name
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(source, tmp_path / "fused", [(path, 1.0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "model", "there"]


def test_a_quantized_model_is_not_fused_into(tmp_path: Path) -> None:
    source = hub.resolve(str(make_checkpoint(tmp_path / "model", guidance=True).path))
    quantize_checkpoint(source, tmp_path / "q", 4)
    path = tmp_path / "a.safetensors"
    lora.write_adapter(path, random_adapter(3), source.architecture.transformer)
    with pytest.raises(UsageError, match="quantized"):
        fuse_checkpoint(hub.resolve(str(tmp_path / "q")), tmp_path / "f", [(path, 1.0)])
    assert not (tmp_path / "f").exists()


def test_an_adapter_that_is_missing_is_told_before_anything_is_written(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    done = fluxmesh("adapters", "fuse", checkpoint, "no.safetensors", "fused")
    assert done.code == 2 and "No adapter file no.safetensors" in done.err
    assert not any(tmp_path.iterdir())
