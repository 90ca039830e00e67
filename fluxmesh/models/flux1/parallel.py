"""The transformer on N hosts at once, as `tensor` or `sequence`.

Both wrap a `Flux` and are used as one (`rope`, `modulations`, a call a step), so that the sampler
doesn't know how many hosts take part. Every rank is given the same latents and prompt, makes the
same calls in the same order, and gets the whole velocity, equal to the byte on all ranks.

- `TensorFlux`: each host holds its share of the blocks and modulations, 1/N where hosts are equal
  (`partition.py`), and computes its heads and MLP columns of all tokens. The hosts' partial outputs
  are summed twice in a double block, text and image in one sum, and once in a single block; biases
  are added to the sum.
- `SequenceFlux`: each host holds all weights and computes all channels of its tokens. Each block
  gathers keys and values once; queries and the single block's MLP are computed meanwhile. Source:
  DeepSpeed-Ulysses and ring attention solve the same (https://arxiv.org/abs/2309.14509,
  https://arxiv.org/abs/2310.01889); one gather needs neither a transpose of ranks nor N rounds.

A group of one runs the same code. Collectives are `models/collectives.py`'s, and what the blocks do
with them `models/spread.py`'s.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.double_stream import between_blocks
from fluxmesh.models.flux1.transformer import Flux, Modulations
from fluxmesh.models.spread import (
    RingAttention,
    SequenceDoubleBlock,
    SequenceSingleBlock,
    SpreadTransformer,
    Streams,
    check_whole,
    dealt_velocity,
    filled_up,
    own_rope,
    sharded,
)
from fluxmesh.models.step_cache import StepCache


class SpreadFlux(SpreadTransformer):
    """A `Flux` to everyone but its blocks."""

    flux: Flux

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None = None
    ) -> Modulations:
        """As `Flux.modulations`, whole on every rank."""
        return self.flux.modulations(timesteps, y, guidance)


class TensorFlux(SpreadFlux):
    """Each rank computes its share of the heads and MLP columns, for all tokens."""

    def __init__(self, flux: Flux, ranks: Ranks, shares: Shares = EVEN) -> None:
        """`flux` is whole, and then left as it is, or this rank's shard of a checkpoint.

        Raises `UsageError` where it is another shard, or can't be dealt to the ranks so.
        """
        super().__init__(sharded(flux, ranks, shares), ranks, shares)

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None = None
    ) -> Modulations:
        """As `Flux.modulations`: each rank computes its share, and one gather joins all."""
        part = self.flux.modulations(timesteps, y, guidance)
        pieces = [*(mod for pair in part.double for mod in pair), *part.single, part.final]
        joined = mx.concatenate(pieces, axis=-1)  # [T, B, 1, its share of all]
        widths = [piece.shape[-1] for piece in pieces]
        heads = self.shares.heads or (1,) * self.ranks.size
        own = heads[self.ranks.rank]
        joined = filled_up(joined, joined.shape[-1] // own * max(heads), joined.ndim - 1)
        every = self.ranks.gather(joined[None])  # [N, T, B, 1, the largest share]
        ends = [np.cumsum([width // own * share for width in widths]).tolist() for share in heads]
        parts = [mx.split(every[rank], ends[rank], axis=-1)[:-1] for rank in range(len(heads))]
        whole = [mx.concatenate(list(piece), axis=-1) for piece in zip(*parts, strict=True)]
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


class SequenceFlux(SpreadFlux):
    """Each rank computes its share of the S tokens, ceil(S / N) or its own, with all weights."""

    def __init__(self, flux: Flux, ranks: Ranks, shares: Shares = EVEN) -> None:
        """Shares the weights of `flux`, which stays as it is. Make it anew after adapters change.

        Raises `UsageError` where `flux` is a shard.
        """
        check_whole(flux)
        super().__init__(flux, ranks, shares)
        D, M = flux.config.hidden_size, flux.config.mlp_hidden_dim
        self._doubles = [SequenceDoubleBlock(block, D) for block in flux.double_blocks]
        self._singles = [SequenceSingleBlock(block, D, M) for block in flux.single_blocks]
        self.parted = [*self._doubles, *self._singles]

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables of this rank's tokens, float32 [(B,) 1, C, hd/2, 2]."""
        pe = self.flux.rope(txt_ids, img_ids)
        return own_rope(pe, self.ranks.rank, self.runs(pe.shape[-3]))

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Modulations,
        cache: StepCache | None = None,
    ) -> mx.array:
        """The velocity of all image tokens; arguments and result as `Flux.__call__`."""

        def first(streams: Streams, attend: RingAttention) -> Streams:
            img_mod, txt_mod = modulation.double[0]
            return self._doubles[0](streams, attend, {"txt": txt_mod, "img": img_mod})[0]

        def rest(streams: Streams, attend: RingAttention) -> mx.array:
            return self._rest(streams, attend, modulation)

        return dealt_velocity(self, img, txt, pe, modulation.final, first, rest, cache)

    def _rest(self, streams: Streams, attend: RingAttention, modulation: Modulations) -> mx.array:
        """What the first double block gives, through all others: this rank's [B, C, D]."""
        doubles = zip(self._doubles[1:], modulation.double[1:], strict=True)
        for double, (img_mod, txt_mod) in doubles:
            streams, _ = double(streams, attend, {"txt": txt_mod, "img": img_mod})
        x = between_blocks(*streams.values())
        for single, mod in zip(self._singles, modulation.single, strict=True):
            x, _ = single(x, attend, mod)
        return x
