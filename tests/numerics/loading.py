"""What the tests of loading have in common."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import WeightsError
from fluxmesh.weights import hub, loading
from tests import checkpoints


def load_clip(checkpoint, *more, **keys):
    return loading.load_text_encoder(checkpoint, "clip", *more, **keys)


def load_t5(checkpoint, *more, **keys):
    return loading.load_text_encoder(checkpoint, "t5", *more, **keys)


LOADERS = {
    "transformer": loading.load_transformer,
    "text_encoder": load_clip,
    "text_encoder_2": load_t5,
    "vae": loading.load_autoencoder,
}
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_same(actual: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype, name
        assert mx.array_equal(actual[name], expected[name]), name


def resolved(made):
    checkpoint = hub.resolve(str(made.path))
    loading.verify(checkpoint)
    return checkpoint


def assert_refused(made, *words: str) -> None:
    """One sentence, before any array of MLX is made."""
    mx.synchronize()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    with pytest.raises(WeightsError) as caught:
        loading.verify(hub.resolve(str(made.path)))
    assert mx.get_peak_memory() <= active
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def rewrite(path: Path, change) -> None:
    """Reads a float32 safetensors file, lets `change` edit its arrays, and writes it again."""
    from fluxmesh.storage.safetensors import read_header, read_tensor

    arrays = {key: read_tensor(entry) for key, entry in read_header(path).entries.items()}
    change(arrays)
    checkpoints.write_safetensors(path, arrays)
