"""FLUX.2's models run together in a test: what a pipeline does, without its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.models.autoencoder.packing import unpack
from fluxmesh.models.autoencoder.reference_grids import encoded
from fluxmesh.models.flux2.references import fitted
from fluxmesh.models.flux2.runtime import (
    Flux2Plan,
    ReferenceTokens,
    TextFeatures,
    plan,
    references_of,
)
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling.denoise import denoise


class Flux2Models:
    """The models of one checkpoint, on one host."""

    def __init__(
        self,
        *,
        transformer: Any,
        text_encoder: Any = None,
        embedding: Any = None,
        tokenizer: Any = None,
        autoencoder: Any = None,
        is_distilled: bool,
        remembers_references: bool = False,
    ) -> None:
        self.transformer, self.autoencoder = transformer, autoencoder
        self.text_encoder, self.embedding, self.tokenizer = text_encoder, embedding, tokenizer
        self.kind: dict[str, Any] = {
            "is_distilled": is_distilled,
            "remembers_references": remembers_references,
        }

    def encode_text(self, prompt: str, guidance: float, negative: str = "") -> TextFeatures:
        texts = [prompt, negative]
        tokens = [self.tokenizer.encode(text) for text in texts]
        return TextFeatures(*self.text_encoder.encode(tokens, self.embedding))

    def encode_references(self, pictures: Sequence[np.ndarray]) -> ReferenceTokens:
        grids = [encoded(self.autoencoder, fitted(picture, 16)) for picture in pictures]
        references = references_of(grids)
        assert references is not None
        return references

    def prepare(
        self,
        text: TextFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        references: ReferenceTokens | None = None,
    ) -> Flux2Plan:
        made = plan(
            self.transformer, text, times, latent_size, guidance, references=references, **self.kind
        )
        return made.prepared(self.transformer)

    def velocity(
        self, request: Flux2Plan, x: mx.array, step: int, caches: Sequence[StepCache] = ()
    ) -> mx.array:
        return request.velocity(self.transformer, x, step, caches)

    def denoise(
        self, request: Flux2Plan, noise: mx.array, caches: Sequence[StepCache] | None = None
    ) -> Iterator[mx.array]:
        for state in denoise(self.transformer, request, noise, caches=caches or ()):
            yield state.x

    def decode(self, x: mx.array, latent_size: tuple[int, int]) -> mx.array:
        image = self.autoencoder.decode_tiled(unpack(x, latent_size)).astype(mx.float32)
        return mx.clip(image * 0.5 + 0.5, 0.0, 1.0)
