"""What FLUX.1's models do together: T5 and CLIP read a prompt, the transformer makes velocities.

Above the family's models, behind `models/runtime.py`. A prompt's features are

    "t5"    [1, T, context_in_dim]   one vector a token, in the dtype of the encoders' weights
    "clip"  [1, vec_in_dim]          one vector a prompt

Of what to move away from, where a request says so, the same as "negative_t5", "negative_clip".
Of pictures (`encode_pictures`):

    "reference_1"  [1, rows, columns, 4C]   tokens of the picture that Kontext edits, float32
    "redux"        [1, rows, rows, context_in_dim]  what of all pictures follows the text
    "redux_weight" [1, 1]                   with which the text itself counts, float32
    "channels"     [1, S, channels_beside]  what Fill, Canny and Depth read behind the channels of
                                            the S noisy tokens, float32
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.autoencoder.packing import PATCH
from fluxmesh.models.autoencoder.reference_grids import encoded, in_order, reference_grids
from fluxmesh.models.base import REFERENCE, Part
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.clip import ClipTextModel
from fluxmesh.models.flux1.conditions.channels import control_channels, fill_channels
from fluxmesh.models.flux1.conditions.pictures import CONTROL, FILLED, MASK
from fluxmesh.models.flux1.conditions.redux import SEEN, WEIGHT, ReduxEmbedder, seen, with_pictures
from fluxmesh.models.flux1.conditions.siglip import SiglipVision
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.positions import image_positions, text_positions
from fluxmesh.models.flux1.t5 import T5Encoder
from fluxmesh.models.flux1.tokenizers import ClipTokenizer, T5Tokenizer
from fluxmesh.models.flux1.transformer import Flux, Modulations, is_part
from fluxmesh.models.runtime import (
    NO_CONDITIONS,
    Conditions,
    DenoisePlan,
    PictureModels,
    PromptFeatures,
    Runtime,
    TextModels,
    guided_velocity,
)
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import PromptCut

NEGATIVE = "negative_"  # before the names of features of what to move away from
CHANNELS = "channels"  # the condition that stands behind the channels of latents


class Flux1Flow(Protocol):
    """What a request asks of a transformer: `Flux`, or one spread over hosts (`parallel.py`)."""

    @property
    def config(self) -> FluxConfig: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    def rope(self, txt_ids: np.ndarray, img_ids: np.ndarray, /) -> mx.array: ...

    def modulations(
        self, timesteps: mx.array, y: mx.array, guidance: float | None, /
    ) -> Modulations: ...

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Modulations,
        cache: StepCache | None = None,
        /,
    ) -> mx.array: ...


class TextOfCall(NamedTuple):
    """What a call of the transformer is told by a text, at every step."""

    text: mx.array  # T5's features [1, T, context_in_dim]
    modulations: Modulations  # of all steps
    pe: mx.array  # rotary tables, float32


@dataclass(frozen=True)
class Flux1Plan(DenoisePlan):
    """What every image of one request has in common."""

    times: list[float]
    text: mx.array  # T5's features [1, T, context_in_dim]
    modulations: Modulations  # of all steps
    pe: mx.array  # rotary tables, float32
    latent_size: tuple[int, int]
    reference: mx.array | None = None  # tokens that follow the noisy ones at every step [1, R, 4C]
    channels: mx.array | None = None  # behind those of the latents [1, S, channels_beside]
    negative: TextOfCall | None = None  # where a step takes two calls
    cfg: float = 1.0  # the scale of these

    @property
    def calls(self) -> int:  # type: ignore[override]
        return 1 if self.negative is None else 2

    @property
    def arrays(self) -> Sequence[Any]:
        given = (self.reference, self.channels, self.negative)
        return (self.modulations, self.pe, *(part for part in given if part is not None))

    def velocity(
        self, flow: Flux1Flow, x: mx.array, step: int, caches: Sequence[StepCache] = ()
    ) -> mx.array:
        img = x.astype(flow.dtype)
        if self.channels is not None:
            img = mx.concatenate([img, self.channels], axis=-1)
        if self.reference is not None:
            img = mx.concatenate([img, self.reference], axis=1)
        asked = [TextOfCall(self.text, self.modulations, self.pe)]
        if self.negative is not None:
            asked.append(self.negative)

        def ask(img: mx.array, text: mx.array, call: int) -> mx.array:
            _, modulations, pe = asked[call]
            cache = caches[call] if caches else None
            velocity = flow(img, text, pe, modulations.at(step), cache)
            return velocity[:, : x.shape[1]].astype(mx.float32)

        return guided_velocity(ask, img, [each.text for each in asked], self.cfg)


def plan(
    flow: Flux1Flow,
    features: PromptFeatures,
    times: list[float],
    latent_size: tuple[int, int],
    guidance: float,
    *,
    reference: mx.array | None = None,
    channels: mx.array | None = None,
    negative: PromptFeatures | None = None,
    cfg: float = 1.0,
) -> Flux1Plan:
    """Computes modulations and rotary tables, lazily; `guidance` is for models that embed it.

    `reference` is Kontext's, a grid of tokens [1, rows, columns, 4C]. With features to move away
    from, and `cfg` above 1, a step takes two calls of the transformer. Raises `UsageError` where
    `channels` are not those that the model takes.
    """
    _check_channels(flow.config, channels, latent_size)
    asked = [features] if negative is None or cfg <= 1 else [features, negative]
    strength = guidance if flow.config.guidance_embed else None
    rows, columns = (side // PATCH for side in latent_size)
    ids, tokens = image_positions(rows, columns), None
    if reference is not None:
        tokens = reference.reshape(1, -1, reference.shape[-1]).astype(flow.dtype)
        ids = np.concatenate([ids, image_positions(reference.shape[1], reference.shape[2], 1)])
    levels = mx.array(times[:-1], dtype=mx.float32)
    # Of both texts at once: over a ring, one gather joins them.
    clip = mx.concatenate([text["clip"] for text in asked])
    modulations = flow.modulations(levels, clip, strength)
    parts = [
        TextOfCall(
            text["t5"].astype(flow.dtype),
            modulations.of(call) if len(asked) > 1 else modulations,
            flow.rope(text_positions(text["t5"].shape[1]), ids),
        )
        for call, text in enumerate(asked)
    ]
    return Flux1Plan(
        times,
        *parts[0],
        latent_size,
        reference=tokens,
        channels=None if channels is None else channels.astype(flow.dtype),
        negative=parts[1] if len(parts) > 1 else None,
        cfg=cfg,
    )


def _check_channels(
    config: FluxConfig, channels: mx.array | None, latent_size: tuple[int, int]
) -> None:
    tokens = math.prod(side // PATCH for side in latent_size)
    if channels is not None and channels.shape[:-1] != (1, tokens):
        raise UsageError(
            f"The channels beside the latents came as {list(channels.shape)}; the image has "
            f"[1, {tokens}, {config.channels_beside}]."
        )
    given = 0 if channels is None else channels.shape[-1]
    if given != config.channels_beside:
        raise UsageError(
            f"The transformer takes {config.channels_beside} channels beside the latents and was "
            f"given {given}; give the picture that the model takes, and no other."
        )


class Flux1Runtime(Runtime):
    """The models of one checkpoint of FLUX.1."""

    architecture: Flux1Architecture
    text_models = ("clip", "t5")
    readers: Mapping[str, str] = {
        f"{before}{name}": reader
        for before in ("", NEGATIVE)
        for name, reader in (("t5", "T5"), ("clip", "CLIP"))
    }
    feature_axes: Mapping[str, int] = {"t5": 3, "clip": 2, "negative_t5": 3, "negative_clip": 2}
    optional_features = frozenset(("negative_t5", "negative_clip"))
    prompt_features = ("t5", "clip")

    # Models

    def build(self, component: str) -> nn.Module:
        sizes = self.architecture
        if component == "t5":
            return T5Encoder(sizes.t5)
        if component == "clip":
            return ClipTextModel(sizes.clip)
        if component == "autoencoder":
            return AutoEncoder(sizes.autoencoder)
        if component == "siglip" and sizes.siglip is not None:
            return SiglipVision(sizes.siglip)
        if component == "redux" and sizes.redux is not None:
            return ReduxEmbedder(sizes.redux)
        return Flux(sizes.transformer)

    def is_part(self, part: Part, name: str) -> bool:
        return is_part(part, name)

    def spread(
        self, flow: Flux, placement: str, ranks: Ranks, shares: Shares = EVEN
    ) -> TensorFlux | SequenceFlux:
        return (TensorFlux if placement == "tensor" else SequenceFlux)(flow, ranks, shares)

    # Text

    def load_tokenizers(self, folders: Mapping[str, Path]) -> tuple[ClipTokenizer, T5Tokenizer]:
        """CLIP's and T5's.

        Raises `WeightsError` for files that are no vocabularies, or those of another model: a token
        beyond the embedding would be read from memory that is not the model's.
        """
        sizes = self.architecture
        clip = ClipTokenizer.from_folder(folders["clip"], limit=sizes.clip.max_position_embeddings)
        t5 = T5Tokenizer.from_folder(folders["t5"], sizes.text_length)
        for folder, tokens, rows in (
            (folders["clip"], clip.vocab_size, sizes.clip.vocab_size),
            (folders["t5"], t5.vocab_size, sizes.t5.vocab_size),
        ):
            if tokens > rows:
                raise WeightsError(
                    f"The vocabulary in {folder} has {tokens} tokens and its model {rows}; the "
                    "folder belongs to another model."
                )
        return clip, t5

    def tokenize(self, models: TextModels, prompt: str, padded: bool) -> tuple[mx.array, mx.array]:
        """(T5's tokens [1, T], CLIP's tokens [1, 77]) of a prompt."""
        clip, t5 = models.tokenizers
        return mx.array([t5.encode(prompt, pad=padded)]), mx.array([clip.encode(prompt)])

    def cut(self, models: TextModels, prompt: str) -> PromptCut | None:
        """T5's: CLIP, whose 77 tokens are fewer, only sums up what T5 tells word by word."""
        tokenizer: T5Tokenizer = models.tokenizers[1]
        return tokenizer.cut(prompt)

    def encode(
        self, models: TextModels, prompt: str, padded: bool, negative: str | None = None
    ) -> PromptFeatures:
        features = {}
        for before, text in (("", prompt), (NEGATIVE, negative)):
            if text is not None:
                t5_tokens, clip_tokens = self.tokenize(models, text, padded)
                features[f"{before}t5"] = models.text_model("t5")(t5_tokens)
                pooled = models.text_model("clip")(clip_tokens).pooled_output
                features[f"{before}clip"] = pooled
        return features

    def blank(self, dtype: mx.Dtype) -> PromptFeatures:
        config = self.architecture.transformer
        return {
            "t5": mx.zeros((1, self.architecture.text_length, config.context_in_dim), dtype),
            "clip": mx.zeros((1, config.vec_in_dim), dtype),
        }

    # Pictures: those that Redux sees, or the one that Kontext edits, and what the tools read beside
    # the latents

    def encode_pictures(
        self,
        models: PictureModels,
        pictures: Mapping[str, np.ndarray],
        strengths: Sequence[float] = (),
    ) -> Conditions:
        references = in_order([name for name in pictures if name.startswith(REFERENCE)])
        if references and self.architecture.redux is not None:
            pixels = [pictures[name] for name in references]
            return seen(models.vision, pixels, strengths or [1.0] * len(pixels))
        made = {name: encoded(models.ae, pictures[name]) for name in references}
        if CONTROL in pictures:
            made[CHANNELS] = control_channels(models.ae, pictures[CONTROL])
        if FILLED in pictures:
            made[CHANNELS] = fill_channels(models.ae, pictures[FILLED], pictures[MASK][:, :, 0])
        return made

    def blank_conditions(self, latent_size: tuple[int, int]) -> Conditions:
        beside = self.architecture.transformer.channels_beside
        if not beside:
            return NO_CONDITIONS
        rows, columns = (side // PATCH for side in latent_size)
        return {CHANNELS: mx.zeros((1, rows * columns, beside))}

    # Steps

    def plan(
        self,
        flow: Flux1Flow,
        features: PromptFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        *,
        cfg: float = 1.0,
        conditions: Conditions = NO_CONDITIONS,
    ) -> Flux1Plan:
        others = {
            name: array
            for name, array in conditions.items()
            if name not in (CHANNELS, SEEN, WEIGHT)
        }
        features = with_pictures(features, conditions)
        grids = reference_grids(others, self.architecture.transformer.out_channels)
        if len(grids) > self.architecture.most_references:
            raise UsageError(f"This model reads no {len(grids)} reference pictures.")
        negative = None
        if f"{NEGATIVE}t5" in features:
            negative = {name: features[f"{NEGATIVE}{name}"] for name in ("t5", "clip")}
        return plan(
            flow,
            features,
            times,
            latent_size,
            guidance,
            reference=grids[0] if grids else None,
            channels=conditions.get(CHANNELS),
            negative=negative,
            cfg=cfg,
        )

    def velocities(
        self,
        flow: Flux,
        x: mx.array,
        features: PromptFeatures,
        times: mx.array,
        grid: tuple[int, int],
        guidance: float,
    ) -> mx.array:
        t5, strength = features["t5"], guidance if flow.config.guidance_embed else None
        ids = image_positions(*grid), text_positions(t5.shape[1])
        return flow.forward(x, ids[0], t5, ids[1], times, features["clip"], strength)

    def conditioning(
        self, noise: mx.array, features: PromptFeatures, latent_size: tuple[int, int]
    ) -> tuple[mx.array, ...]:
        """(x_T, x_positions, t5_conditioning, t5_positions, clip_conditioning), as Apple's."""
        rows, columns = (side // PATCH for side in latent_size)
        t5, clip = features["t5"], features["clip"]
        return (
            noise,
            mx.array(image_positions(rows, columns))[None],
            mx.broadcast_to(t5, (len(noise), *t5.shape[1:])),
            mx.array(text_positions(t5.shape[1]))[None],
            mx.broadcast_to(clip, (len(noise), *clip.shape[1:])),
        )
