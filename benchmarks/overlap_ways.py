"""Ways to order what the blocks of `sequence` and `tensor` compute and send, for `overlap.py`.

Experiments: each gives what the tree's own placement does, and only orders or cuts it differently,
so that a collective may travel behind work that doesn't need it. Random plain weights alone.

What decides the order on CUDA, as MLX's source has it (0.32): NCCL's kernels run on the stream that
computes, as nodes of one CUDA graph of up to 100 operations. In a graph nothing but data orders two
nodes, so that `mx.depends`, which costs nothing there, orders none: it only says in which order
nodes are put into the graph, which otherwise is by their distance to the result. With a stream of
their own and one evaluation for all, the host waits wherever one stream needs the other; what was
evaluated before (`mx.async_eval`) is waited for by the streams themselves. `edge` is an order that
a graph keeps: a copy, of a bias mostly, by a kernel that also takes what is to be done before.

Shapes as in `models/spread.py`; shares are even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels.cuda_transformer import kernel_of
from fluxmesh.kernels.ops import (
    device,
    gated_norm,
    gated_sum,
    gelu_beside,
    modulated_norm,
    swiglu_beside,
    turned,
    turned_heads,
)
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.layers import attention, run
from fluxmesh.models.partition import Cut
from fluxmesh.models.slicing import cut_linear
from fluxmesh.models.spread import RingAttention, Streams, dealt_velocity, joined_tokens
from fluxmesh.models.waiting import InGraph

Tie = Callable[..., mx.array]  # of a linear, its input, and what is to be computed before it

EDGE = """
  const long i = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i < SIZE) {
    *reinterpret_cast<Pack<T>*>(out + i) = *reinterpret_cast<const Pack<T>*>(x + i);
  }
"""


def edge(x: mx.array, *before: mx.array, stream: Any = None) -> mx.array:
    """A copy of x that is made when `before` is there, which a CUDA graph knows too."""
    if device() != "cuda":
        return mx.contiguous(mx.depends(x, list(before)), stream=stream)
    names = ("x", *(f"before{i}" for i in range(len(before))))
    kernel = kernel_of(f"edge{len(before)}", names, ("out",), EDGE)
    (out,) = kernel(
        inputs=[x, *before],
        template=[("T", x.dtype), ("SIZE", x.size)],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(-(-x.size // 8), 1, 1),
        threadgroup=(128, 1, 1),
        stream=stream,
    )
    return cast(mx.array, out)


def in_order(linear: Any, x: mx.array, *before: mx.array) -> mx.array:
    """A linear's product, put into the graph after `before`."""
    return cast(mx.array, linear(mx.depends(x, list(before))))


def by_four_edges(linear: Any, x: mx.array, *before: mx.array) -> mx.array:
    """As `by_edge`, some microseconds later: what else waits for `before` has begun by then."""
    marker = mx.zeros((8,), mx.bfloat16)
    for _ in range(3):
        marker = edge(marker, *before)
        before = (marker,)
    return by_edge(linear, x, marker)


def by_edge(linear: Any, x: mx.array, *before: mx.array) -> mx.array:
    """A linear's product, computed after `before`: its bias comes no earlier."""
    weight = linear.weight
    bias = linear.bias if "bias" in linear else mx.zeros(weight.shape[0], weight.dtype)
    return mx.addmm(edge(bias, *before), mx.depends(x, list(before)), weight.T)


# Who waits, and on which stream


class OnOwnStream(InGraph):
    """Each collective is evaluated at once; streams wait for one another, the host for none."""

    def __init__(self, stream: Any) -> None:
        """`stream` carries the collectives, and what is to come just before each."""
        self._stream = stream
        self.starting: mx.array | None = None  # there when the last collective may begin

    def after(self, last: mx.array, x: mx.array) -> mx.array:
        mx.async_eval(x)  # so that the stream of collectives waits for an event, and not the host
        self.starting = edge(mx.zeros((8,), mx.bfloat16), x, stream=self._stream)
        mx.async_eval(self.starting)
        return x

    def begin(self, result: mx.array) -> None:
        mx.async_eval(result)

    def end(self, result: mx.array, meanwhile: Sequence[mx.array]) -> None:
        if meanwhile:
            mx.async_eval(*meanwhile)


class OwnRanks(Ranks):
    """A group whose collectives have a stream of their own, or that of the device for None."""

    def __init__(self, group: Any, stream: Any) -> None:
        self.waiting = OnOwnStream(stream)
        super().__init__(group, stream, self.waiting)


def starting(ranks: Ranks, sent: mx.array) -> mx.array:
    """What is there when the gather of `sent`, just begun, can start, and no earlier."""
    marker = ranks.waiting.starting if isinstance(ranks, OwnRanks) else None
    return sent if marker is None else marker


class NoGroup:
    """A group of which only this member is there."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class LoneRank(Ranks):
    """A rank without a link: what it sends comes back at once. What it computes is no picture."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(NoGroup(rank, size), waiting=InGraph())

    def sum(self, x: mx.array) -> mx.array:
        return x

    def begin_gather(self, x: mx.array) -> Pending:
        return self._begun(mx.concatenate([x] * self.size))


# Ways for `sequence`


class OverlapWay:
    """How the tree does it."""

    def __init__(self, flux: Any) -> None:
        self.is_flux2 = isinstance(flux, Flux2)

    def beside(self, attn: mx.array, mlp: mx.array, start: int) -> mx.array:
        """The activation of the MLP's columns beside attention."""
        return (swiglu_beside if self.is_flux2 else gelu_beside)(attn, mlp, start)

    def doubles(
        self,
        blocks: Sequence[Any],
        streams: Streams,
        attend: RingAttention,
        mods: Iterator[Streams],
    ) -> Streams:
        """Some double blocks, one after another."""
        for block, mod in zip(blocks, mods, strict=False):
            streams = self.double(block, streams, attend, mod)
        return streams

    def double(self, block: Any, streams: Streams, attend: RingAttention, mods: Streams) -> Streams:
        if self.is_flux2:
            return cast(Streams, block(streams, attend, mods, None)[0])
        return cast(Streams, block(streams, attend, mods))

    def single(self, block: Any, x: mx.array, attend: RingAttention, mod: mx.array) -> mx.array:
        if self.is_flux2:
            return cast(mx.array, block(x, attend, mod, None)[0])
        return cast(mx.array, block(x, attend, mod))


class Ordered(OverlapWay):
    """Queries and MLP are tied to what is sent, and attention comes after the MLP's way in."""

    tie: Tie = staticmethod(in_order)

    def double(self, block: Any, streams: Streams, attend: RingAttention, mods: Streams) -> Streams:
        mod = {name: mx.split(mods[name], 6, axis=-1) for name in streams}
        normed = {
            name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in streams.items()
        }
        q, every = self.queries_and_rest(block, normed, attend)
        attn = attention(q, *every)
        return self.after_attention(block, streams, mod, attn)

    def queries_and_rest(
        self, block: Any, normed: Streams, attend: RingAttention
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """This rank's queries, and the keys and values of all."""
        keys_values = [block.project[name].keys_values(x) for name, x in normed.items()]
        sent, pending = attend.send(keys_values, block.heads)
        sent = starting(attend.ranks, sent)
        q = [
            (self.tie(block.project[name].q, x, sent), (block.project[name].query_scale,))
            for name, x in normed.items()
        ]
        queries = attend.queries(q, block.heads)
        return queries, attend.keys_values(pending, queries)

    @staticmethod
    def after_attention(
        block: Any, streams: Streams, mod: dict[str, list[mx.array]], attn: mx.array
    ) -> Streams:
        out: Streams = {}
        start = 0
        for name, x in streams.items():
            _, _, gate1, shift2, scale2, gate2 = mod[name]
            own = attn[:, start : start + x.shape[1]]
            start += x.shape[1]
            x, hidden = gated_norm(x, gate1, block.attn[name].proj(own), shift2, scale2)
            out[name] = gated_sum(x, gate2, run(block.mlp[name], hidden))
        return out

    def single(self, block: Any, x: mx.array, attend: RingAttention, mod: mx.array) -> mx.array:
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        normed = modulated_norm(x, shift, scale)
        project = block.project
        sent, pending = attend.send([project.keys_values(normed)], project.heads)
        q, mlp = self.queries_and_mlp(block, normed, starting(attend.ranks, sent))
        queries = attend.queries([(q, (project.query_scale,))], project.heads)
        k, v = later(attend, pending, mlp)
        hidden = self.beside(attention(queries, k, v), mlp, self.mlp_start(block))
        return gated_sum(x, gate, block.block.linear2(hidden))

    def queries_and_mlp(
        self, block: Any, normed: mx.array, sent: mx.array
    ) -> tuple[mx.array, mx.array]:
        q = self.tie(block.project.q, normed, sent)
        return q, self.tie(block.mlp_in, normed, q)

    def mlp_start(self, block: Any) -> int:
        """The first column of the MLP in what `queries_and_mlp` gives."""
        return 0


def later(attend: RingAttention, pending: Pending, *work: mx.array) -> tuple[mx.array, mx.array]:
    """All ranks' keys and values [B, H, S, hd]; attention is put into the graph after `work`."""
    every = pending.result(*work)
    if work:
        every = mx.depends(every, list(work))
    k, v = every[: attend.runs.tokens].transpose(2, 1, 3, 0, 4)
    return k, v


class Edges(Ordered):
    """The same, where a CUDA graph keeps the order too: gather, then queries, then MLP."""

    tie = staticmethod(by_edge)


class Abreast(Edges):
    """Gather, then queries and the MLP's way in at once: kernels that find no room don't wait in
    line behind one whose last part the gather keeps from running.
    """

    def queries_and_mlp(
        self, block: Any, normed: mx.array, sent: mx.array
    ) -> tuple[mx.array, mx.array]:
        return self.tie(block.project.q, normed, sent), self.tie(block.mlp_in, normed, sent)


class Together(Edges):
    """Queries and the MLP's way in by one product, of weights that are copied for it."""

    def __init__(self, flux: Any) -> None:
        super().__init__(flux)
        self._joined: dict[int, Any] = {}
        D = flux.config.hidden_size
        for single in flux.single_blocks:
            width = single.linear1.weight.shape[0]
            cut = cut_linear(single.linear1, Cut(0, ((0, D), (3 * D, width)), width))
            mx.eval(cut.parameters())
            self._joined[id(single)] = cut

    def queries_and_mlp(
        self, block: Any, normed: mx.array, sent: mx.array
    ) -> tuple[mx.array, mx.array]:
        joined = self.tie(self._joined[id(block.block)], normed, sent)
        return joined, joined

    def mlp_start(self, block: Any) -> int:
        return cast(int, block.project.q.weight.shape[0])


class TogetherLater(Together):
    """The same, some microseconds later."""

    tie = staticmethod(by_four_edges)


class HeadGroups(Ordered):
    """Keys and values of half of the heads at a time: attention of some while others travel."""

    tie = staticmethod(by_edge)
    GROUPS = 2

    def __init__(self, flux: Any) -> None:
        super().__init__(flux)
        self._halves: dict[int, list[Any]] = {}
        D, hd = flux.config.hidden_size, flux.config.head_dim
        groups = self.GROUPS if flux.config.num_heads % self.GROUPS == 0 else 1
        part = flux.config.num_heads // groups * hd
        for block in (*flux.double_blocks, *flux.single_blocks):
            single = hasattr(block, "linear1")
            attns = [block] if single else [block.img_attn, block.txt_attn]
            for attn in attns:
                linear = attn.linear1 if single else attn.qkv
                width = linear.weight.shape[0]
                halves = []
                for start in range(0, D, part):
                    spans = tuple((at + start, at + start + part) for at in (D, 2 * D))
                    halves.append(cut_linear(linear, Cut(0, spans, width)))
                mx.eval([half.parameters() for half in halves])
                self._halves[id(attn)] = halves

    def _sent(
        self,
        attns: list[Any],
        normed: list[mx.array],
        scales: list[mx.array],
        attend: RingAttention,
    ) -> list[tuple[mx.array, Pending]]:
        """What is sent of each group of heads, one after another, and what comes of it."""
        begun: list[tuple[mx.array, Pending]] = []
        for group in range(len(self._halves[id(attns[0])])):
            streams = []
            for attn, x, scale in zip(attns, normed, scales, strict=True):
                linear = self._halves[id(attn)][group]
                if begun:  # one communicator carries one gather at a time
                    scale = edge(scale, begun[-1][1].result())
                streams.append((linear(x), (scale,)))
            heads = streams[0][0].shape[-1] // (2 * scales[0].shape[0])
            sent = mx.contiguous(turned(streams, attend.pe, heads, 2).swapaxes(0, 1))
            begun.append((sent, attend.ranks.begin_gather(sent)))
        return begun

    @staticmethod
    def _attended(
        queries: mx.array, begun: list[tuple[mx.array, Pending]], attend: RingAttention, *work: Any
    ) -> mx.array:
        parts, start = [], 0
        for _, pending in begun:
            k, v = later(attend, pending, *work)
            parts.append(attention(queries[:, start : start + k.shape[1]], k, v))
            start += k.shape[1]
        return mx.concatenate(parts, axis=-1)

    def double(self, block: Any, streams: Streams, attend: RingAttention, mods: Streams) -> Streams:
        mod = {name: mx.split(mods[name], 6, axis=-1) for name in streams}
        normed = {
            name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in streams.items()
        }
        attns = [block.attn[name] for name in normed]
        scales = [block.project[name].key_scale for name in normed]
        begun = self._sent(attns, list(normed.values()), scales, attend)
        q = [
            (self.tie(block.project[name].q, x, begun[0][0]), (block.project[name].query_scale,))
            for name, x in normed.items()
        ]
        queries = attend.queries(q, block.heads)
        return self.after_attention(block, streams, mod, self._attended(queries, begun, attend))

    def single(self, block: Any, x: mx.array, attend: RingAttention, mod: mx.array) -> mx.array:
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        normed = modulated_norm(x, shift, scale)
        project = block.project
        begun = self._sent([block.block], [normed], [project.key_scale], attend)
        q, mlp = self.queries_and_mlp(block, normed, begun[0][0])
        queries = attend.queries([(q, (project.query_scale,))], project.heads)
        attn = self._attended(queries, begun, attend, q)
        return gated_sum(x, gate, block.block.linear2(self.beside(attn, mlp, 0)))


class Sent(NamedTuple):
    """Of a part of this rank's rows, on its way into a block's attention."""

    sent: mx.array  # its keys and values, rows first
    every: mx.array  # those of all ranks
    queries: mx.array  # [B, H, rows, hd]


class RowHalves(Together):
    """Double blocks: a first part of the rows passes the MLP and sends its keys while others do."""

    FIRST = 0.625  # of a rank's rows

    def doubles(
        self,
        blocks: Sequence[Any],
        streams: Streams,
        attend: RingAttention,
        mods: Iterator[Streams],
    ) -> Streams:
        C = joined_tokens(streams).shape[1]
        ends = [0, int(self.FIRST * C), C] if C > 2 else [0, C]
        spans = list(zip(ends, ends[1:], strict=False))
        parts = [rows_of(streams, start, stop) for start, stop in spans]
        pes = [attend.pe[..., start:stop, :, :] for start, stop in spans]
        split = [
            {name: mx.split(mod[name], 6, axis=-1) for name in streams}
            for mod, _ in zip(mods, blocks, strict=False)
        ]
        on_their_way: list[Sent] = []
        for part, pe in zip(parts, pes, strict=True):
            on_their_way.append(self._sent(blocks[0], part, pe, attend, split[0], on_their_way))
        for i, block in enumerate(blocks):
            k, v = trimmed([sent.every for sent in on_their_way], attend)
            attns = [attention(sent.queries, k, v) for sent in on_their_way]
            on_their_way = []
            for j, (attn, pe) in enumerate(zip(attns, pes, strict=True)):
                before = [sent.sent for sent in on_their_way[-1:]]
                parts[j] = self._left(block, parts[j], split[i], attn, before)
                if i + 1 < len(blocks):
                    on_their_way.append(
                        self._sent(blocks[i + 1], parts[j], pe, attend, split[i + 1], on_their_way)
                    )
        return {
            name: mx.concatenate([part[name] for part in parts if name in part], axis=1)
            for name in streams
        }

    def _sent(
        self,
        block: Any,
        part: Streams,
        pe: mx.array,
        attend: RingAttention,
        mod: dict[str, list[mx.array]],
        before: list[Sent],
    ) -> Sent:
        """A part's way into a block; one communicator carries one gather at a time."""
        normed = {name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in part.items()}
        keys = []
        for name, x in normed.items():
            scale = block.project[name].key_scale
            if before:
                scale = edge(scale, before[-1].every)
            keys.append((block.project[name].kv(x), (scale,)))
        sent = mx.contiguous(turned(keys, pe, block.heads, 2).swapaxes(0, 1))
        every = attend.ranks.begin_gather(sent).result()
        q = [
            (self.tie(block.project[name].q, x, sent), (block.project[name].query_scale,))
            for name, x in normed.items()
        ]
        (queries,) = turned_heads(q, pe, block.heads, 1)
        return Sent(sent, every, queries)

    def _left(
        self,
        block: Any,
        part: Streams,
        mod: dict[str, list[mx.array]],
        attn: mx.array,
        before: list[mx.array],
    ) -> Streams:
        """A part's way out of a block, after `before`."""
        out: Streams = {}
        start = 0
        for name, x in part.items():
            _, _, gate1, shift2, scale2, gate2 = mod[name]
            own = attn[:, start : start + x.shape[1]]
            start += x.shape[1]
            proj = block.attn[name].proj
            y = self.tie(proj, own, *before) if before else proj(own)
            x, hidden = gated_norm(x, gate1, y, shift2, scale2)
            out[name] = gated_sum(x, gate2, run(block.mlp[name], hidden))
        return out


def rows_of(streams: Streams, start: int, stop: int) -> Streams:
    """Those of all streams' tokens, counted through, without a stream that has none there."""
    part: Streams = {}
    at = 0
    for name, x in streams.items():
        own = x[:, max(start - at, 0) : max(stop - at, 0)]
        at += x.shape[1]
        if own.shape[1]:
            part[name] = own
    return part


def trimmed(every: list[mx.array], attend: RingAttention) -> tuple[mx.array, mx.array]:
    """Keys and values of what all ranks sent, part after part: without what fills up.

    The order of keys doesn't matter. What fills up are the last rows of all, which are at the end
    of the last ranks' rows.
    """
    N, S = attend.ranks.size, attend.runs.tokens
    lengths = [part.shape[0] // N for part in every]
    kept = every
    if N * sum(lengths) > S:
        kept, before = [], 0
        for part, rows in zip(every, lengths, strict=True):
            starts = [rank * sum(lengths) + before for rank in range(N)]
            there = [min(max(S - start, 0), rows) for start in starts]
            kept += [part[r * rows : r * rows + n] for r, n in enumerate(there) if n]
            before += rows
    k, v = mx.concatenate(kept).transpose(2, 1, 3, 0, 4)
    return k, v


def spread_by(way: type[OverlapWay], flux: Any, ranks: Ranks) -> Any:
    """`flux` as `sequence`, whose blocks go this way."""
    made = (_WayFlux2 if isinstance(flux, Flux2) else _WayFlux)(flux, ranks)
    made.way = way(flux)
    return made


class _WayFlux(SequenceFlux):
    way: OverlapWay

    def __call__(self, img: Any, txt: Any, pe: Any, modulation: Any, cache: Any = None) -> mx.array:
        def mods(first: int) -> Iterator[Streams]:
            return ({"txt": txt, "img": img} for img, txt in modulation.double[first:])

        return _velocity(self, img, txt, pe, modulation, mods, iter(modulation.single))


class _WayFlux2(SequenceFlux2):
    way: OverlapWay

    def __call__(
        self, img: Any, txt: Any, pe: Any, modulation: Any, cache: Any = None, memory: Any = None
    ) -> mx.array:
        def mods(first: int) -> Iterator[Streams]:
            own = {"txt": modulation.txt, "img": modulation.img}
            return (own for _ in self._doubles[first:])

        singles = (modulation.single for _ in self._singles)
        return _velocity(self, img, txt, pe, modulation, mods, singles)


def _velocity(
    flow: Any,
    img: mx.array,
    txt: mx.array,
    pe: mx.array,
    modulation: Any,
    mods: Callable[[int], Iterator[Streams]],
    singles: Iterator[mx.array],
) -> mx.array:
    way: OverlapWay = flow.way

    def first(streams: Streams, attend: RingAttention) -> Streams:
        return streams

    def rest(streams: Streams, attend: RingAttention) -> mx.array:
        x = joined_tokens(way.doubles(flow._doubles, streams, attend, mods(0)))
        for block, mod in zip(flow._singles, singles, strict=True):
            x = way.single(block, x, attend, mod)
        return x

    return dealt_velocity(flow, img, txt, pe, modulation.final, first, rest, None)


# Ways for `tensor`


def sharded(flux: Any, ranks: Ranks) -> Any:
    """`flux` as `tensor`, as the tree does it."""
    return (TensorFlux2 if isinstance(flux, Flux2) else TensorFlux)(flux, ranks)


def sharded_in_halves(flux: Any, ranks: Ranks) -> Any:
    """The same, where half of the rows are summed while the product of the others is computed."""
    flow = sharded(flux, ranks)
    before: list[mx.array] = []  # the last sum

    def outputs(*calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
        return summed_in_halves(ranks, before, *calls)

    for block in (*flow.flux.double_blocks, *flow.flux.single_blocks):
        block.outputs = outputs
    return flow


def summed_in_halves(
    ranks: Ranks, before: list[mx.array], *calls: tuple[Any, mx.array]
) -> list[mx.array]:
    """As `spread.summed`, in two sums: of two linears one each, of one half of its rows each.

    One communicator carries one sum at a time: each waits for the one before, which is kept in
    `before`, where it doesn't compute with it.
    """
    pieces = list(calls)
    if len(calls) == 1:
        ((layer, x),) = calls
        half = x.shape[1] // 2
        if half:
            pieces = [(layer, x[:, :half]), (layer, x[:, half:])]
        before.clear()  # attention has needed all tokens, and so all sums before
    totals: list[mx.array] = []
    for layer, x in pieces:
        part = layer(x)
        if before:
            part = edge(part, before.pop())
        totals.append(ranks.sum(part))
        before.append(totals[-1])
    for i, (layer, _) in enumerate(pieces):
        if "sum_bias" in layer:
            totals[i] = totals[i] + layer.sum_bias
    return totals if len(calls) > 1 else [mx.concatenate(totals, axis=1)]
