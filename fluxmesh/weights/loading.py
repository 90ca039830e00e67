"""Loads the four models: tensor by tensor, in the dtype and bits that are asked for.

Peak memory is the model plus its largest tensor: each tensor is read on its own, converted,
quantized if asked, evaluated, and only then the next. Of a transformer, a shard can be loaded
without the rest (`partition.py` says which part). `reader.py` finds and checks what the
files hold; `quantize.py` writes a quantized folder with what is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.clip import ClipTextModel
from fluxmesh.models.flux1.partition import cuts, partition
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.flux1.t5 import T5Encoder
from fluxmesh.models.flux1.tokenizers import ClipTokenizer, T5Tokenizer
from fluxmesh.models.flux1.transformer import Flux, Part, is_part
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut, Shard
from fluxmesh.models.slicing import hold_shard
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.reader import ComponentReader, tables, verify
from fluxmesh.weights.zero_copy import filled

__all__ = [
    "load_autoencoder",
    "load_clip",
    "load_t5",
    "load_tokenizers",
    "load_transformer",
    "read_part",
    "read_rows",
    "verify",
]

M = TypeVar("M", bound=nn.Module)
BLOCK_NUMBERS = 1 << 23  # numbers of a tensor in memory at once while columns are picked from it
OnBytes = Callable[[int, int], None]  # bytes of the component read, and in all
Wanted = Callable[[str], bool]  # whether a tensor is to be read, by its name


def load_transformer(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
    shard: Shard | None = None,
    part: Part = "all",
) -> Flux:
    """The transformer, evaluated. `bits` (3|4|5|6|8) quantizes the matrices of its blocks.

    With `shard`, only that part of its blocks and modulations is read and held; `parallel.tensor`
    runs it. Of the `part` "modulation" nothing but `modulations` may be called; "blocks" is what
    `release_modulation` leaves. Raises `WeightsError` naming file and tensor; `UsageError` for
    other bits than those that the checkpoint is stored in, and for a shard that the shapes don't
    allow.
    """
    shard = shard or Shard()
    config = checkpoint.transformer
    partition(config).check(shard.size, bool(bits or checkpoint.bits))
    reader = ComponentReader(checkpoint, "transformer")
    wanted = functools.partial(is_part, part)
    flux = _load(Flux(config), reader, dtype, bits, on_bytes, cuts(config, shard), wanted)
    if part == "blocks":
        flux.release_modulation()
    hold_shard(flux, shard)
    if dtype == mx.float16 and part != "modulation":
        flux.make_room()
    return flux


def load_t5(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
) -> T5Encoder:
    """The T5 encoder, evaluated. Arguments and errors as in `load_transformer`."""
    model = T5Encoder(checkpoint.t5)
    return _load(model, ComponentReader(checkpoint, "text_encoder_2"), dtype, bits, on_bytes)


def load_clip(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
) -> ClipTextModel:
    """The CLIP text encoder, evaluated. Arguments and errors as in `load_transformer`."""
    model = ClipTextModel(checkpoint.clip)
    return _load(model, ComponentReader(checkpoint, "text_encoder"), dtype, bits, on_bytes)


def load_autoencoder(
    checkpoint: Checkpoint, dtype: mx.Dtype = mx.bfloat16, on_bytes: OnBytes | None = None
) -> AutoEncoder:
    """The autoencoder, evaluated; never quantized. Errors as in `load_transformer`."""
    return _load(
        AutoEncoder(checkpoint.autoencoder),
        ComponentReader(checkpoint, "vae"),
        dtype,
        None,
        on_bytes,
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
    reader: ComponentReader,
    name: str,
    dtype: mx.Dtype | None = None,
    start: int = 0,
    stop: int | None = None,
) -> mx.array:
    """Rows `start` to `stop` of one tensor of the model, evaluated, in PyTorch's axis order.

    Nothing else of the tensor is read, which is how a shard is loaded. `dtype` None keeps that of
    the file; packed integers always keep theirs.
    """
    shape = reader.targets[name].shape
    spans = ((start, shape[0] if stop is None else stop),)
    return _read(reader, name, spans, shape[1:], dtype)


def read_part(
    reader: ComponentReader, name: str, cut: Cut, dtype: mx.Dtype | None = None
) -> mx.array:
    """The part of a linear's tensor `name` that is `cut` from its module, as `read_rows` gives it.

    Rows are read span by span. Columns are picked out of blocks of rows as these come, so that the
    whole tensor is never in memory. A bias is cut as rows are, and whole where columns are cut.
    """
    shape = reader.targets[name].shape
    if cut.axis == 1 and len(shape) == 1:
        return read_rows(reader, name, dtype)
    if cut.axis == 0:
        return _read(reader, name, cut.spans_of(shape[0]), shape[1:], dtype)
    columns = cut.spans_of(shape[1])
    step = max(1, BLOCK_NUMBERS // shape[1])

    def fill(out: np.ndarray) -> None:
        for start in range(0, shape[0], step):
            rows = reader.rows(name, start, min(start + step, shape[0])).values
            np.concatenate(
                [rows[:, a:b] for a, b in columns], axis=1, out=out[start : start + step]
            )

    width = sum(b - a for a, b in columns)
    stored = reader.dtype(name)
    return _as_dtype(filled((shape[0], width), stored, fill), stored, dtype)


def _read(
    reader: ComponentReader,
    name: str,
    spans: tuple[tuple[int, int], ...],
    row: tuple[int, ...],
    dtype: mx.Dtype | None,
) -> mx.array:
    """Spans of rows one after another, each row of the shape `row`."""

    def fill(out: np.ndarray) -> None:
        reader.spans_into(out, name, spans)

    stored = reader.dtype(name)
    return _as_dtype(filled((sum(b - a for a, b in spans), *row), stored, fill), stored, dtype)


def _as_dtype(array: mx.array, stored: str, dtype: mx.Dtype | None) -> mx.array:
    """In the dtype that is wanted, evaluated; packed integers stay what they are."""
    if dtype is not None and stored != "U32":
        array = array.astype(dtype)
        mx.eval(array)
    return array


def tensors(
    reader: ComponentReader,
    dtype: mx.Dtype,
    bits: int | None,
    on_bytes: OnBytes | None = None,
    parts: Mapping[str, Cut] = MappingProxyType({}),
    wanted: Wanted = lambda name: True,
) -> Iterator[tuple[str, mx.array]]:
    """Every tensor of a component by name, in PyTorch's axis order; matrices quantized on the way.

    Each is evaluated when it comes. A quantized matrix comes as `weight`, `scales` and `biases`.
    Of the linears in `parts`, only the part comes; where inputs are cut, `bias` as `sum_bias`.
    `on_bytes` is told of those that are `wanted`. Raises `WeightsError` for numbers that float16
    can't hold, where that is asked for.
    """
    names = [name for name in reader.targets if wanted(name)]
    done, total = 0, reader.nbytes
    if len(names) < len(reader.targets):
        total = sum(map(reader.stored_bytes, names))
    for name in names:
        cut = parts.get(name.rpartition(".")[0])
        if cut is None:
            array = read_rows(reader, name, dtype)
        else:
            array = read_part(reader, name, cut, dtype)
        if array.dtype == mx.float16 and not mx.isfinite(array).all().item():
            raise WeightsError(
                f"{reader.checkpoint.name}: {name} holds numbers that are too large for float16; "
                "use bfloat16 or float32."
            )
        group = group_size(reader.component, name, reader.targets[name].shape)
        if bits is None or reader.checkpoint.bits or group is None:
            is_late = cut is not None and cut.axis == 1 and name.endswith(".bias")
            yield name.removesuffix("bias") + "sum_bias" if is_late else name, array
        else:
            packed = mx.quantize(array, group_size=group, bits=bits)
            mx.eval(packed)
            del array
            module = name.removesuffix(".weight")
            for leaf, part in zip(("weight", "scales", "biases"), packed, strict=True):
                yield f"{module}.{leaf}", part
        done += reader.stored_bytes(name)
        if on_bytes is not None:
            on_bytes(done, total)


def _load(
    model: M,
    reader: ComponentReader,
    dtype: mx.Dtype,
    bits: int | None,
    on_bytes: OnBytes | None,
    parts: Mapping[str, Cut] = MappingProxyType({}),
    wanted: Wanted = lambda name: True,
) -> M:
    stored_bits = reader.checkpoint.bits
    if stored_bits and bits not in (None, stored_bits):
        raise UsageError(
            f"{reader.checkpoint.name} is stored in {stored_bits} bits; leave `bits` out, or name "
            "the model that it was made from."
        )
    bits = stored_bits or bits
    if bits is not None:
        _quantize_modules(model, reader, bits)
    for name, array in tensors(reader, dtype, bits, on_bytes, parts, wanted):
        *path, leaf = name.split(".")
        module = module_at(model, ".".join(path))
        if array.ndim == 4:  # PyTorch's out, in, height, width; MLX has channels last
            array = mx.contiguous(array.transpose(0, 2, 3, 1))
            mx.eval(array)
        setattr(module, leaf, array)
        if leaf == "sum_bias":  # added to the hosts' sum, not by the linear
            del module.bias
        del array
    mx.clear_cache()  # buffers that conversions left behind
    return model


def _quantize_modules(model: Any, reader: ComponentReader, bits: int) -> None:
    """Puts `nn.QuantizedLinear` where a matrix will be quantized; nothing is computed."""
    for name, target in tables(reader.checkpoint)[reader.component].items():
        group = group_size(reader.component, name, target.shape)
        if group is not None:
            rows, columns = target.shape
            path = name.removesuffix(".weight")
            bias = "bias" in module_at(model, path)
            linear = nn.QuantizedLinear(columns, rows, bias, group_size=group, bits=bits)
            replace_module(model, path, linear)
