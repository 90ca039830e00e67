"""What the transformers of both families share on several hosts: sums, dealt tokens, their blocks.

Between the collectives (`collectives.py`), the whole blocks (`double_stream.py`) and a family's
`parallel.py`. For `tensor`, a block's partial outputs are `summed`. For `sequence`, tokens are
counted through text and image, in this order, and dealt out in runs: text and image tokens cost the
same, so that the ranks share fairly whatever the length of the prompt, and only the rank where text
meets image reads the double blocks' weights of both. Even runs are of ceil(S / N): after the last
token the last ones are filled up with zeros, which every rank computes like tokens, so that shapes
are equal. Of unequal shares (`Shares.tokens`) each rank computes its own tokens alone, and what it
gives to a gather is filled up to the longest run. What fills up is cut off after each gather.

Shapes: B images, C tokens of this rank (its run), S tokens in all, H heads of hd channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from fluxmesh.cluster.shares import Shares
from fluxmesh.errors import UsageError
from fluxmesh.kernels.ops import (
    Stream,
    gated_norm,
    gated_sum,
    modulated_norm,
    turned,
    turned_heads,
)
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.double_stream import DoubleBlock, KeysValues, SingleBlock, with_memory
from fluxmesh.models.layers import QKNorm, attention, run
from fluxmesh.models.lora_linear import innermost
from fluxmesh.models.partition import Cut, Shard, TokenRuns
from fluxmesh.models.slicing import cut_linear, shard_of
from fluxmesh.models.step_cache import StepCache

T = TypeVar("T")

Streams = dict[str, mx.array]  # "txt" and "img", in this order


def sharded(flux: T, ranks: Ranks, shares: Shares) -> T:
    """This rank's part of a transformer, whose blocks add up their outputs over the ranks.

    `flux` is whole, and then left as it is, or this rank's shard of a checkpoint. Raises
    `UsageError` where it is another shard, or doesn't divide over the ranks.
    """
    part: Any = flux
    shard = Shard(ranks.rank, ranks.size, shares)
    if part.shard == Shard():
        part = shard_of(part, shard)
    elif part.shard != shard:
        other = " in other shares" if part.shard == replace(shard, shares=part.shard.shares) else ""
        raise UsageError(
            f"Part {part.shard.rank} of {part.shard.size}{other} of the transformer was loaded "
            f"where rank {ranks.rank} of {ranks.size} runs; load the model again."
        )
    outputs = functools.partial(summed, ranks)  # not a method: a cycle would keep the weights
    for block in part.blocks:
        block.outputs = outputs
    own: T = part
    return own


class SpreadTransformer:
    """What both placements share: the transformer itself to everyone but its blocks."""

    flux: Any

    def __init__(self, flux: Any, ranks: Ranks, shares: Shares) -> None:
        self.flux, self.ranks, self.shares = flux, ranks, shares
        # Blocks that multiply with parts of the transformer's linears.
        self.parted: list[SequenceDoubleBlock | SequenceSingleBlock] = []

    def runs(self, tokens: int) -> TokenRuns:
        """Which of so many tokens each rank has, with `sequence`."""
        return TokenRuns.of(tokens, self.ranks.size, self.shares)

    @property
    def config(self) -> Any:
        return self.flux.config

    @property
    def dtype(self) -> mx.Dtype:
        return self.flux.dtype

    @property
    def modulation_released(self) -> bool:
        return bool(self.flux.modulation_released)

    def release_modulation(self) -> None:
        """As the transformer's."""
        self.flux.release_modulation()

    def views(self) -> list[mx.array]:
        """What the placement made of the weights, without copies, to multiply with; lazy at first.

        Whoever traces a call evaluates them before, or each replay makes them anew.
        """
        linears = [linear for block in self.parted for linear in block.linears]
        return [array for linear in linears for _, array in tree_flatten(linear.parameters())]

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables for this rank's calls, as the transformer makes them."""
        return self.flux.rope(txt_ids, img_ids)


def check_whole(flux: Any) -> None:
    """Raises `UsageError` where a transformer for `sequence` is a shard."""
    if flux.shard != Shard():
        raise UsageError(
            "A shard of the transformer can't run the sequence placement, which needs all "
            "weights on every host; load the whole model, or use `placement` tensor."
        )


def own_rope(pe: mx.array, rank: int, runs: TokenRuns) -> mx.array:
    """Of all tokens' rotary tables those of this rank's, float32 [(B,) 1, C, hd/2, 2]."""
    start, stop = runs.span(rank)
    return filled_up(pe[..., start:stop, :, :], stop - start, pe.ndim - 3)


def dealt_velocity(
    spread: SpreadTransformer,
    img: mx.array,
    txt: mx.array,
    pe: mx.array,
    final: mx.array,
    first: Callable[[Streams, RingAttention], Streams],
    rest: Callable[[Streams, RingAttention], mx.array],
    cache: StepCache | None,
) -> mx.array:
    """The velocity of all image tokens, each rank computing its own tokens.

    `first` runs the first double block, `rest` what it gives through all others, to [B, C, D];
    `final` modulates the last layer. Other arguments and the result as a transformer's call.
    """
    flux, ranks = spread.flux, spread.ranks
    L, S = txt.shape[1], txt.shape[1] + img.shape[1]
    runs = spread.runs(S)
    start, stop = runs.span(ranks.rank)
    txt = txt[:, start:stop]
    img = img[:, max(start - L, 0) : max(stop - L, 0)]
    img = filled_up(img, stop - start - txt.shape[1], 1)

    entered: Streams = {}  # without one that has no token on this rank
    if txt.shape[1]:
        entered["txt"] = flux.tokens_of(txt, flux.txt_in)
    if img.shape[1]:
        entered["img"] = flux.tokens_of(img, flux.img_in)
    attend = RingAttention(ranks, runs, pe)
    streams = first(entered, attend)
    others = functools.partial(rest, streams, attend)
    if cache is None:
        x = others()
    else:
        tokens = joined_tokens(streams)
        added = (tokens - joined_tokens(entered))[:, txt.shape[1] :]
        own_img = max(0, min(stop, S) - max(start, L))  # without what fills up
        x = cache.rest(added[:, :own_img], tokens, others)
    own = flux.final_layer(x, final)  # [B, C, out_channels], text's as well
    own = filled_up(own.swapaxes(0, 1), runs.longest, 0)
    every = ranks.gather(mx.contiguous(own))  # [N * longest, B, out_channels]
    return _joined(every, runs)[L:S].swapaxes(0, 1)


def summed(ranks: Ranks, *calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
    """Every rank's parts of a block's outputs [B, S, D], added up in one sum; then biases."""
    parts = [layer(x) for layer, x in calls]
    ends = np.cumsum([part.shape[1] for part in parts])[:-1].tolist()
    total = ranks.sum(mx.concatenate(parts, axis=1))
    totals = mx.split(total, ends, axis=1) if ends else [total]
    return [_with_bias(whole, layer) for whole, (layer, _) in zip(totals, calls, strict=True)]


def _with_bias(total: mx.array, layer: Any) -> mx.array:
    """Adds what a linear that is cut along its inputs has left out of its part of the sum."""
    linear = innermost(layer)
    return total + linear.sum_bias if "sum_bias" in linear else total


def joined_tokens(streams: Streams) -> mx.array:
    """All of this rank's tokens [B, C, D], text first."""
    return mx.concatenate(list(streams.values()), axis=1)


def _joined(every: mx.array, runs: TokenRuns) -> mx.array:
    """All ranks' tokens of a gather [N * longest, ...] without what fills up: [S, ...]."""
    if runs.are_equal:
        return every[: runs.tokens]
    starts = [rank * runs.longest for rank in range(len(runs.counts))]
    return mx.concatenate(
        [every[start : start + own] for start, own in zip(starts, runs.own, strict=True)]
    )


def filled_up(x: mx.array, length: int, axis: int) -> mx.array:
    """`x` with zeros after it, up to `length` along `axis`."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis=axis)


class RingAttention:
    """Attention of this rank's C queries to all S tokens: B images, H heads of hd channels."""

    def __init__(self, ranks: Ranks, runs: TokenRuns, pe: mx.array) -> None:
        self.ranks, self.runs, self.pe = ranks, runs, pe

    def send(self, streams: list[Stream], heads: int) -> tuple[mx.array, Pending]:
        """Starts on its way what other ranks need: this rank's keys, normed and turned, and values.

        Returns what is sent, for `mx.depends`: what is computed from there on is computed after
        it, while it travels; and what gives every rank's, [N * longest, B, 2, H, hd].
        """
        sent = turned(streams, self.pe, heads, 2)  # [B, C, 2, H, hd]
        sent = filled_up(sent.swapaxes(0, 1), self.runs.longest, 0)  # tokens first
        sent = mx.contiguous(sent)
        return sent, self.ranks.begin_gather(sent)

    def __call__(
        self, streams: list[Stream], heads: int, pending: Pending, *meanwhile: mx.array
    ) -> mx.array:
        """This rank's queries [B, C, H * hd] and what all ranks send, to [B, C, H * hd].

        Queries, and `meanwhile`, may be computed while it travels.
        """
        q = self.queries(streams, heads)
        k, v = self.keys_values(pending, q, *meanwhile)
        return attention(q, k, v)

    def queries(self, streams: list[Stream], heads: int) -> mx.array:
        """This rank's, normed and turned: [B, H, C, hd]."""
        (q,) = turned_heads(streams, self.pe, heads, 1)
        return q

    def keys_values(self, pending: Pending, *meanwhile: mx.array) -> tuple[mx.array, mx.array]:
        """Those of all ranks' tokens, [B, H, S, hd] each; `meanwhile` is wanted too."""
        every = pending.result(*meanwhile)
        k, v = _joined(every, self.runs).transpose(2, 1, 3, 0, 4)
        return k, v


def output_rows(linear: Any, start: int, stop: int, width: int) -> Any:
    """A linear of `width` outputs that gives those from `start` to `stop`; shares its weights."""
    return cut_linear(linear, Cut(0, ((start, stop),), width), copy=False)


class Projections:
    """A fused linear's keys and values, and its queries, apart."""

    def __init__(self, linear: Any, norm: QKNorm, dim: int, width: int) -> None:
        self.q = output_rows(linear, 0, dim, width)
        self.kv = output_rows(linear, dim, 3 * dim, width)
        self.query_scale, self.key_scale = norm.scales
        self.heads = dim // self.query_scale.shape[0]

    @property
    def linears(self) -> list[nn.Module]:
        return [self.q, self.kv]

    def keys_values(self, x: mx.array) -> Stream:
        return self.kv(x), (self.key_scale,)

    def queries(self, x: mx.array) -> Stream:
        return self.q(x), (self.query_scale,)


class SequenceDoubleBlock:
    """A `DoubleBlock` on this rank's tokens of each stream that it has."""

    def __init__(self, block: DoubleBlock, dim: int) -> None:
        self.attn = {name: attn for name, (attn, _) in block.streams.items()}
        self.mlp = {name: mlp for name, (_, mlp) in block.streams.items()}
        self.project = {
            name: Projections(attn.qkv, attn.norm, dim, 3 * dim) for name, attn in self.attn.items()
        }
        self.heads = self.project["img"].heads

    @property
    def linears(self) -> list[nn.Module]:
        """Those that are parts of the block's."""
        return [linear for project in self.project.values() for linear in project.linears]

    def __call__(
        self,
        streams: Streams,
        attend: RingAttention,
        mods: Streams,
        memory: KeysValues | None = None,
    ) -> tuple[Streams, KeysValues]:
        """The streams as they leave the block, and all ranks' keys and values in it."""
        mod = {name: mx.split(mods[name], 6, axis=-1) for name in streams}
        normed = {
            name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in streams.items()
        }
        own = [self.project[name].keys_values(x) for name, x in normed.items()]
        sent, pending = attend.send(own, self.heads)
        queries = [self.project[name].queries(mx.depends(x, sent)) for name, x in normed.items()]
        q = attend.queries(queries, self.heads)
        every = KeysValues(*attend.keys_values(pending, q))
        attn = attention(q, *with_memory(every, memory))  # [B, C, D]

        out: Streams = {}
        start = 0
        for name, x in streams.items():
            _, _, gate1, shift2, scale2, gate2 = mod[name]
            part = attn[:, start : start + x.shape[1]]
            start += x.shape[1]
            x, hidden = gated_norm(x, gate1, self.attn[name].proj(part), shift2, scale2)
            out[name] = gated_sum(x, gate2, run(self.mlp[name], hidden))
        return out, every


class SequenceSingleBlock:
    """A `SingleBlock` on this rank's tokens."""

    def __init__(self, block: SingleBlock, dim: int, inner: int) -> None:
        """`inner` as the block's: columns of its MLP's way in."""
        self.block = block
        width = 3 * dim + inner
        self.project = Projections(block.linear1, block.norm, dim, width)
        self.mlp_in = output_rows(block.linear1, 3 * dim, width, width)

    @property
    def linears(self) -> list[nn.Module]:
        """Those that are parts of the block's."""
        return [*self.project.linears, self.mlp_in]

    def __call__(
        self, x: mx.array, attend: RingAttention, mod: mx.array, memory: KeysValues | None = None
    ) -> tuple[mx.array, KeysValues]:
        """This rank's tokens as they leave the block, and all ranks' keys and values in it."""
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        normed = modulated_norm(x, shift, scale)
        heads = self.project.heads
        sent, pending = attend.send([self.project.keys_values(normed)], heads)
        normed = mx.depends(normed, sent)
        q, mlp = attend.queries([self.project.queries(normed)], heads), self.mlp_in(normed)
        every = KeysValues(*attend.keys_values(pending, q, mlp))
        attn = attention(q, *with_memory(every, memory))
        return gated_sum(x, gate, self.block.linear2(self.block.beside(attn, mlp, 0))), every
