"""What FLUX's transformers have in common: tokens of text and image, positions, a time step.

Both families run text and image side by side through double blocks and as one sequence through
single blocks. Between `layers.py` and a family's `layers.py` and `transformer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.kernels.ops import (
    gated_norm,
    gated_sum,
    modulated_norm,
    tokens_dtype,
    turned_heads,
    with_room,
)
from fluxmesh.models.layers import (
    QKNorm,
    SelfAttention,
    attention,
    call,
    outputs,
    rope_tables,
    run,
    timestep_embedding,
    values,
)
from fluxmesh.models.partition import Shard

_watched: ContextVar[list[mx.array] | None] = ContextVar("watched", default=None)


@contextmanager
def watching() -> Iterator[list[mx.array]]:
    """Gives what the calls of a transformer inside put between double and single blocks, in order.

    To compute the first before the rest: a seventh of a call (FLUX.2 dev) to a third (FLUX.1).
    """
    seen: list[mx.array] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def between_blocks(*streams: mx.array) -> mx.array:
    """What the double blocks give, text first, as the single ones take it: [B, S, D]."""
    x = mx.concatenate(list(streams), axis=1)
    tell_watcher(x)
    return x


def tell_watcher(x: mx.array) -> None:
    """Hands `x` to whoever is `watching`."""
    seen = _watched.get()
    if seen is not None:
        seen.append(x)


def at_step(mods: mx.array, step: int) -> mx.array:
    """`mods[step]` where it lies: an index would be a kernel of its own."""
    return mods[step : step + 1].reshape(mods.shape[1:])


class KeysValues(NamedTuple):
    """Of some tokens in one block, keys normed and rotated: each [B, H, R, hd]."""

    k: mx.array
    v: mx.array


def with_memory(own: KeysValues, memory: KeysValues | None) -> KeysValues:
    """Keys and values of a block's own tokens and of `memory`: their order doesn't matter."""
    if memory is None:
        return own
    return KeysValues(
        mx.concatenate([own.k, memory.k], axis=2), mx.concatenate([own.v, memory.v], axis=2)
    )


class DoubleBlock(nn.Module):
    """Image and text keep weights of their own and meet in one attention."""

    attention = staticmethod(attention)
    outputs = staticmethod(outputs)

    img_attn: SelfAttention
    txt_attn: SelfAttention
    img_mlp: list[nn.Module]
    txt_mlp: list[nn.Module]

    @property
    def streams(self) -> dict[str, tuple[SelfAttention, list[nn.Module]]]:
        """Each stream's attention and MLP, text first."""
        return {"txt": (self.txt_attn, self.txt_mlp), "img": (self.img_attn, self.img_mlp)}

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        img_mod: mx.array,
        txt_mod: mx.array,
        memory: KeysValues | None = None,
    ) -> tuple[mx.array, mx.array]:
        """img [B, S - L, D] and txt [B, L, D] in and out; each modulation is [B, 1, 6D].

        Tokens also attend to `memory`.
        """
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = mx.split(
            img_mod, 6, axis=-1
        )
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = mx.split(
            txt_mod, 6, axis=-1
        )

        img_stream = self.img_attn.stream(modulated_norm(img, img_shift1, img_scale1))
        txt_stream = self.txt_attn.stream(modulated_norm(txt, txt_shift1, txt_scale1))
        heads = img_stream[0].shape[-1] // (3 * self.img_attn.head_dim)
        q, k, v = turned_heads([txt_stream, img_stream], pe, heads, 3)  # text first
        k, v = with_memory(KeysValues(k, v), memory)
        txt_attn, img_attn = mx.split(self.attention(q, k, v), [txt.shape[1]], axis=1)

        img_out, txt_out = self.outputs(
            (self.img_attn.proj, img_attn), (self.txt_attn.proj, txt_attn)
        )
        img, img_normed = gated_norm(img, img_gate1, img_out, img_shift2, img_scale2)
        txt, txt_normed = gated_norm(txt, txt_gate1, txt_out, txt_shift2, txt_scale2)

        img_out, txt_out = self.outputs(
            (self.img_mlp[2], run(self.img_mlp[:2], img_normed)),
            (self.txt_mlp[2], run(self.txt_mlp[:2], txt_normed)),
        )
        return gated_sum(img, img_gate2, img_out), gated_sum(txt, txt_gate2, txt_out)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP share a matrix in and a matrix out."""

    attention = staticmethod(attention)
    outputs = staticmethod(outputs)

    def __init__(
        self, dim: int, num_heads: int, mlp_hidden_dim: int, inner: int, bias: bool = True
    ) -> None:
        """`inner`: columns of the MLP's way in, of which `beside` makes `mlp_hidden_dim`."""
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv_dim = 3 * dim
        self.linear1 = nn.Linear(dim, 3 * dim + inner, bias)  # q, k, v and the MLP's way in
        self.linear2 = nn.Linear(dim + mlp_hidden_dim, dim, bias)  # the way out of both
        self.norm = QKNorm(self.head_dim)

    def beside(self, attn: mx.array, joined: mx.array, start: int) -> mx.array:
        """Attention's [B, S, D], and behind it the MLP's hidden columns [B, S, M] of what lies in
        `joined` from column `start` on."""
        raise NotImplementedError

    def __call__(
        self, x: mx.array, pe: mx.array, mod: mx.array, memory: KeysValues | None = None
    ) -> mx.array:
        """x [B, S, D] in and out; `mod` is [B, 1, 3D]. Tokens also attend to `memory`."""
        return self._run(x, pe, mod, memory)[0]

    def _run(
        self, x: mx.array, pe: mx.array, mod: mx.array, memory: KeysValues | None
    ) -> tuple[mx.array, KeysValues]:
        """The tokens, and their own keys and values."""
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        joined = self.linear1(modulated_norm(x, shift, scale))
        heads = self.qkv_dim // (3 * self.head_dim)
        q, k = turned_heads([(joined, self.norm.scales)], pe, heads, 2)
        own = KeysValues(k, values(joined[..., : self.qkv_dim], self.head_dim))
        attn = self.attention(q, *with_memory(own, memory))
        (out,) = self.outputs((self.linear2, self.beside(attn, joined, self.qkv_dim)))
        return gated_sum(x, gate, out), own


def ends_branch(name: str) -> bool:
    """Whether a linear, by its module's name, is one that `make_room` is about."""
    return name.endswith(("_attn.proj", "_mlp.2", ".linear2"))


def _make_room(linear: Any) -> None:
    for name in ("bias", "sum_bias"):  # the latter in a shard
        if name in linear:
            linear[name] = with_room(linear[name])
            mx.eval(linear[name])


class DoubleStreamTransformer(nn.Module):
    """A transformer of double blocks, then single ones; a family adds layers and modulations."""

    call = staticmethod(call)

    def __init__(self, config: Any) -> None:
        """Raises `WeightsError` where heads and rotary axes don't divide the hidden size."""
        super().__init__()
        if config.hidden_size % config.num_heads or sum(config.axes_dim) != config.head_dim:
            raise WeightsError(
                f"The transformer's config has hidden size {config.hidden_size}, "
                f"{config.num_heads} heads and rotary axes {config.axes_dim}; the axes must sum "
                "to the size of a head."
            )
        self.config = config
        self.modulation_released = False
        self.shard = Shard()  # the part of what is dealt out that is held

    @property
    def blocks(self) -> list[Any]:
        """In the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    @property
    def dtype(self) -> mx.Dtype:
        """Of weights and activations. The norms tell: they are neither quantized nor adapted."""
        return self.double_blocks[0].img_attn.norm.query_norm.scale.dtype

    def hold(self, shard: Shard) -> None:
        """Tells a transformer whose linears are cut which part of itself it is."""
        self.shard = shard
        start, stop = shard.part(self.config.hidden_size)
        for single in self.single_blocks:
            single.qkv_dim = 3 * (stop - start)

    def make_room(self) -> None:
        """Divides the biases of the linears that end branches by `ops.HEADROOM`, in place.

        Once, after the weights have come, and in float16 alone: `ops.py` says why.
        """
        for double in self.double_blocks:
            for linear in (
                *(double.img_attn.proj, double.txt_attn.proj),
                *(double.img_mlp[2], double.txt_mlp[2]),
            ):
                _make_room(linear)
        for single in self.single_blocks:
            _make_room(single.linear2)

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables of text and image together, float32 [(B,) 1, S, hd/2, 2].

        Ids are whole numbers, [L, axes] and [S - L, axes], or both with an axis of B first. They
        are read on the host: call this outside of functions that MLX compiles.
        """
        ids = np.concatenate([np.array(txt_ids), np.array(img_ids)], axis=-2)
        return rope_tables(ids, self.config.axes_dim, self.config.theta)

    def tokens_of(self, x: mx.array, linear: nn.Module) -> mx.array:
        """What enters by `img_in` or `txt_in`, as the blocks pass it on: [B, tokens, D]."""
        return linear(x.astype(self.dtype)).astype(tokens_dtype(self.dtype))

    def _time(self, timesteps: mx.array, guidance: mx.array | None) -> mx.array:
        """Time steps [N] and guidance [N or 1], embedded and added: [N, D]."""
        vec = self.time_in(timestep_embedding(timesteps).astype(self.dtype))
        if not self.config.guidance_embed:
            return vec
        if guidance is None:
            raise UsageError("This model was distilled with guidance; give `guidance` a number.")
        return vec + self.guidance_in(timestep_embedding(guidance).astype(self.dtype))
