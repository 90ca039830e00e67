"""The transformer on N hosts at once, as `tensor` or `sequence`, by `collectives.py`.

Both wrap a `Flux` and are used as one (`rope`, `modulations`, a call a step), so that the sampler
doesn't know how many hosts take part. Every rank is given the same latents and prompt, makes the
same calls in the same order, and gets the whole velocity, equal to the byte on all ranks.

- `TensorFlux`: each host holds 1/N of the blocks and modulations (`partition.py`) and computes its
  heads and MLP columns of all tokens. The hosts' partial outputs are summed twice in a double
  block, text and image in one sum, and once in a single block; biases are added to the sum.
- `SequenceFlux`: each host holds all weights and computes all channels of its tokens. Each block
  gathers keys and values once; queries and the single block's MLP are computed meanwhile. Source:
  DeepSpeed-Ulysses and ring attention solve the same (https://arxiv.org/abs/2309.14509,
  https://arxiv.org/abs/2310.01889); one gather needs neither a transpose of ranks nor N rounds.

A group of one runs the same code.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.kernels.ops import (
    Stream,
    gated_norm,
    gated_sum,
    gelu_beside,
    modulated_norm,
    turned,
    turned_heads,
)
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.layers import (
    DoubleStreamBlock,
    QKNorm,
    SingleStreamBlock,
    attention,
    run,
)
from fluxmesh.models.flux1.slicing import cut_linear, shard_of
from fluxmesh.models.flux1.transformer import Flux, Modulations
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.partition import Cut, Shard, token_run
from fluxmesh.models.step_cache import StepCache

Streams = dict[str, mx.array]  # "txt" and "img", in this order


class SpreadFlux:
    """What both placements share: a `Flux` to everyone but its blocks."""

    def __init__(self, flux: Flux, ranks: Ranks) -> None:
        self.flux, self.ranks = flux, ranks

    @property
    def config(self) -> FluxConfig:
        return self.flux.config

    @property
    def dtype(self) -> mx.Dtype:
        return self.flux.dtype

    @property
    def modulation_released(self) -> bool:
        return self.flux.modulation_released

    def release_modulation(self) -> None:
        """As `Flux.release_modulation`."""
        self.flux.release_modulation()

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables for this rank's calls, as `Flux.rope` makes them."""
        return self.flux.rope(txt_ids, img_ids)

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None = None
    ) -> Modulations:
        """As `Flux.modulations`, whole on every rank."""
        return self.flux.modulations(timesteps, y, guidance)


class TensorFlux(SpreadFlux):
    """Each rank computes 1/N of the heads and MLP columns, for all tokens."""

    def __init__(self, flux: Flux, ranks: Ranks) -> None:
        """`flux` is whole, and then left as it is, or this rank's shard of a checkpoint.

        Raises `UsageError` where it is another shard, or doesn't divide over the ranks.
        """
        if flux.shard == Shard():
            flux = shard_of(flux, ranks.shard)
        elif flux.shard != ranks.shard:
            raise UsageError(
                f"Part {flux.shard.rank} of {flux.shard.size} of the transformer was loaded where "
                f"rank {ranks.rank} of {ranks.size} runs; load the model again."
            )
        super().__init__(flux, ranks)
        outputs = functools.partial(_summed, ranks)  # not a method: a cycle would keep the weights
        for double in flux.double_blocks:
            double.outputs = outputs
        for single in flux.single_blocks:
            single.outputs = outputs

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None = None
    ) -> Modulations:
        """As `Flux.modulations`: each rank computes 1/N of them, and one gather joins all."""
        part = self.flux.modulations(timesteps, y, guidance)
        pieces = [*(mod for pair in part.double for mod in pair), *part.single, part.final]
        ends = np.cumsum([piece.shape[-1] for piece in pieces])[:-1].tolist()
        joined = mx.concatenate(pieces, axis=-1)  # [T, B, 1, all / N]
        every = self.ranks.gather(joined[None])  # [N, T, B, 1, all / N]
        whole = [mx.moveaxis(piece, 0, -2).flatten(-2) for piece in mx.split(every, ends, axis=-1)]
        pairs = 2 * len(part.double)
        return Modulations(
            double=list(zip(whole[:pairs:2], whole[1:pairs:2], strict=True)),
            single=whole[pairs:-1],
            final=whole[-1],
        )

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Modulations,
        cache: StepCache | None = None,
    ) -> mx.array:
        """The velocity of all image tokens; arguments and result as `Flux.__call__`."""
        return self.flux(img, txt, pe, modulation, cache)


def _summed(ranks: Ranks, *calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
    """Every rank's parts of a block's outputs [B, S, D], added up in one sum; then biases."""
    parts = [layer(x) for layer, x in calls]
    ends = np.cumsum([part.shape[1] for part in parts])[:-1].tolist()
    total = ranks.sum(mx.concatenate(parts, axis=1))
    totals = mx.split(total, ends, axis=1) if ends else [total]
    return [_with_bias(whole, layer) for whole, (layer, _) in zip(totals, calls, strict=True)]


def _with_bias(total: mx.array, layer: Any) -> mx.array:
    """Adds what a linear that is cut along its inputs has left out of its part of the sum."""
    linear = layer.linear if isinstance(layer, LoRALinear) else layer
    return total + linear.sum_bias if "sum_bias" in linear else total


class SequenceFlux(SpreadFlux):
    """Each rank computes ceil(S / N) of the S tokens, with all weights.

    Tokens are counted through text and image, in this order, and dealt out in runs of ceil(S / N):
    text and image tokens cost the same, so that the ranks share evenly whatever the length of the
    prompt, and only the rank where text meets image reads the double blocks' weights of both.
    After the last token the last runs are filled up with zeros, which every rank computes like
    tokens, so that shapes are equal; their keys and values are cut off after each gather.
    """

    def __init__(self, flux: Flux, ranks: Ranks) -> None:
        """Shares the weights of `flux`, which stays as it is. Make it anew after adapters change.

        Raises `UsageError` where `flux` is a shard.
        """
        if flux.shard != Shard():
            raise UsageError(
                "A shard of the transformer can't run the sequence placement, which needs all "
                "weights on every host; load the whole model, or use `placement` tensor."
            )
        super().__init__(flux, ranks)
        D, M = flux.config.hidden_size, flux.config.mlp_hidden_dim
        self._doubles = [_DoubleBlock(block, D) for block in flux.double_blocks]
        self._singles = [_SingleBlock(block, D, M) for block in flux.single_blocks]

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables of this rank's tokens, float32 [(B,) 1, ceil(S/N), hd/2, 2]."""
        pe = self.flux.rope(txt_ids, img_ids)
        start, stop = token_run(pe.shape[-3], self.ranks.rank, self.ranks.size)
        return _filled(pe[..., start:stop, :, :], stop - start, pe.ndim - 3)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Modulations,
        cache: StepCache | None = None,
    ) -> mx.array:
        """The velocity of all image tokens; arguments and result as `Flux.__call__`."""
        L, S = txt.shape[1], txt.shape[1] + img.shape[1]
        start, stop = token_run(S, self.ranks.rank, self.ranks.size)
        txt = txt[:, start:stop]
        img = img[:, max(start - L, 0) : max(stop - L, 0)]
        img = _filled(img, stop - start - txt.shape[1], 1)

        streams: Streams = {}  # without one that has no token on this rank
        if txt.shape[1]:
            streams["txt"] = self.flux.tokens_of(txt, self.flux.txt_in)
        if img.shape[1]:
            streams["img"] = self.flux.tokens_of(img, self.flux.img_in)
        attend = _Attend(self.ranks, S, pe)
        entered = streams
        img_mod, txt_mod = modulation.double[0]
        streams = self._doubles[0](streams, attend, {"txt": txt_mod, "img": img_mod})
        rest = functools.partial(self._rest, streams, attend, modulation)
        if cache is None:
            x = rest()
        else:
            tokens = _joined(streams)
            added = (tokens - _joined(entered))[:, txt.shape[1] :]
            own_img = max(0, min(stop, S) - max(start, L))  # without what fills up
            x = cache.rest(added[:, :own_img], tokens, rest)
        own = self.flux.final_layer(x, modulation.final)  # [B, C, out_channels], text's as well
        every = self.ranks.gather(mx.contiguous(own.swapaxes(0, 1)))  # [N * C, B, out_channels]
        return every[L:S].swapaxes(0, 1)

    def _rest(self, streams: Streams, attend: _Attend, modulation: Modulations) -> mx.array:
        """What the first double block gives, through all others: this rank's [B, C, D]."""
        doubles = zip(self._doubles[1:], modulation.double[1:], strict=True)
        for double, (img_mod, txt_mod) in doubles:
            streams = double(streams, attend, {"txt": txt_mod, "img": img_mod})
        x = _joined(streams)
        for single, mod in zip(self._singles, modulation.single, strict=True):
            x = single(x, attend, mod)
        return x


def _joined(streams: Streams) -> mx.array:
    """All of this rank's tokens [B, C, D], text first."""
    return mx.concatenate(list(streams.values()), axis=1)


def _filled(x: mx.array, length: int, axis: int) -> mx.array:
    """`x` with zeros after it, up to `length` along `axis`."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis=axis)


class _Attend:
    """Attention of this rank's C queries to all S tokens: B images, H heads of hd channels."""

    def __init__(self, ranks: Ranks, S: int, pe: mx.array) -> None:
        self.ranks, self.S, self.pe = ranks, S, pe

    def send(self, streams: list[Stream], heads: int) -> tuple[mx.array, Pending]:
        """Starts on its way what other ranks need: this rank's keys, normed and turned, and values.

        Returns what is sent, for `mx.depends`: what is computed from there on is computed after
        it, while it travels; and what gives every rank's, [N * C, B, 2, H, hd].
        """
        sent = turned(streams, self.pe, heads, 2)  # [B, C, 2, H, hd]
        sent = mx.contiguous(sent.swapaxes(0, 1))  # tokens first
        return sent, self.ranks.begin_gather(sent)

    def __call__(
        self, streams: list[Stream], heads: int, pending: Pending, *meanwhile: mx.array
    ) -> mx.array:
        """This rank's queries [B, C, H * hd] and what all ranks send, to [B, C, H * hd].

        Queries, and `meanwhile`, may be computed while it travels.
        """
        (q,) = turned_heads(streams, self.pe, heads, 1)
        every = pending.result(q, *meanwhile)
        k, v = every[: self.S].transpose(2, 1, 3, 0, 4)  # [B, H, S, hd] each
        return attention(q, k, v)


def _rows(linear: Any, start: int, stop: int, width: int) -> Any:
    """A linear of `width` outputs that gives those from `start` to `stop`; shares its weights."""
    return cut_linear(linear, Cut(0, ((start, stop),), width), copy=False)


class _Projections:
    """A fused linear's keys and values, and its queries, apart."""

    def __init__(self, linear: Any, norm: QKNorm, dim: int, width: int) -> None:
        self.q = _rows(linear, 0, dim, width)
        self.kv = _rows(linear, dim, 3 * dim, width)
        self.query_scale, self.key_scale = norm.scales
        self.heads = dim // self.query_scale.shape[0]

    def keys_values(self, x: mx.array) -> Stream:
        return self.kv(x), (self.key_scale,)

    def queries(self, x: mx.array) -> Stream:
        return self.q(x), (self.query_scale,)


class _DoubleBlock:
    """`layers.DoubleStreamBlock` on this rank's tokens of each stream that it has."""

    def __init__(self, block: DoubleStreamBlock, dim: int) -> None:
        self.attn = {"txt": block.txt_attn, "img": block.img_attn}
        self.mlp = {"txt": block.txt_mlp, "img": block.img_mlp}
        self.project = {
            name: _Projections(attn.qkv, attn.norm, dim, 3 * dim)
            for name, attn in self.attn.items()
        }
        self.heads = self.project["img"].heads

    def __call__(self, streams: Streams, attend: _Attend, mods: Streams) -> Streams:
        mod = {name: mx.split(mods[name], 6, axis=-1) for name in streams}
        normed = {
            name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in streams.items()
        }
        keys_values = [self.project[name].keys_values(x) for name, x in normed.items()]
        sent, pending = attend.send(keys_values, self.heads)
        q = [self.project[name].queries(mx.depends(x, sent)) for name, x in normed.items()]
        attn = attend(q, self.heads, pending)  # [B, C, D]

        out: Streams = {}
        start = 0
        for name, x in streams.items():
            _, _, gate1, shift2, scale2, gate2 = mod[name]
            own = attn[:, start : start + x.shape[1]]
            start += x.shape[1]
            x, hidden = gated_norm(x, gate1, self.attn[name].proj(own), shift2, scale2)
            out[name] = gated_sum(x, gate2, run(self.mlp[name], hidden))
        return out


class _SingleBlock:
    """`layers.SingleStreamBlock` on this rank's tokens."""

    def __init__(self, block: SingleStreamBlock, dim: int, mlp_hidden_dim: int) -> None:
        self.block = block
        width = 3 * dim + mlp_hidden_dim
        self.project = _Projections(block.linear1, block.norm, dim, width)
        self.mlp_in = _rows(block.linear1, 3 * dim, width, width)

    def __call__(self, x: mx.array, attend: _Attend, mod: mx.array) -> mx.array:
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        normed = modulated_norm(x, shift, scale)
        heads = self.project.heads
        sent, pending = attend.send([self.project.keys_values(normed)], heads)
        normed = mx.depends(normed, sent)
        q, mlp = self.project.queries(normed), self.mlp_in(normed)
        hidden = gelu_beside(attend([q], heads, pending, mlp), mlp, 0)
        return gated_sum(x, gate, self.block.linear2(hidden))
