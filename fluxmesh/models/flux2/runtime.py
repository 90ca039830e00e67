"""What FLUX.2's models do together for a picture: text and references in, velocities, pixels out.

The family's part of a pipeline. `encode_text`, `encode_references`, `prepare` and `decode` run once
a request or picture, `velocity` once a step; `denoise` is the plain loop of one host. It knows
neither files nor seeds: noise and time steps come from outside (`sampling/`).

Three kinds of guidance. A distilled model (klein) needs none; dev has its strength embedded; a base
model is asked twice a step, with the prompt and with a negative one (classifier-free guidance, Ho &
Salimans 2022, https://arxiv.org/abs/2207.12598).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.images import to_model_range
from fluxmesh.models.flux2.autoencoder import Flux2AutoEncoder
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.positions import image_positions, text_positions
from fluxmesh.models.flux2.references import fitted
from fluxmesh.models.flux2.text_encoder import TextEncoder
from fluxmesh.models.flux2.tokenizer import ChatTokenizer
from fluxmesh.models.flux2.transformer import Flux2Modulations, ReferenceMemory
from fluxmesh.models.packing import PATCH, pack, unpack
from fluxmesh.models.step_cache import StepCache


class Flux2Flow(Protocol):
    """What a request asks of a transformer: `Flux2`, or one spread over hosts (`parallel.py`)."""

    @property
    def config(self) -> Flux2Config: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    def rope(self, txt_ids: np.ndarray, img_ids: np.ndarray, /) -> mx.array: ...

    def modulations(self, timesteps: mx.array, guidance: float | None, /) -> Flux2Modulations: ...

    def remember(
        self, references: mx.array, ids: np.ndarray, guidance: float | None, /
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
    size: tuple[int, int]  # (height, width) of the first, in latents: the output's unless asked


@dataclass(frozen=True)
class Flux2Request:
    """What every step of every picture of a request has in common."""

    times: list[float]  # noise levels from the first to 0.0: one more than steps
    text: TextFeatures
    guidance: float
    modulations: Flux2Modulations  # of all steps
    pe: mx.array  # rotary tables, float32
    latent_size: tuple[int, int]  # (height, width) in latents
    references: mx.array | None  # tokens that follow the noisy ones at every step [1, R, 4C]
    memory: ReferenceMemory | None  # or what was kept of them, for klein 9B KV

    @property
    def steps(self) -> int:
        return len(self.times) - 1


class Flux2Runtime:
    """The models of one checkpoint, run on one host."""

    def __init__(
        self,
        *,
        transformer: Flux2Flow,
        text_encoder: TextEncoder,
        embedding: EmbeddingRows,
        tokenizer: ChatTokenizer,
        autoencoder: Flux2AutoEncoder,
        is_distilled: bool,
        remembers_references: bool = False,
    ) -> None:
        """`is_distilled` (of model_index.json) tells klein from its base model, whose weights look
        alike; `remembers_references` tells klein 9B KV.
        """
        self.transformer, self.autoencoder = transformer, autoencoder
        self.text_encoder, self.embedding, self.tokenizer = text_encoder, embedding, tokenizer
        self.is_distilled = is_distilled
        self.remembers_references = remembers_references

    def is_asked_twice(self, guidance: float) -> bool:
        """Whether a step at this strength takes two calls: classifier-free guidance."""
        embeds = self.transformer.config.guidance_embed
        return not self.is_distilled and not embeds and guidance > 1

    # Once a request

    def encode_text(self, prompt: str, guidance: float, negative: str = "") -> TextFeatures:
        """The features of a prompt, and of the negative one where guidance needs it; lazy."""
        texts = [prompt, negative] if self.is_asked_twice(guidance) else [prompt]
        tokens = [self.tokenizer.encode(text) for text in texts]
        return TextFeatures(*(self.text_encoder.encode(ids, self.embedding) for ids in tokens))

    def encode_references(self, pictures: Sequence[np.ndarray]) -> ReferenceTokens:
        """Pictures, uint8 [H, W, 3] each and one at least, as tokens; lazy.

        Raises `UsageError` for a picture that the model does not take (`references.py`).
        """
        side = PATCH * self.autoencoder.downsampling
        parts, ids, sizes = [], [], []
        for number, picture in enumerate(pictures, start=1):
            pixels = fitted(picture, side)
            latents = self.autoencoder.encode(mx.array(to_model_range(pixels)))
            parts.append(pack(latents.astype(mx.float32)))
            ids.append(image_positions(pixels.shape[0] // side, pixels.shape[1] // side, number))
            sizes.append((latents.shape[1], latents.shape[2]))
        return ReferenceTokens(mx.concatenate(parts, axis=1), np.concatenate(ids), sizes[0])

    def prepare(
        self,
        text: TextFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        references: ReferenceTokens | None = None,
    ) -> Flux2Request:
        """Computes modulations, rotary tables and what is remembered of references, lazily.

        Raises `UsageError` where guidance takes negative features and `text` has none.
        """
        if self.is_asked_twice(guidance) and text.negative is None:
            raise UsageError(
                f"At guidance {guidance} this model is asked with a negative prompt too; encode "
                "one, or use guidance 1."
            )
        flow = self.transformer
        rows, columns = (side // PATCH for side in latent_size)
        strength = guidance if flow.config.guidance_embed else None
        ids, tokens, memory = image_positions(rows, columns), None, None
        if references is not None and self.remembers_references:
            memory = flow.remember(references.tokens, references.ids, strength)
        elif references is not None:
            tokens = references.tokens.astype(flow.dtype)
            ids = np.concatenate([ids, references.ids])
        return Flux2Request(
            times=times,
            text=TextFeatures(*(part.astype(flow.dtype) for part in text if part is not None)),
            guidance=guidance,
            modulations=flow.modulations(mx.array(times[:-1], dtype=mx.float32), strength),
            pe=flow.rope(text_positions(text.prompt.shape[1]), ids),
            latent_size=latent_size,
            references=tokens,
            memory=memory,
        )

    # Once a step

    def velocity(
        self,
        request: Flux2Request,
        x: mx.array,
        step: int,
        caches: Sequence[StepCache] | None = None,
    ) -> mx.array:
        """Noise minus image at step `step`, counted from 0: float32, of the shape of x [1, S, 4C].

        `caches` are the image's own, one a call: of the prompt's, and the negative one's.
        """
        flow = self.transformer
        img = x.astype(flow.dtype)
        if request.references is not None:
            img = mx.concatenate([img, request.references], axis=1)
        velocities = []
        for i, text in enumerate(request.text):
            if text is None or (i and not self.is_asked_twice(request.guidance)):
                continue
            velocity = flow(
                img,
                text,
                request.pe,
                request.modulations.at(step),
                caches[i] if caches else None,
                request.memory,
            )
            velocities.append(velocity[:, : x.shape[1]].astype(mx.float32))
        if len(velocities) == 1:
            return velocities[0]
        asked, negative = velocities
        return negative + request.guidance * (asked - negative)

    def denoise(
        self, request: Flux2Request, noise: mx.array, caches: Sequence[StepCache] | None = None
    ) -> Iterator[mx.array]:
        """Yields one image's latents after each step, packed float32 [1, S, 4C], lazy.

        Euler steps along a straight flow, as `sampling/denoise.py` takes them. With empty `caches`,
        as for `velocity`, steps that differ little are approximated, the first and the last never.
        """
        x = noise
        for step in range(request.steps):
            for cache in caches or ():
                cache.is_forced = step == request.steps - 1
            t, t_next = request.times[step], request.times[step + 1]
            x = x + (t_next - t) * self.velocity(request, x, step, caches)
            yield x

    # Once a picture

    def decode(self, x: mx.array, latent_size: tuple[int, int]) -> mx.array:
        """Packed latents [B, S, 4C] to pictures [B, H, W, 3] in [0, 1], float32, lazy."""
        image = self.autoencoder.decode_tiled(unpack(x, latent_size)).astype(mx.float32)
        return mx.clip(image * 0.5 + 0.5, 0.0, 1.0)
