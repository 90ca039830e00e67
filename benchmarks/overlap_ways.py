"""The ways of `overlap.py`: what the blocks of `sequence` and `tensor` send, and when.

    "tree"           `sequence` as it is
    "edges"          what can be computed while keys and values travel begins after their gather
    "together"       edges; a single block's queries and the MLP's way in are one product
    "own stream"     edges; collectives have a stream of their own
    "tensor"         `tensor` as it is
    "tensor, halves" half of the rows are summed while the product of the others is computed
    "peer memory", "peer memory, edges", "peer memory, tensor"
                     the tree, edges and tensor with the collectives of `peer_memory.py`

Experiments, none of them shown to be faster: each gives what the tree's own placement does and only
orders or cuts it differently, so that a collective may travel behind work that doesn't need it.
What decides the order on CUDA, as MLX's source has it (0.32): NCCL's kernels run on the stream that
computes, as nodes of one CUDA graph of up to 100 operations, in which nothing but data orders two
nodes. `mx.depends` costs nothing there and orders none. `edge` is an order that a graph keeps.

Random plain weights alone, even shares. Shapes as in `models/spread.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from benchmarks.peer_memory import PeerRanks, check
from fluxmesh.kernels.cuda_transformer import kernel_of
from fluxmesh.kernels.ops import (
    device,
    gated_norm,
    gated_sum,
    modulated_norm,
)
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.layers import attention, run
from fluxmesh.models.partition import Cut
from fluxmesh.models.slicing import cut_linear
from fluxmesh.models.spread import RingAttention, Streams
from fluxmesh.models.waiting import InGraph

PEERS = "peer memory"


def flow_of(way: str, whole: Any, ranks: Ranks) -> Any:
    """The transformer `whole`, which stays as it is, as a way spreads it over `ranks`."""
    if way.startswith(PEERS):
        way = way.removeprefix(PEERS).removeprefix(", ") or "tree"
    is_flux2 = isinstance(whole, Flux2)
    if way.startswith("tensor"):
        tensor = (TensorFlux2 if is_flux2 else TensorFlux)(whole, ranks)
        return tensor if way == "tensor" else in_halves(tensor)
    flow: Any = (SequenceFlux2 if is_flux2 else SequenceFlux)(whole, ranks)
    if way != "tree":
        single = JoinedSingle if way == "together" else TiedSingle
        flow._doubles = [TiedDouble(block) for block in flow._doubles]
        flow._singles = [single(block) for block in flow._singles]
    return flow


def ranks_of(way: str, group: Any, push_blocks: int) -> Ranks:
    """The group as a way uses it; `push_blocks` as `PeerRanks`."""
    if way.startswith(PEERS):
        ranks = PeerRanks(group, push_blocks)
        check(ranks, group)
        return ranks
    if way != "own stream":
        return Ranks(group)
    # A ring's collectives run on a processor, whatever the device that computes.
    return OwnRanks(group, mx.new_stream(mx.gpu if mx.cuda.is_available() else mx.cpu))


# An order that a CUDA graph keeps

EDGE = """
  const long i = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i < SIZE) {
    *reinterpret_cast<Pack<T>*>(out + i) = *reinterpret_cast<const Pack<T>*>(x + i);
  }
"""


def edge(x: mx.array, *before: mx.array, stream: Any = None) -> mx.array:
    """A copy of x (a multiple of 8 numbers) by a kernel that also takes what is done `before`."""
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


def by_edge(linear: Any, x: mx.array, *before: mx.array) -> mx.array:
    """A linear's product, computed after `before`: its bias comes no earlier."""
    weight = linear.weight
    bias = linear.bias if "bias" in linear else mx.zeros(weight.shape[0], weight.dtype)
    return mx.addmm(edge(bias, *before), mx.depends(x, list(before)), weight.T)


# Groups


class OnOwnStream(InGraph):
    """Each collective is evaluated at once; streams wait for one another, the host for none.

    In one evaluation of both streams the host would wait wherever one needs the other.
    """

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
    """A group whose collectives have a stream of their own."""

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


# Blocks of `sequence`, which also give all ranks' keys and values: here None, for nobody asks


class TiedDouble:
    """A double block whose queries are computed after its gather has begun."""

    def __init__(self, block: Any) -> None:
        self.block = block  # the tree's

    def __call__(
        self, streams: Streams, attend: RingAttention, mods: Streams, memory: None = None
    ) -> tuple[Streams, None]:
        block, start = self.block, 0
        out: Streams = {}
        mod = {name: mx.split(mods[name], 6, axis=-1) for name in streams}
        normed = {
            name: modulated_norm(x, mod[name][0], mod[name][1]) for name, x in streams.items()
        }
        keys_values = [block.project[name].keys_values(x) for name, x in normed.items()]
        sent, pending = attend.send(keys_values, block.heads)
        sent = starting(attend.ranks, sent)
        queries = attend.queries(
            [
                (by_edge(block.project[name].q, x, sent), (block.project[name].query_scale,))
                for name, x in normed.items()
            ],
            block.heads,
        )
        attn = attention(queries, *attend.keys_values(pending, queries))
        for name, x in streams.items():
            _, _, gate1, shift2, scale2, gate2 = mod[name]
            own = attn[:, start : start + x.shape[1]]
            start += x.shape[1]
            x, hidden = gated_norm(x, gate1, block.attn[name].proj(own), shift2, scale2)
            out[name] = gated_sum(x, gate2, run(block.mlp[name], hidden))
        return out, None


class TiedSingle:
    """A single block: first its gather, then queries, then the MLP's way in, then attention."""

    def __init__(self, block: Any) -> None:
        self.block = block  # the tree's

    def __call__(
        self, x: mx.array, attend: RingAttention, mod: mx.array, memory: None = None
    ) -> tuple[mx.array, None]:
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        normed, project = modulated_norm(x, shift, scale), self.block.project
        sent, pending = attend.send([project.keys_values(normed)], project.heads)
        q, mlp, start = self.queries_and_mlp(normed, starting(attend.ranks, sent))
        queries = attend.queries([(q, (project.query_scale,))], project.heads)
        k, v = attend.keys_values(pending, mlp)
        attn = attention(mx.depends(queries, mlp), k, v)
        whole = self.block.block
        return gated_sum(x, gate, whole.linear2(whole.beside(attn, mlp, start))), None

    def queries_and_mlp(self, normed: mx.array, sent: mx.array) -> tuple[mx.array, mx.array, int]:
        """Queries, the MLP's way in, and the first of its columns in that array."""
        q = by_edge(self.block.project.q, normed, sent)
        return q, by_edge(self.block.mlp_in, normed, q), 0


class JoinedSingle(TiedSingle):
    """The same with one product, of weights that are copied for it: 3.6 GB of FLUX.1's.

    In the tree they would lie so that one product can read them.
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        linear, D = block.block.linear1, block.project.q.weight.shape[0]
        width = linear.weight.shape[0]
        self._joined = cut_linear(linear, Cut(0, ((0, D), (3 * D, width)), width))
        mx.eval(self._joined.parameters())

    def queries_and_mlp(self, normed: mx.array, sent: mx.array) -> tuple[mx.array, mx.array, int]:
        both = by_edge(self._joined, normed, sent)
        return both, both, self.block.project.q.weight.shape[0]


# `tensor`


def in_halves(flow: Any) -> Any:
    """`flow`, a transformer as `tensor`, whose blocks add up their outputs in two sums each."""
    before: list[mx.array] = []  # the last sum
    ranks = flow.ranks

    def outputs(*calls: tuple[Any, mx.array]) -> list[mx.array]:
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
