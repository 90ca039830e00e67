"""What FLUX.2's models do together for a picture: text and references in, velocities out.

Above the family's models, behind `models/runtime.py`. `encode`, `encode_pictures` and `plan` run
once a request or picture, `Flux2Plan.velocity` once a step. It knows no seeds: noise and time steps
come from outside (`sampling/`). A prompt's features, and those of its references, are

    "prompt"       [1, L, context_in_dim]   one vector a token, padding included
    "negative"     the same of what to move away from, for a base model alone
    "reference_1"  [1, rows, columns, 4C]   a picture's tokens, float32; then "reference_2" ...

Three kinds of guidance. A distilled model (klein) needs none; dev has its strength embedded; a base
model is asked twice a step, with the prompt and with a negative one (`guided_velocity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.autoencoder.packing import PATCH
from fluxmesh.models.autoencoder.reference_grids import encoded, reference_grids
from fluxmesh.models.base import Part
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.autoencoder import Flux2AutoEncoder
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.positions import image_positions, text_positions
from fluxmesh.models.flux2.tensor_maps import modulates
from fluxmesh.models.flux2.text_encoder import LayerwiseTextEncoder, TextEncoder
from fluxmesh.models.flux2.tokenizer import ChatTokenizer
from fluxmesh.models.flux2.transformer import Flux2, Flux2Modulations, ReferenceMemory
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


class Flux2Flow(Protocol):
    """What a request asks of a transformer: `Flux2`, or one spread over hosts (`parallel.py`)."""

    @property
    def config(self) -> Flux2Config: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    def rope(self, txt_ids: np.ndarray, img_ids: np.ndarray, /) -> mx.array: ...

    def modulations(self, timesteps: mx.array, guidance: float | None, /) -> Flux2Modulations: ...

    def reference_modulation(self, guidance: float | None, /) -> Flux2Modulations: ...

    def remember(
        self, references: mx.array, ids: np.ndarray, mods: Flux2Modulations, /
    ) -> ReferenceMemory: ...

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        modulation: Flux2Modulations,
        cache: StepCache | None,
        memory: ReferenceMemory | None,
        /,
    ) -> mx.array: ...


class TextFeatures(NamedTuple):
    """A prompt as the transformer reads it, [1, L, context_in_dim], and what to move away from."""

    prompt: mx.array
    negative: mx.array | None = None  # for classifier-free guidance


class ReferenceTokens(NamedTuple):
    """Reference pictures in the model's own space, one after another."""

    tokens: mx.array  # packed float32 [1, R, 4C]
    ids: np.ndarray  # positions, int32 [R, 4]


class ToRemember(NamedTuple):
    """Reference pictures of which keys and values are kept, and what that takes."""

    references: ReferenceTokens
    mods: Flux2Modulations  # of the time step 0


@dataclass(frozen=True)
class Flux2Plan(DenoisePlan):
    """What every step of every picture of a request has in common."""

    times: list[float]
    text: TextFeatures  # with a negative where a step takes two calls, and only there
    guidance: float
    modulations: Flux2Modulations  # of all steps
    pe: mx.array  # rotary tables, float32
    latent_size: tuple[int, int]
    references: mx.array | None = None  # tokens after the noisy ones at every step [1, R, 4C]
    remembered: ToRemember | None = None  # or, for klein 9B KV, what is kept of them
    memory: ReferenceMemory | None = None  # in `prepared`

    @property
    def calls(self) -> int:  # type: ignore[override]
        return 1 if self.text.negative is None else 2

    @property
    def arrays(self) -> Sequence[Any]:
        mods = None if self.remembered is None else self.remembered.mods
        kept = [part for part in (self.references, mods, self.memory) if part is not None]
        return [self.modulations, self.pe, *kept]

    def prepared(self, flow: Flux2Flow) -> Flux2Plan:
        """With the references' keys and values."""
        if self.remembered is None or self.memory is not None:
            return self
        (tokens, ids), mods = self.remembered
        return replace(self, memory=flow.remember(tokens, ids, mods))

    def velocity(
        self, flow: Flux2Flow, x: mx.array, step: int, caches: Sequence[StepCache] = ()
    ) -> mx.array:
        img = x.astype(flow.dtype)
        if self.references is not None:
            img = mx.concatenate([img, self.references], axis=1)

        def ask(img: mx.array, text: mx.array, call: int) -> mx.array:
            cache, modulations = caches[call] if caches else None, self.modulations.at(step)
            velocity = flow(img, text, self.pe, modulations, cache, self.memory)
            return velocity[:, : x.shape[1]].astype(mx.float32)

        texts = [text for text in self.text if text is not None]
        return guided_velocity(ask, img, texts, self.guidance)


def plan(
    flow: Flux2Flow,
    text: TextFeatures,
    times: list[float],
    latent_size: tuple[int, int],
    guidance: float,
    *,
    is_distilled: bool,
    references: ReferenceTokens | None = None,
    remembers_references: bool = False,
) -> Flux2Plan:
    """Computes modulations and rotary tables, lazily.

    `is_distilled` (of model_index.json) tells klein from its base model, whose weights look alike;
    `remembers_references` tells klein 9B KV. Raises `UsageError` where guidance takes negative
    features and `text` has none.
    """
    embeds = flow.config.guidance_embed
    is_asked_twice = not is_distilled and not embeds and guidance > 1
    if is_asked_twice and text.negative is None:
        raise UsageError(
            f"At guidance {guidance} this model is asked with a negative prompt too; encode "
            "one, or use guidance 1."
        )
    rows, columns = (side // PATCH for side in latent_size)
    strength = guidance if embeds else None
    ids, tokens, remembered = image_positions(rows, columns), None, None
    if references is not None and remembers_references:
        remembered = ToRemember(references, flow.reference_modulation(strength))
    elif references is not None:
        tokens = references.tokens.astype(flow.dtype)
        ids = np.concatenate([ids, references.ids])
    read = text if is_asked_twice else TextFeatures(text.prompt)
    return Flux2Plan(
        times=times,
        text=TextFeatures(*(part.astype(flow.dtype) for part in read if part is not None)),
        guidance=guidance,
        modulations=flow.modulations(mx.array(times[:-1], dtype=mx.float32), strength),
        pe=flow.rope(text_positions(text.prompt.shape[1]), ids),
        latent_size=latent_size,
        references=tokens,
        remembered=remembered,
    )


def references_of(grids: Sequence[mx.array]) -> ReferenceTokens | None:
    """Encoded pictures [1, rows, columns, 4C] one after another; None where there is none."""
    if not grids:
        return None
    tokens = [grid.reshape(1, -1, grid.shape[-1]) for grid in grids]
    ids = [
        image_positions(grid.shape[1], grid.shape[2], n) for n, grid in enumerate(grids, start=1)
    ]
    return ReferenceTokens(mx.concatenate(tokens, axis=1), np.concatenate(ids))


class Flux2Runtime(Runtime):
    """The models of one checkpoint of FLUX.2."""

    architecture: Flux2Architecture
    text_models = ("text_encoder",)
    readers: Mapping[str, str] = dict.fromkeys(("prompt", "negative"), "the text encoder")
    prompt_features = ("prompt",)

    @property
    def feature_axes(self) -> Mapping[str, int]:
        return dict.fromkeys(self._texts, 3)

    @property
    def _texts(self) -> tuple[str, ...]:
        """Names of the features that a prompt gives: a base model may be asked twice a step."""
        return ("prompt", "negative") if self.architecture.takes_negative else ("prompt",)

    # Models

    def build(self, component: str) -> nn.Module:
        sizes = self.architecture
        if component == "text_encoder":
            return TextEncoder(sizes.text)
        if component == "autoencoder":
            return Flux2AutoEncoder(sizes.autoencoder)
        return Flux2(sizes.transformer)

    def by_layers(
        self, component: str, dtype: mx.Dtype, layers: Callable[[], Iterator[nn.Module]]
    ) -> LayerwiseTextEncoder:
        return LayerwiseTextEncoder(self.architecture.text, dtype, layers)

    def is_part(self, part: Part, name: str) -> bool:
        if part == "modulation":
            tells_dtype = "double_blocks.0.img_attn.norm.query_norm."
            return modulates(name) or name.startswith(("time_in.", "guidance_in.", tells_dtype))
        return part == "all" or not modulates(name)

    def spread(
        self, flow: Flux2, placement: str, ranks: Ranks, shares: Shares = EVEN
    ) -> TensorFlux2 | SequenceFlux2:
        return (TensorFlux2 if placement == "tensor" else SequenceFlux2)(flow, ranks, shares)

    # Text

    def load_tokenizers(self, folders: Mapping[str, Path]) -> ChatTokenizer:
        """The language model's. Raises `WeightsError` for that of another model."""
        folder, sizes = folders["text_encoder"], self.architecture
        tokenizer = ChatTokenizer.from_folder(folder, sizes.text.kind, sizes.text_length)
        if tokenizer.vocab_size > sizes.text.vocab_size:
            raise WeightsError(
                f"The vocabulary in {folder} has {tokenizer.vocab_size} tokens and its model "
                f"{sizes.text.vocab_size}; the folder belongs to another model."
            )
        return tokenizer

    def tokenize(self, models: TextModels, prompt: str, padded: bool) -> tuple[mx.array, ...]:
        """The tokens without padding, which the model reads at every length."""
        return (mx.array([models.tokenizers.encode(prompt).ids]),)

    def cut(self, models: TextModels, prompt: str) -> PromptCut | None:
        tokenizer: ChatTokenizer = models.tokenizers
        return tokenizer.cut(prompt)

    def encode(
        self, models: TextModels, prompt: str, padded: bool, negative: str | None = None
    ) -> PromptFeatures:
        """Always padded: the transformer attends to the rows of padding too.

        The negative prompt of a base model is empty by itself.
        """
        embedding = EmbeddingRows(models.text_files("text_encoder"), self.architecture.text)
        encoder: TextEncoder = models.text_model("text_encoder")
        texts = dict(zip(self._texts, (prompt, negative or ""), strict=False))
        tokens = [models.tokenizers.encode(text) for text in texts.values()]
        return dict(zip(texts, encoder.encode(tokens, embedding), strict=True))

    def blank(self, dtype: mx.Dtype) -> PromptFeatures:
        config = self.architecture.transformer
        shape = (1, self.architecture.text_length, config.context_in_dim)
        return {name: mx.zeros(shape, dtype) for name in self._texts}

    # References

    def encode_pictures(
        self,
        models: PictureModels,
        pictures: Mapping[str, np.ndarray],
        strengths: Sequence[float] = (),
    ) -> Conditions:
        return {name: encoded(models.ae, pixels) for name, pixels in pictures.items()}

    # Steps

    def plan(
        self,
        flow: Flux2Flow,
        features: PromptFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        *,
        cfg: float = 1.0,
        conditions: Conditions = NO_CONDITIONS,
    ) -> Flux2Plan:
        """A base model's `guidance` is classifier-free: `cfg` says nothing."""
        grids = reference_grids(conditions, self.architecture.transformer.in_channels)
        return plan(
            flow,
            TextFeatures(features["prompt"], features.get("negative")),
            times,
            latent_size,
            guidance,
            is_distilled=self.architecture.is_distilled,
            references=references_of(grids),
            remembers_references=self.architecture.remembers_references,
        )

    def velocities(
        self,
        flow: Flux2,
        x: mx.array,
        features: PromptFeatures,
        times: mx.array,
        grid: tuple[int, int],
        guidance: float,
    ) -> mx.array:
        text, strength = features["prompt"], guidance if flow.config.guidance_embed else None
        ids = image_positions(*grid), text_positions(text.shape[1])
        return flow.forward(x, ids[0], text, ids[1], times, strength)

    def conditioning(
        self, noise: mx.array, features: PromptFeatures, latent_size: tuple[int, int]
    ) -> tuple[mx.array, ...]:
        """(x_T, x_positions, features, text_positions)."""
        rows, columns = (side // PATCH for side in latent_size)
        text = features["prompt"]
        return (
            noise,
            mx.array(image_positions(rows, columns))[None],
            mx.broadcast_to(text, (len(noise), *text.shape[1:])),
            mx.array(text_positions(text.shape[1]))[None],
        )
