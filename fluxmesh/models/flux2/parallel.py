"""FLUX.2's transformer on N hosts at once, as `tensor` or `sequence`.

Both wrap a `Flux2` and are used as one (`rope`, `modulations`, `remember`, a call a step). Every
rank is given the same latents, prompt and references, makes the same calls in the same order, and
gets the whole velocity, equal to the byte on all ranks.

- `TensorFlux2`: each host holds its share of the blocks, 1/N where hosts are equal
  (`partition.py`), and computes its heads and MLP columns of all tokens. Partial outputs are summed
  twice in a double block, text and image in one sum, and once in a single block.
- `SequenceFlux2`: each host holds all weights and computes all channels of its tokens. Each block
  gathers keys and values once; queries and the single block's MLP are computed meanwhile.

A group of one runs the same code. Collectives are `models/collectives.py`'s, and what the blocks do
with them `models/spread.py`'s.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.double_stream import between_blocks
from fluxmesh.models.flux2.transformer import Flux2, Flux2Modulations, ReferenceMemory
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


class SpreadFlux2(SpreadTransformer):
    """A `Flux2` to everyone but its blocks."""

    flux: Flux2

    def modulations(self, timesteps: mx.array, guidance: float | None = None) -> Flux2Modulations:
        """As `Flux2.modulations`, whole on every rank."""
        return self.flux.modulations(timesteps, guidance)

    def reference_modulation(self, guidance: float | None = None) -> Flux2Modulations:
        """As `Flux2.reference_modulation`, whole on every rank."""
        return self.flux.reference_modulation(guidance)


class TensorFlux2(SpreadFlux2):
    """Each rank computes its share of the heads and MLP columns, for all tokens."""

    def __init__(self, flux: Flux2, ranks: Ranks, shares: Shares = EVEN) -> None:
        """`flux` is whole, and then left as it is, or this rank's shard of a checkpoint.

        Raises `UsageError` where it is another shard, or can't be dealt to the ranks so.
        """
        super().__init__(sharded(flux, ranks, shares), ranks, shares)

    def remember(
        self, references: mx.array, ids: mx.array | np.ndarray, mods: Flux2Modulations
    ) -> ReferenceMemory:
        """As `Flux2.remember`, of this rank's heads."""
        return self.flux.remember(references, ids, mods)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        cache: StepCache | None = None,
        memory: ReferenceMemory | None = None,
    ) -> mx.array:
        """The velocity of all image tokens; arguments and result as `Flux2.__call__`."""
        return self.flux(img, txt, pe, modulation, cache, memory)


class SequenceFlux2(SpreadFlux2):
    """Each rank computes its share of the S tokens, ceil(S / N) or its own, with all weights."""

    def __init__(self, flux: Flux2, ranks: Ranks, shares: Shares = EVEN) -> None:
        """Shares the weights of `flux`, which stays as it is. Make it anew after adapters change.

        Raises `UsageError` where `flux` is a shard.
        """
        check_whole(flux)
        super().__init__(flux, ranks, shares)
        D, M = flux.config.hidden_size, flux.config.mlp_hidden_dim
        self._doubles = [SequenceDoubleBlock(block, D) for block in flux.double_blocks]
        self._singles = [SequenceSingleBlock(block, D, 2 * M) for block in flux.single_blocks]
        self.parted = [*self._doubles, *self._singles]

    def rope(self, txt_ids: mx.array | np.ndarray, img_ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables of this rank's tokens, float32 [(B,) 1, C, hd/2, 2]."""
        pe = self.flux.rope(txt_ids, img_ids)
        return own_rope(pe, self.ranks.rank, self.runs(pe.shape[-3]))

    def remember(
        self, references: mx.array, ids: mx.array | np.ndarray, mods: Flux2Modulations
    ) -> ReferenceMemory:
        """As `Flux2.remember`: each rank computes its own tokens, and all keep all of them."""
        runs, rank = self.runs(references.shape[1]), self.ranks.rank
        start, stop = runs.span(rank)
        own = filled_up(references[:, start:stop], stop - start, 1)
        pe = own_rope(self.flux.reference_rope(ids), rank, runs)
        attend = RingAttention(self.ranks, runs, pe)
        streams: Streams = {"img": self.flux.tokens_of(own, self.flux.img_in)}
        double, single = [], []
        for block in self._doubles:
            streams, kept = block(streams, attend, {"img": mods.img})
            double.append(kept)
        x = streams["img"]
        for single_block in self._singles:
            x, kept = single_block(x, attend, mods.single)
            single.append(kept)
        return ReferenceMemory(double, single)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        cache: StepCache | None = None,
        memory: ReferenceMemory | None = None,
    ) -> mx.array:
        """The velocity of all image tokens; arguments and result as `Flux2.__call__`."""
        mods = {"txt": modulation.txt, "img": modulation.img}

        def first(streams: Streams, attend: RingAttention) -> Streams:
            return self._doubles[0](streams, attend, mods, memory and memory.double[0])[0]

        def rest(streams: Streams, attend: RingAttention) -> mx.array:
            for i in range(1, len(self._doubles)):
                kept = memory and memory.double[i]
                streams, _ = self._doubles[i](streams, attend, mods, kept)
            x = between_blocks(*streams.values())
            for i, single in enumerate(self._singles):
                x, _ = single(x, attend, modulation.single, memory and memory.single[i])
            return x

        return dealt_velocity(self, img, txt, pe, modulation.final, first, rest, cache)
