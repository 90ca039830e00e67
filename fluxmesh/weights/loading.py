"""Loads a checkpoint's models: tensor by tensor, in the dtype and bits that are asked for.

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
from fluxmesh.kernels.packed_linear import PackedLinear
from fluxmesh.models.base import Part
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut, Shard
from fluxmesh.models.registry import runtime_of
from fluxmesh.storage.numbers.affine import Packing
from fluxmesh.weights.checkpoint import Checkpoint, other_bits
from fluxmesh.weights.reader import ComponentReader, table_of, verify
from fluxmesh.weights.zero_copy import filled

__all__ = [
    "bytes_to_load",
    "load_autoencoder",
    "load_text_encoder",
    "load_tokenizers",
    "load_transformer",
    "load_vision",
    "read_part",
    "read_rows",
    "verify",
    "whole_weight",
]

M = TypeVar("M", bound=nn.Module)
BLOCK_NUMBERS = 1 << 23  # numbers of a tensor in memory at once while columns are picked from it
OnBytes = Callable[[int, int], None]  # bytes of the component read, and in all
Wanted = Callable[[str], bool]  # whether a tensor is to be read, by its name
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", None: None}  # safetensors'


def load_transformer(
    checkpoint: Checkpoint,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
    shard: Shard | None = None,
    part: Part = "all",
) -> Any:
    """The transformer, evaluated. `bits` (3|4|5|6|8) quantizes the matrices of its blocks.

    With `shard`, only that part of its blocks and modulations is read and held; `parallel.tensor`
    runs it. Of the `part` "modulation" nothing but `modulations` may be called; "blocks" is what
    `release_modulation` leaves. Raises `WeightsError` naming file and tensor; `UsageError` for
    other bits than those that the checkpoint is stored in, and for a shard that the shapes don't
    allow.
    """
    shard, model = shard or Shard(), checkpoint.architecture
    runtime = runtime_of(model)
    reader = ComponentReader(checkpoint, model.folder("denoiser"))
    model.partition.check(shard.size, bool(bits or reader.bits), shard.shares)
    cuts = model.partition.cuts(shard)
    _check_packed_cuts(reader, cuts)
    flow = runtime.build("transformer")
    bits = _bits_to_load(reader, bits)
    _load(flow, reader, dtype, bits, on_bytes, cuts, functools.partial(runtime.is_part, part))
    if part == "blocks":
        flow.release_modulation()
    flow.hold(shard)
    if dtype == mx.float16 and part != "modulation":
        flow.make_room()
    return flow


def load_text_encoder(
    checkpoint: Checkpoint,
    component: str,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
    text_bits: int | None = None,
) -> Any:
    """A text encoder, evaluated. Other arguments and errors as in `load_transformer`.

    `text_bits` are its own, where it is not to have those of the transformer.
    """
    model = checkpoint.architecture
    reader = ComponentReader(checkpoint, model.folder(component))
    bits = _bits_of_text(reader, bits, text_bits)
    return _load(runtime_of(model).build(component), reader, dtype, bits, on_bytes)


def text_layers(
    checkpoint: Checkpoint,
    component: str,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    on_bytes: OnBytes | None = None,
    text_bits: int | None = None,
) -> Any:
    """As `load_text_encoder`, for a machine that can't hold it: its layers, one at a time.

    Each is read when the text comes to it, and leaves when the text has passed: it serves once.
    """
    model = checkpoint.architecture
    reader = ComponentReader(checkpoint, model.folder(component))
    quantized_to = _bits_of_text(reader, bits, text_bits)
    encoder = runtime_of(model).build(component)
    _quantize_modules(encoder, reader, quantized_to)
    prefixes = model.text_layers(component)
    sizes = {
        prefix: sum(reader.stored_bytes(name) for name in reader.targets if name.startswith(prefix))
        for prefix in prefixes
    }

    def read() -> Iterator[nn.Module]:
        total, before = sum(sizes.values()), 0
        for prefix in prefixes:
            path = prefix.rstrip(".")
            start = before

            def tell(done: int, _of: int, start: int = start) -> None:
                if on_bytes is not None:
                    on_bytes(start + done, total)

            _fill(encoder, reader, dtype, quantized_to, tell, wanted=_begins(prefix))
            layer = module_at(encoder, path)
            yield layer
            layer.clear()  # also where whoever asked for it still has it by name
            mx.clear_cache()
            before += sizes[prefix]

    return runtime_of(model).by_layers(component, dtype, read)


def load_autoencoder(
    checkpoint: Checkpoint, dtype: mx.Dtype = mx.bfloat16, on_bytes: OnBytes | None = None
) -> Any:
    """The autoencoder, evaluated; never quantized. Errors as in `load_transformer`."""
    model = checkpoint.architecture
    reader = ComponentReader(checkpoint, model.folder("autoencoder"))
    bits = _bits_to_load(reader, None)
    return _load(runtime_of(model).build("autoencoder"), reader, dtype, bits, on_bytes)


def load_vision(
    checkpoint: Checkpoint, dtype: mx.Dtype = mx.bfloat16, on_bytes: OnBytes | None = None
) -> dict[str, Any]:
    """The models with which references are read, by component, evaluated; never quantized.

    `on_bytes` counts all of them. Errors as in `load_transformer`.
    """
    model = checkpoint.architecture
    parts = model.of_role("vision")
    sizes = {part.name: bytes_to_load(checkpoint, part.name) for part in parts}
    loaded: dict[str, Any] = {}

    def tell(done: int, _of: int) -> None:
        if on_bytes is not None:
            on_bytes(sum(sizes[name] for name in loaded) + done, sum(sizes.values()))

    for part in parts:
        reader = ComponentReader(checkpoint, part.folder)
        bits = _bits_to_load(reader, None)
        built = runtime_of(model).build(part.name)
        loaded[part.name] = _load(built, reader, dtype, bits, tell)
    return loaded


def bytes_to_load(checkpoint: Checkpoint, component: str) -> int:
    """Bytes of a component's files that loading it reads. Raises as `load_transformer`."""
    folder = checkpoint.architecture.folder(component)
    reader = ComponentReader(checkpoint, folder)
    looked_up = reader.looked_up
    if not looked_up:
        return checkpoint.components[folder].nbytes
    return sum(reader.stored_bytes(name) for name in reader.targets if name not in looked_up)


def load_tokenizers(checkpoint: Checkpoint) -> Any:
    """The tokenizers, as `Runtime.load_tokenizers` gives them. Raises as that."""
    return runtime_of(checkpoint.architecture).load_tokenizers(checkpoint.tokenizers)


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


def whole_weight(checkpoint: Checkpoint, component: str, name: str) -> np.ndarray:
    """A linear's whole weight as the checkpoint has it, float32 [out, in], also of a quantized one.

    What DoRA is relative to, on a shard too. Raises `WeightsError` naming file and tensor.
    """
    reader = ComponentReader(checkpoint, component)
    packing = reader.packings.get(name)
    if packing is None:
        return np.array(read_rows(reader, f"{name}.weight", mx.float32))
    packed = read_rows(reader, f"{name}.weight")
    scales, biases = (
        read_rows(reader, f"{name}.{leaf}", mx.float32) for leaf in ("scales", "biases")
    )
    return np.array(mx.dequantize(packed, scales, biases, packing.group, packing.bits))


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
    stored = reader.dtype(name, wanted=_NAMES[dtype])

    def fill(out: np.ndarray) -> None:
        for start in range(0, shape[0], step):
            rows = reader.rows(name, start, min(start + step, shape[0]), stored).values
            np.concatenate(
                [rows[:, a:b] for a, b in columns], axis=1, out=out[start : start + step]
            )

    width = sum(b - a for a, b in columns)
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

    stored = reader.dtype(name, wanted=_NAMES[dtype])
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
        group = reader.group_size(name, reader.targets[name].shape)
        if bits is None or group is None:
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
    """`bits` are those that matrices get on the way, as `_bits_to_load` says."""
    _quantize_modules(model, reader, bits)
    return _fill(model, reader, dtype, bits, on_bytes, parts, wanted)


def _bits_to_load(reader: ComponentReader, bits: int | None, option: str = "bits") -> int | None:
    """What matrices that come plain are quantized to. Raises `UsageError` for others than stored.

    A model that is stored in so many bits is held in them whole, as planned: also a text encoder
    that lies beside its file plain. Of a component that is quantized, what is plain stays so.
    """
    stored_bits = reader.checkpoint.bits_of(reader.component) or reader.bits
    if stored_bits and bits not in (None, stored_bits):
        raise other_bits(reader.checkpoint.name, stored_bits, option)
    return None if reader.bits else stored_bits or bits


def _bits_of_text(reader: ComponentReader, bits: int | None, text_bits: int | None) -> int | None:
    """As `_bits_to_load`, of a text encoder: it may have others than the transformer."""
    if text_bits is None:
        return _bits_to_load(reader, None if reader.checkpoint.text_bits else bits)
    if reader.bits is None and reader.checkpoint.text_bits is None:
        return text_bits  # its files are plain, whatever the transformer's are
    return _bits_to_load(reader, text_bits, "text_bits")


def _begins(prefix: str) -> Wanted:
    return lambda name: name.startswith(prefix)


def _fill(
    model: M,
    reader: ComponentReader,
    dtype: mx.Dtype,
    bits: int | None,
    on_bytes: OnBytes | None,
    parts: Mapping[str, Cut] = MappingProxyType({}),
    wanted: Wanted = lambda name: True,
) -> M:
    """Reads a model's tensors into it."""
    looked_up = reader.looked_up

    def is_held(name: str) -> bool:
        return name not in looked_up and wanted(name)

    for name, array in tensors(reader, dtype, bits, on_bytes, parts, is_held):
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


def _quantize_modules(model: Any, reader: ComponentReader, bits: int | None) -> None:
    """Puts a quantized linear where a matrix is stored quantized, or will be; computes nothing.

    Each that is stored so keeps its own bits and groups; with `bits`, the others get those.
    """
    for name, target in table_of(reader.checkpoint, reader.component).items():
        path = name.removesuffix(".weight")
        packing = reader.packings.get(path)
        group = reader.group_size(name, target.shape)
        if packing is None and bits is not None and group is not None:
            packing = Packing(bits, group)
        if packing is not None:
            rows, columns = target.shape
            bias = "bias" in module_at(model, path)
            how = {"group_size": packing.group, "bits": packing.bits}
            replace_module(model, path, PackedLinear(columns, rows, bias, **how))


def _check_packed_cuts(reader: ComponentReader, parts: Mapping[str, Cut]) -> None:
    """Raises `UsageError` where a shard's columns are no whole groups of a stored matrix."""
    for module, packing in reader.packings.items():
        cut = parts.get(module)
        if cut is None or cut.axis == 0:
            continue
        if any(end % packing.group for span in cut.spans for end in span):
            raise UsageError(
                f"{reader.checkpoint.name} is quantized in groups of {packing.group} columns, "
                f"which don't divide {module} between so many hosts; choose another `placement`, "
                "or the model that it was made from."
            )
