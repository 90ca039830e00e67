"""FLUX.2's transformer: noisy latents, a prompt's features and a time step in, a velocity out.

Stands on `layers.py`. What depends on the request alone is computed once a request, not once a
block and step: `rope` the rotary tables, `modulations` the shifts, scales and gates at every time
step, which all blocks of a kind share.

Reference pictures come in one of two ways. Models that were trained for it take their tokens after
the noisy ones, at every step: they are part of `img`. klein 9B KV instead lets reference tokens
attend to one another alone and see the time step 0 (black-forest-labs's "KV" checkpoint; diffusers'
`Flux2KleinKVPipeline`), so that their keys and values are the same at every step: `remember`
computes them once, and every step attends to them as well.

The architecture and all names are those of black-forest-labs/flux2 (`src/flux2/model.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.double_stream import (
    DoubleStreamTransformer,
    KeysValues,
    at_step,
    between_blocks,
)
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.layers import Flux2DoubleBlock, Flux2SingleBlock
from fluxmesh.models.flux2.partition import partition
from fluxmesh.models.layers import (
    TIME_CHANNELS,
    LastLayer,
    MLPEmbedder,
    Modulation,
    rope_tables,
)
from fluxmesh.models.partition import Partition
from fluxmesh.models.step_cache import StepCache


class Flux2Modulations(NamedTuple):
    """What t and guidance do to the blocks, in the dtype of the weights.

    With all T time steps of a request every array begins with an axis of T; `at` takes one step.
    """

    img: mx.array  # of every double block, [(T,) B, 1, 6D]
    txt: mx.array  # the same for the text
    single: mx.array  # of every single block, [(T,) B, 1, 3D]
    final: mx.array  # [(T,) B, 1, 2D]

    def at(self, step: int) -> Flux2Modulations:
        """The modulations of time step `step`, counted from 0."""
        return Flux2Modulations(*(at_step(mod, step) for mod in self))


class ReferenceMemory(NamedTuple):
    """Keys and values of reference tokens in every block, for klein 9B KV."""

    double: list[KeysValues]
    single: list[KeysValues]


class Flux2(DoubleStreamTransformer):
    """The transformer. Call it once a step: `flux(img, txt, pe, modulations.at(step))`."""

    config: Flux2Config

    def __init__(self, config: Flux2Config) -> None:
        """Raises `WeightsError` where heads and rotary axes don't divide the hidden size."""
        super().__init__(config)
        D = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, D, bias=False)
        self.time_in = MLPEmbedder(TIME_CHANNELS, D, bias=False)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_CHANNELS, D, bias=False)
        self.txt_in = nn.Linear(config.context_in_dim, D, bias=False)
        self.double_stream_modulation_img = Modulation(D, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(D, 6, bias=False)
        self.single_stream_modulation = Modulation(D, 3, bias=False)
        self.double_blocks = [
            Flux2DoubleBlock(D, config.num_heads, config.mlp_hidden_dim)
            for _ in range(config.depth)
        ]
        self.single_blocks = [
            Flux2SingleBlock(D, config.num_heads, config.mlp_hidden_dim)
            for _ in range(config.depth_single_blocks)
        ]
        self.final_layer = LastLayer(D, config.out_channels, bias=False)

    @property
    def partition(self) -> Partition:
        """How it can be dealt to hosts."""
        return partition(self.config)

    # Once a request

    def modulations(self, timesteps: mx.array, guidance: float | None = None) -> Flux2Modulations:
        """The modulations at every time step, [T, 1, 1, ...].

        `timesteps` is float32 [T] in [0, 1], `guidance` the strength that a model with a guidance
        embedding needs and others ignore.
        """
        strength = None if guidance is None else mx.array([guidance], dtype=mx.float32)
        return self._modulate(self._time(timesteps, strength)[:, None])  # from [T, 1, D]

    def release_modulation(self) -> None:
        """Drops the modulation weights; `modulations` then raises until they are loaded again."""
        if self.modulation_released:
            return
        del self.double_stream_modulation_img, self.double_stream_modulation_txt
        del self.single_stream_modulation, self.final_layer.adaLN_modulation
        self.modulation_released = True

    def remember(
        self, references: mx.array, ids: mx.array | np.ndarray, mods: Flux2Modulations
    ) -> ReferenceMemory:
        """Keys and values of reference tokens [B, R, in_channels], in klein 9B KV's manner.

        `ids` are their positions, [R, 4], `mods` those of `reference_modulation`.
        """
        pe = self.reference_rope(ids)
        x = self.tokens_of(references, self.img_in)
        double, single = [], []
        for block in self.double_blocks:
            x, kept = block.remember(x, pe, mods.img)
            double.append(kept)
        for block in self.single_blocks:
            x, kept = block.remember(x, pe, mods.single)
            single.append(kept)
        return ReferenceMemory(double, single)

    def reference_modulation(self, guidance: float | None = None) -> Flux2Modulations:
        """Of remembered references: that of time step 0, where nothing is noise."""
        return self.modulations(mx.zeros((1,), dtype=mx.float32), guidance).at(0)

    def reference_rope(self, ids: mx.array | np.ndarray) -> mx.array:
        """Rotary tables of references alone, as `rope` makes them."""
        return rope_tables(np.array(ids), self.config.axes_dim, self.config.theta)

    # Once a step

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        cache: StepCache | None = None,
        memory: ReferenceMemory | None = None,
    ) -> mx.array:
        """The velocity, noise minus image: [B, S - L, out_channels], in the dtype of the weights.

        `img` is packed latents [B, S - L, in_channels], perhaps with those of references after
        them, `txt` the prompt's features [B, L, context_in_dim], `pe` from `rope`, `modulation` one
        step's (`Flux2Modulations.at`). `cache` may skip all blocks but the first. Every token also
        attends to `memory`, of `remember`.
        """
        img = self.tokens_of(img, self.img_in)  # [B, S - L, D]
        txt = self.tokens_of(txt, self.txt_in)  # [B, L, D]
        entered = img
        img, txt = self._double(0, img, txt, pe, modulation, memory)
        rest = functools.partial(self._rest, img, txt, pe, modulation, memory)
        img = rest() if cache is None else cache.rest(img - entered, img, rest)
        return self.final_layer(img, modulation.final)

    def _double(
        self,
        i: int,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        memory: ReferenceMemory | None,
    ) -> tuple[mx.array, mx.array]:
        mods = modulation.img, modulation.txt
        kept = () if memory is None else (memory.double[i],)
        img, txt = self.call(self.double_blocks[i], img, txt, pe, *mods, *kept)
        return img, txt

    def _rest(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        memory: ReferenceMemory | None,
    ) -> mx.array:
        """What the first double block gives, through all others: the image's [B, S - L, D]."""
        for i in range(1, len(self.double_blocks)):
            img, txt = self._double(i, img, txt, pe, modulation, memory)
        x = between_blocks(txt, img)
        for i, single in enumerate(self.single_blocks):
            kept = () if memory is None else (memory.single[i],)
            x = self.call(single, x, pe, modulation.single, *kept)
        return x[:, txt.shape[1] :]

    def forward(
        self,
        img: mx.array,
        img_ids: mx.array | np.ndarray,
        txt: mx.array,
        txt_ids: mx.array | np.ndarray,
        timesteps: mx.array,
        guidance: mx.array | float | None = None,
    ) -> mx.array:
        """Everything in one call, with BFL's arguments: for training and for comparisons.

        Here `timesteps` and `guidance` hold one entry an image ([B], [B] or one number).
        """
        if isinstance(guidance, int | float):
            guidance = mx.full(timesteps.shape, guidance, dtype=mx.float32)
        vec = self._time(timesteps, guidance)  # [B, D]
        return self(img, txt, self.rope(txt_ids, img_ids), self._modulate(vec))

    # Parts of the modulation

    def _modulate(self, vec: mx.array) -> Flux2Modulations:
        """vec [..., D] to the arrays of `Flux2Modulations`, [..., 1, outputs * D]."""
        if self.modulation_released:
            raise RuntimeError("The modulation weights were released; load the transformer again.")
        act = nn.silu(vec)[..., None, :]  # the new axis is that of tokens
        return Flux2Modulations(
            img=self.double_stream_modulation_img(act),
            txt=self.double_stream_modulation_txt(act),
            single=self.single_stream_modulation(act),
            final=self.final_layer.modulation(act),
        )
