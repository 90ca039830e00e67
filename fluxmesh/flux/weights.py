"""Loads the four models: tensor by tensor, in the dtype and bits that are asked for.

Peak memory is the model plus its largest tensor: each tensor is read on its own, converted,
quantized if asked, evaluated, and only then the next. `components.py` finds and checks what the
files hold; `quantize.py` writes a quantized folder with what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.flux.autoencoder import AutoEncoder
from fluxmesh.flux.checkpoint import Checkpoint
from fluxmesh.flux.clip import ClipTextModel
from fluxmesh.flux.components import Reader, group_size, tables, verify
from fluxmesh.flux.model import Flux
from fluxmesh.flux.t5 import T5Encoder
from fluxmesh.flux.tokenizers import ClipTokenizer, T5Tokenizer

__all__ = [
    "load_autoencoder",
    "load_clip",
    "load_t5",
    "load_tokenizers",
    "load_transformer",
    "read_rows",
    "verify",
]

OnBytes = Callable[[int, int], None]  # bytes of the component read, and in all


def load_transformer(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Flux:
    """The transformer, evaluated. `bits` (3|4|5|6|8) quantizes the matrices of its blocks.

    Raises `WeightsError` naming file and tensor; `UsageError` for other bits than those that the
    checkpoint is stored in.
    """
    model = Flux(checkpoint.transformer)
    return _load(model, Reader(checkpoint, "transformer"), dtype, bits, on_bytes)


def load_t5(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
) -> T5Encoder:
    """The T5 encoder, evaluated. Arguments and errors as in `load_transformer`."""
    model = T5Encoder(checkpoint.t5)
    return _load(model, Reader(checkpoint, "text_encoder_2"), dtype, bits, on_bytes)


def load_clip(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
) -> ClipTextModel:
    """The CLIP text encoder, evaluated. Arguments and errors as in `load_transformer`."""
    model = ClipTextModel(checkpoint.clip)
    return _load(model, Reader(checkpoint, "text_encoder"), dtype, bits, on_bytes)


def load_autoencoder(
    checkpoint: Checkpoint, dtype: mx.Dtype = mx.bfloat16, on_bytes: OnBytes | None = None
) -> AutoEncoder:
    """The autoencoder, evaluated; never quantized. Errors as in `load_transformer`."""
    return _load(
        AutoEncoder(checkpoint.autoencoder), Reader(checkpoint, "vae"), dtype, None, on_bytes
    )


def load_tokenizers(checkpoint: Checkpoint) -> tuple[ClipTokenizer, T5Tokenizer]:
    """CLIP's and T5's tokenizers.

    Raises `WeightsError` for files that are no vocabularies, or those of another model: a token
    beyond the embedding would be read from memory that is not the model's.
    """
    clip = ClipTokenizer.from_folder(
        checkpoint.tokenizer, limit=checkpoint.clip.max_position_embeddings
    )
    t5 = T5Tokenizer.from_folder(checkpoint.tokenizer_2, checkpoint.defaults.t5_max_length)
    for folder, tokens, rows in (
        (checkpoint.tokenizer, clip.vocab_size, checkpoint.clip.vocab_size),
        (checkpoint.tokenizer_2, t5.vocab_size, checkpoint.t5.vocab_size),
    ):
        if tokens > rows:
            raise WeightsError(
                f"The vocabulary in {folder} has {tokens} tokens and its model {rows}; the folder "
                "belongs to another model."
            )
    return clip, t5


def read_rows(
    reader: Reader,
    name: str,
    dtype: mx.Dtype | None = None,
    start: int = 0,
    stop: int | None = None,
) -> mx.array:
    """Rows `start` to `stop` of one tensor of the model, evaluated, in PyTorch's axis order.

    Nothing else of the tensor is read, which is how a shard is loaded. `dtype` None keeps that of
    the file; packed integers always keep theirs.
    """
    stored = reader.rows(name, start, stop)
    kind = stored.dtype
    array = mx.array(stored.values)  # a copy
    del stored  # so that the next conversion holds two copies, not three
    if kind == "BF16":  # numpy has no bfloat16: the bits came as uint16
        array = array.view(mx.bfloat16)
    if dtype is not None and kind != "U32":
        array = array.astype(dtype)
    mx.eval(array)
    return array


def tensors(
    reader: Reader, dtype: mx.Dtype, bits: int | None, on_bytes: OnBytes | None = None
) -> Iterator[tuple[str, mx.array]]:
    """Every tensor of a component by name, in PyTorch's axis order; matrices quantized on the way.

    Each is evaluated when it comes. A quantized matrix comes as `weight`, `scales` and `biases`.
    """
    done = 0
    for name in reader.targets:
        array = read_rows(reader, name, dtype)
        group = group_size(reader.component, name, reader.targets[name].shape)
        if bits is None or reader.checkpoint.bits or group is None:
            yield name, array
        else:
            packed = mx.quantize(array, group_size=group, bits=bits)
            mx.eval(packed)
            del array
            module = name.removesuffix(".weight")
            for leaf, part in zip(("weight", "scales", "biases"), packed, strict=True):
                yield f"{module}.{leaf}", part
        done += reader.stored_bytes(name)
        if on_bytes is not None:
            on_bytes(done, reader.nbytes)


def _load(
    model: Any, reader: Reader, dtype: mx.Dtype, bits: int | None, on_bytes: OnBytes | None
) -> Any:
    stored_bits = reader.checkpoint.bits
    if stored_bits and bits not in (None, stored_bits):
        raise UsageError(
            f"{reader.checkpoint.name} is stored in {stored_bits} bits; leave --bits out, or name "
            "the model that it was made from."
        )
    bits = stored_bits or bits
    if bits is not None:
        _quantize_modules(model, reader, bits)
    for name, array in tensors(reader, dtype, bits, on_bytes):
        *path, leaf = name.split(".")
        module = module_at(model, ".".join(path))
        if array.ndim == 4:  # PyTorch's out, in, height, width; MLX has channels last
            array = mx.contiguous(array.transpose(0, 2, 3, 1))
            mx.eval(array)
        setattr(module, leaf, array)
        del array
    mx.clear_cache()  # buffers that conversions left behind
    return model


def _quantize_modules(model: Any, reader: Reader, bits: int) -> None:
    """Puts `nn.QuantizedLinear` where a matrix will be quantized; nothing is computed."""
    for name, target in tables(reader.checkpoint)[reader.component].items():
        group = group_size(reader.component, name, target.shape)
        if group is not None:
            rows, columns = target.shape
            path = name.removesuffix(".weight")
            bias = "bias" in module_at(model, path)
            linear = nn.QuantizedLinear(columns, rows, bias, group_size=group, bits=bits)
            replace_module(model, path, linear)


def module_at(model: Any, path: str) -> Any:
    """The module called `path` ("double_blocks.0.img_attn.qkv"); the model itself for ""."""
    node = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def replace_module(model: Any, path: str, module: nn.Module) -> None:
    """Puts `module` where the one called `path` was."""
    parent_path, _, leaf = path.rpartition(".")
    parent = module_at(model, parent_path)
    if isinstance(parent, list):
        parent[int(leaf)] = module
    else:
        setattr(parent, leaf, module)
