"""What stands between matrix products and convolutions, in few passes over memory.

FLUX's norms, gates and rotations do little arithmetic on much data: written operation by operation
they take a quarter of a step. Each function here is one of them with its neighbours: the layers
call these and know of no device. The plain forms (`plain_*`) say what is computed. On a CUDA GPU
`cuda_transformer.py`, `cuda_group_norm.py` and `cuda_unpacking.py` have a kernel for each, which
keeps float32 inside and rounds once; on Metal MLX compiles the plain form into one kernel where it
can; the CPU runs it as it stands.

In float16, which has no number above 65504, tokens are float32 between the blocks, and what leads
into a linear that ends a branch is divided by `HEADROOM`: so are then the linear's products, and
the sum that takes them up multiplies again. FLUX's text tokens go beyond 65504, and so do single
products; a power of two costs no accuracy. `make_room` of `models/double_stream.py` does the same
to those linears' biases.

Gradients are those of the plain forms, which are computed again from the inputs on the way back,
when their turn comes: nothing between the inputs and the result is kept.

Shapes: B images, S tokens, D hidden size, H heads of hd channels; shifts, scales and gates are
[B or 1, 1, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.cluster.snapshot import Platform
from fluxmesh.kernels import cuda_group_norm, cuda_transformer, cuda_unpacking

EPS = 1e-6
HEADROOM = 64.0

Stream = tuple[mx.array, Sequence[mx.array]]
"""Projected tokens [B, S, W] of one stream, and a norm's scale [hd] for each group to be normed."""


@functools.cache
def device() -> Platform:
    """Where arrays are computed by default: "cuda", "metal" or "cpu"."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def tokens_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Of tokens between the blocks of a model with weights of `dtype`."""
    return mx.float32 if dtype == mx.float16 else dtype


def with_room(x: mx.array) -> mx.array:
    """What leads into a linear that ends a branch, as that linear takes it."""
    return x / HEADROOM if x.dtype == mx.float16 else x


def _suits(x: mx.array, *widths: int) -> bool:
    """Whether a CUDA kernel takes rows of these widths and of the dtype of x: not of float16."""
    return x.dtype != mx.float16 and cuda_transformer.suits(*widths)


def has_kernels(head_dim: int, *widths: int) -> bool:
    """Whether on CUDA all that a transformer of these widths does between its products is ours."""
    return cuda_transformer.suits_heads(head_dim) and cuda_transformer.suits(*widths)


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm without weights of its own, then a scale and shift that depend on t and prompt.

    In the dtype of `shift`, that of the branch which it begins.
    """
    return _chosen("modulated_norm", _suits(shift, x.shape[-1]))(x, shift, scale)


def gated_sum(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """What a branch has computed, y [B, S, D], gated and added to what it came from."""
    return _chosen("gated_sum", _suits(y, x.shape[-1]))(x, gate, y)


def gated_norm(
    x: mx.array, gate: mx.array, y: mx.array, shift: mx.array, scale: mx.array
) -> tuple[mx.array, mx.array]:
    """`gated_sum`, and `modulated_norm` of the sum: both are needed, and one pass gives both."""
    return _chosen("gated_norm", _suits(y, x.shape[-1]))(x, gate, y, shift, scale)


def turned(streams: Sequence[Stream], pe: mx.array, heads: int, groups: int) -> mx.array:
    """Queries and keys normed, each head on its own, and rotated: [B, S, groups, H, hd].

    A row of a stream begins with `groups` groups of H heads (queries, keys, values, or some of
    them; what follows is left out). Groups that have a scale are normed and rotated by `pe`
    (`layers.rope_tables`), the others pass through. One or two streams, the second's tokens after
    the first's.
    """
    kernel = _turn_kernel(streams, heads, groups)
    if kernel is not None:
        return kernel(pe, *_flat(streams))
    parts = turned_heads(streams, pe, heads, groups)
    return mx.stack([part.swapaxes(1, 2) for part in parts], axis=2)


def turned_heads(
    streams: Sequence[Stream], pe: mx.array, heads: int, groups: int
) -> tuple[mx.array, ...]:
    """As `turned`, for attention on this host: a [B, H, S, hd] for each group."""
    kernel = _turn_kernel(streams, heads, groups)
    if kernel is not None:
        joined = kernel(pe, *_flat(streams))
        return tuple(joined[:, :, group].swapaxes(1, 2) for group in range(groups))
    normed = len(streams[0][1])
    plain = _chosen("turned_heads", False, heads=heads, groups=groups, normed=normed)
    return plain(pe, *_flat(streams))


def _turn_kernel(streams: Sequence[Stream], heads: int, groups: int) -> Callable[..., Any] | None:
    if device() != "cuda":
        return None
    hd, normed = streams[0][1][0].shape[0], len(streams[0][1])
    fits = cuda_transformer.suits_heads(hd) and _suits(
        streams[0][0], *(x.shape[-1] for x, _ in streams)
    )
    if not fits:
        return None
    return _chosen("turned", True, heads=heads, groups=groups, normed=normed)


def _flat(streams: Sequence[Stream]) -> list[mx.array]:
    """A stream's tokens, its scales, the next one's, ..."""
    return [array for x, scales in streams for array in (x, *scales)]


def gelu(x: mx.array) -> mx.array:
    """GELU, the tanh form; with room for the linear that follows."""
    return _chosen("gelu", _suits(x, x.shape[-1]))(x)


def gelu_beside(attn: mx.array, x: mx.array, start: int) -> mx.array:
    """attn [B, S, D], and beside it `gelu` of the columns of x from `start` on."""
    fits = _suits(x, attn.shape[-1], x.shape[-1], start)
    return _chosen("gelu_beside", fits, start=start)(attn, x)


def swiglu(x: mx.array) -> mx.array:
    """silu of the first half of x [..., 2M] times the second: [..., M].

    With room for the linear that follows. Source: Shazeer 2020, "GLU Variants Improve Transformer"
    (https://arxiv.org/abs/2002.05202).
    """
    return _chosen("swiglu", _suits(x, x.shape[-1] // 2))(x)


def swiglu_beside(attn: mx.array, x: mx.array, start: int) -> mx.array:
    """attn [B, S, D], and beside it `swiglu` of the columns of x from `start` on."""
    half = (x.shape[-1] - start) // 2
    fits = _suits(x, attn.shape[-1], half, x.shape[-1], start)
    return _chosen("swiglu_beside", fits, start=start)(attn, x)


def group_norm(
    x: mx.array, weight: mx.array, bias: mx.array, offset: mx.array, groups: int, silu: bool
) -> mx.array:
    """Group norm of x + offset, [B, ..., C]; neighbouring channels make a group.

    PyTorch's group norm, over all places of a picture; with `silu`, swish after it. `weight`,
    `bias` and `offset` (a convolution's bias that nobody has added yet, or zeros) are [C].
    """
    fits = cuda_group_norm.suits_groups(x.shape[-1])
    return _chosen("group_norm", fits, groups=groups, silu=silu)(x, weight, bias, offset)


def offset_sum(x: mx.array, y: mx.array, offset: mx.array) -> mx.array:
    """x + y + offset: [..., C], twice, and a convolution's bias [C]."""
    return _chosen("offset_sum", cuda_transformer.suits(x.shape[-1]))(x, y, offset)


def unpacked(
    packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """The matrix [out, in] that `mx.quantize` packed, in the dtype of its scales; a constant."""
    form = cuda_unpacking.unpacked if device() == "cuda" else mx.dequantize
    return form(packed, scales, biases, group_size, bits)


# The plain forms


def plain_modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    normed = (1 + scale) * mx.fast.layer_norm(x, None, None, EPS) + shift
    return normed.astype(shift.dtype)


def plain_gated_sum(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    if y.dtype == mx.float16:
        return x + HEADROOM * gate.astype(x.dtype) * y.astype(x.dtype)
    return x + gate * y


def plain_gated_norm(
    x: mx.array, gate: mx.array, y: mx.array, shift: mx.array, scale: mx.array
) -> tuple[mx.array, mx.array]:
    x = plain_gated_sum(x, gate, y)
    return x, plain_modulated_norm(x, shift, scale)


def plain_turned_heads(
    pe: mx.array, *arrays: mx.array, heads: int, groups: int, normed: int
) -> tuple[mx.array, ...]:
    """`arrays` are a stream's tokens, its `normed` scales, the next one's, ..."""
    parts: list[list[mx.array]] = [[] for _ in range(groups)]
    for i in range(0, len(arrays), 1 + normed):
        x, *scales = arrays[i : i + 1 + normed]
        hd = scales[0].shape[0]
        split = x[..., : groups * heads * hd].reshape(*x.shape[:2], groups, heads, hd)
        for group, part in enumerate(parts):
            projection = split[:, :, group]  # [B, S, H, hd]
            part.append(
                mx.fast.rms_norm(projection, scales[group], EPS) if group < normed else projection
            )
    joined = [mx.concatenate(part, axis=1) if len(part) > 1 else part[0] for part in parts]
    table = pe.swapaxes(-4, -3)  # [(B,) S, 1, hd/2, 2]
    return tuple(
        (rotate(x, table) if group < normed else x).swapaxes(1, 2) for group, x in enumerate(joined)
    )


def plain_turned(pe: mx.array, *arrays: mx.array, **fixed: int) -> mx.array:
    parts = plain_turned_heads(pe, *arrays, **fixed)
    return mx.stack([part.swapaxes(1, 2) for part in parts], axis=2)


def rotate(x: mx.array, pe: mx.array) -> mx.array:
    """Rotates each pair of neighbouring channels of x [..., hd]; computes in float32.

    `pe` is [..., hd/2, 2]: the cosine and the sine of each pair's angle; a constant.
    """
    return cast(mx.array, _rotate(x, pe))


@mx.custom_function
def _rotate(x: mx.array, pe: mx.array) -> mx.array:
    return _rotated(x, pe)


@_rotate.vjp
def _rotate_back(primals: Any, above: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    """The same angles the other way: MLX's own gradient would sum over rows of two."""
    _x, pe = primals
    return _rotated(above, mx.stack([pe[..., 0], -pe[..., 1]], axis=-1)), mx.zeros_like(pe)


def _rotated(x: mx.array, pe: mx.array) -> mx.array:
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 1, 2)
    cos, sin = pe[..., 0], pe[..., 1]
    across = mx.stack([-sin, cos], axis=-1)
    return (pairs[..., 0] * pe + pairs[..., 1] * across).reshape(x.shape).astype(x.dtype)


def plain_gelu(x: mx.array) -> mx.array:
    if x.dtype == mx.float16:  # whose cube is soon beyond float16, too
        return (nn.gelu_approx(x.astype(mx.float32)) / HEADROOM).astype(x.dtype)
    return nn.gelu_approx(x)


def plain_gelu_beside(attn: mx.array, x: mx.array, *, start: int) -> mx.array:
    return mx.concatenate([attn, plain_gelu(x[..., start:])], axis=-1)


def plain_swiglu(x: mx.array) -> mx.array:
    gate, up = mx.split(x, 2, axis=-1)
    if x.dtype == mx.float16:  # a product of two may be beyond float16
        return (nn.silu(gate.astype(mx.float32)) * up / HEADROOM).astype(x.dtype)
    return nn.silu(gate) * up


def plain_swiglu_beside(attn: mx.array, x: mx.array, *, start: int) -> mx.array:
    return mx.concatenate([attn, plain_swiglu(x[..., start:])], axis=-1)


def plain_group_norm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    offset: mx.array,
    *,
    groups: int,
    silu: bool,
) -> mx.array:
    B, C = x.shape[0], x.shape[-1]
    y = (x + offset).reshape(B, -1, groups, C // groups).swapaxes(1, 2).reshape(B, groups, -1)
    y = mx.fast.layer_norm(y, None, None, EPS)
    y = y.reshape(B, groups, -1, C // groups).swapaxes(1, 2).reshape(x.shape)
    y = weight * y + bias
    return nn.silu(y) if silu else y


def plain_offset_sum(x: mx.array, y: mx.array, offset: mx.array) -> mx.array:
    return x + (y + offset)


# Which form runs


@functools.cache
def _chosen(name: str, fits: bool, **fixed: int | bool) -> Callable[..., Any]:
    """The form of an operation for this device; `fits`: whether a kernel takes these shapes."""
    plain = functools.partial(PLAIN[name], **fixed)
    form: Callable[..., Any] = plain
    if device() == "cuda" and fits:
        form = functools.partial(KERNELS[name], **fixed)
    elif device() == "metal":
        form = mx.compile(plain)
    return _differentiable(form, plain)


def _differentiable(form: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`form` with the gradient of `plain`."""
    function = mx.custom_function(form)

    @compiled
    def back(inputs: list[mx.array], above: list[mx.array]) -> list[mx.array]:
        return mx.vjp(plain, inputs, above)[1]

    @function.vjp
    def gradient(primals: Any, cotangents: Any, _: Any) -> Any:
        above = _listed(cotangents)
        return tuple(back(mx.depends(_listed(primals), above), above))

    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its elementwise parts in single passes; on a CPU, as it is."""
    return function if device() == "cpu" else mx.compile(function)


def _listed(arrays: Any) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


PLAIN: dict[str, Callable[..., Any]] = {
    "modulated_norm": plain_modulated_norm,
    "gated_sum": plain_gated_sum,
    "gated_norm": plain_gated_norm,
    "turned": plain_turned,
    "turned_heads": plain_turned_heads,
    "gelu": plain_gelu,
    "gelu_beside": plain_gelu_beside,
    "swiglu": plain_swiglu,
    "swiglu_beside": plain_swiglu_beside,
    "group_norm": plain_group_norm,
    "offset_sum": plain_offset_sum,
}
KERNELS: dict[str, Callable[..., Any]] = {
    "modulated_norm": functools.partial(cuda_transformer.modulated_norm, eps=EPS),
    "gated_sum": cuda_transformer.gated_sum,
    "gated_norm": functools.partial(cuda_transformer.gated_norm, eps=EPS),
    "turned": functools.partial(cuda_transformer.turned, eps=EPS),
    "gelu": cuda_transformer.gelu,
    "gelu_beside": cuda_transformer.gelu_beside,
    "swiglu": cuda_transformer.swiglu,
    "swiglu_beside": cuda_transformer.swiglu_beside,
    "group_norm": functools.partial(cuda_group_norm.group_norm, eps=EPS),
    "offset_sum": cuda_group_norm.offset_sum,
}
