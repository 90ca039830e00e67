"""FLUX's transformer: noisy latents, a prompt's features and a time step in, a velocity out.

Stands on `layers.py`; `stages.py` drives it. What depends on the request alone is computed once
a request, not once a block and step: `rope` the rotary tables, `modulations` every block's shifts,
scales and gates at every time step. Then the modulation weights, 27% of the model, are idle while
denoising and may leave (`release_modulation`).

The architecture and all names are those of black-forest-labs/flux (`src/flux/model.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.base import Part
from fluxmesh.models.double_stream import DoubleStreamTransformer, at_step, between_blocks
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.layers import DoubleStreamBlock, SingleStreamBlock
from fluxmesh.models.flux1.partition import partition
from fluxmesh.models.flux1.tensor_maps import modulates
from fluxmesh.models.layers import TIME_CHANNELS, LastLayer, MLPEmbedder
from fluxmesh.models.lora_linear import widened
from fluxmesh.models.partition import Partition
from fluxmesh.models.step_cache import StepCache


def is_part(part: Part, name: str) -> bool:
    """Whether a module, or a tensor, belongs to a part."""
    if part == "modulation":
        embeds = ("time_in.", "vector_in.", "guidance_in.")
        tells_dtype = "double_blocks.0.img_attn.norm.query_norm."
        return modulates(name) or name.startswith((*embeds, tells_dtype))
    return part == "all" or not modulates(name)


class Modulations(NamedTuple):
    """What t, guidance and CLIP's pooled vector do to each block, in the dtype of the weights.

    With all T time steps of a request every array begins with an axis of T; `at` takes one step.
    """

    double: list[tuple[mx.array, mx.array]]  # a block's (img, txt), each [(T,) B, 1, 6D]
    single: list[mx.array]  # a block's, [(T,) B, 1, 3D]
    final: mx.array  # [(T,) B, 1, 2D]

    def at(self, step: int) -> Modulations:
        """The modulations of time step `step`, counted from 0."""
        return Modulations(
            double=[(at_step(img, step), at_step(txt, step)) for img, txt in self.double],
            single=[at_step(mod, step) for mod in self.single],
            final=at_step(self.final, step),
        )

    def of(self, row: int) -> Modulations:
        """Those of one of the B vectors that they were made of, of all time steps."""

        def pick(mod: mx.array) -> mx.array:
            return mod[..., row : row + 1, :, :]

        return Modulations(
            double=[(pick(img), pick(txt)) for img, txt in self.double],
            single=[pick(mod) for mod in self.single],
            final=pick(self.final),
        )


class Flux(DoubleStreamTransformer):
    """The transformer. Call it once a step: `flux(img, txt, pe, modulations.at(step))`."""

    config: FluxConfig

    def __init__(self, config: FluxConfig) -> None:
        """Raises `WeightsError` where heads and rotary axes don't divide the hidden size."""
        super().__init__(config)
        D = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, D)
        self.time_in = MLPEmbedder(TIME_CHANNELS, D)
        self.vector_in = MLPEmbedder(config.vec_in_dim, D)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_CHANNELS, D)
        self.txt_in = nn.Linear(config.context_in_dim, D)
        self.double_blocks = [
            DoubleStreamBlock(D, config.num_heads, config.mlp_hidden_dim)
            for _ in range(config.depth)
        ]
        self.single_blocks = [
            SingleStreamBlock(D, config.num_heads, config.mlp_hidden_dim)
            for _ in range(config.depth_single_blocks)
        ]
        self.final_layer = LastLayer(D, config.out_channels)

    @property
    def partition(self) -> Partition:
        """How it can be dealt to hosts."""
        return partition(self.config)

    def take_inputs(self, config: FluxConfig) -> None:
        """Takes as many channels as `config` says: those that are new weigh nothing yet.

        What an adapter then adds to `img_in` makes a model that follows a control picture.
        """
        self.img_in = widened(self.img_in, config.in_channels)
        self.config = config

    # Once a request

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None = None
    ) -> Modulations:
        """Every block's modulation at every time step.

        `timesteps` is float32 [T] in [0, 1], `y` CLIP's pooled vector [B, vec_in_dim] (B may be 1
        and stand for all images), `guidance` the strength that a model with a guidance embedding
        needs and others ignore. Arrays of the result are [T, B, 1, ...].
        """
        strength = None if guidance is None else mx.array([guidance], dtype=mx.float32)
        vec = self._time(timesteps, strength)[:, None] + self._vector(y)[None]  # [T, B, D]
        return self._modulate(vec)

    def release_modulation(self) -> None:
        """Drops the modulation weights; `modulations` then raises until they are loaded again."""
        if self.modulation_released:
            return
        for double in self.double_blocks:
            del double.img_mod, double.txt_mod
        for single in self.single_blocks:
            del single.modulation
        del self.final_layer.adaLN_modulation
        self.modulation_released = True

    # Once a step

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Modulations,
        cache: StepCache | None = None,
    ) -> mx.array:
        """The velocity, noise minus image: [B, S - L, out_channels], in the dtype of the weights.

        `img` is packed latents [B, S - L, in_channels], `txt` T5's features [B, L, context_in_dim],
        `pe` from `rope`, `modulation` one step's (`Modulations.at`). `cache` may skip all blocks
        but the first.
        """
        img = self.tokens_of(img, self.img_in)  # [B, S - L, D]
        txt = self.tokens_of(txt, self.txt_in)  # [B, L, D]
        entered = img
        img, txt = self.call(self.double_blocks[0], img, txt, pe, *modulation.double[0])
        rest = functools.partial(self._rest, img, txt, pe, modulation)
        img = rest() if cache is None else cache.rest(img - entered, img, rest)
        return self.final_layer(img, modulation.final)

    def _rest(
        self, img: mx.array, txt: mx.array, pe: mx.array, modulation: Modulations
    ) -> mx.array:
        """What the first double block gives, through all others: the image's [B, S - L, D]."""
        doubles = zip(self.double_blocks[1:], modulation.double[1:], strict=True)
        for double, (img_mod, txt_mod) in doubles:
            img, txt = self.call(double, img, txt, pe, img_mod, txt_mod)
        x = between_blocks(txt, img)
        for single, mod in zip(self.single_blocks, modulation.single, strict=True):
            x = self.call(single, x, pe, mod)
        return x[:, txt.shape[1] :]

    def forward(
        self,
        img: mx.array,
        img_ids: mx.array | np.ndarray,
        txt: mx.array,
        txt_ids: mx.array | np.ndarray,
        timesteps: mx.array,
        y: mx.array,
        guidance: mx.array | float | None = None,
    ) -> mx.array:
        """Everything in one call, with BFL's arguments: for training and for comparisons.

        Here `timesteps`, `y` and `guidance` hold one entry an image ([B], [B, vec_in_dim], [B] or
        one number).
        """
        if isinstance(guidance, int | float):
            guidance = mx.full(timesteps.shape, guidance, dtype=mx.float32)
        vec = self._time(timesteps, guidance) + self._vector(y)  # [B, D]
        return self(img, txt, self.rope(txt_ids, img_ids), self._modulate(vec))

    # Parts of the modulation

    def _vector(self, y: mx.array) -> mx.array:
        return self.vector_in(y.astype(self.dtype))

    def _modulate(self, vec: mx.array) -> Modulations:
        """vec [..., D] to the arrays of `Modulations`, [..., 1, outputs * D]."""
        if self.modulation_released:
            raise RuntimeError("The modulation weights were released; load the transformer again.")
        act = nn.silu(vec)[..., None, :]  # the new axis is that of tokens
        return Modulations(
            double=[(block.img_mod(act), block.txt_mod(act)) for block in self.double_blocks],
            single=[block.modulation(act) for block in self.single_blocks],
            final=self.final_layer.modulation(act),
        )
