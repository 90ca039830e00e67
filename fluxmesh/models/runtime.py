"""What a family computes, behind one face: text to features, a step's velocity, pictures.

Beside `base.py`, which has a family's checkpoints in numbers: this is the half that needs mlx, and
an engine alone loads it (`registry.runtime_of`). The sampler, the pipeline and an engine's units of
work know the classes here and no family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError
from fluxmesh.models.base import Part
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.partition import Shard
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import PromptCut

PromptFeatures = Mapping[str, mx.array]
"""What the denoiser is told of a prompt, by names that its family gives: each has 1 first, and what
has three axes has one vector a token of the text."""


Conditions = Mapping[str, mx.array]
"""What the denoiser is told of pictures, by names that its family gives; each has 1 first."""

NO_CONDITIONS: Conditions = {}


class Flow(Protocol):
    """A transformer: the denoiser with its modulator, whole, a shard, or spread over hosts."""

    @property
    def dtype(self) -> mx.Dtype: ...

    @property
    def modulation_released(self) -> bool: ...

    def release_modulation(self) -> None: ...

    def hold(self, shard: Shard, /) -> None:
        """Is told which part of it was loaded; by default, the whole."""

    def make_room(self) -> None:
        """Once its weights are there, in float16 alone: divides what would overflow (`ops.py`)."""


class DenoisePlan(ABC):
    """What every step of every image of one request has in common."""

    times: list[float]  # noise levels from the first to 0.0: one more than steps
    latent_size: tuple[int, int]  # (height, width) in latents
    calls = 1  # of the transformer in a step; each has a cache of its own

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    @abstractmethod
    def arrays(self) -> Sequence[Any]:
        """What has to be evaluated before the first step, and before modulations leave."""

    def prepared(self, flow: Any) -> DenoisePlan:
        """The plan with what takes the whole transformer, lazily; itself where nothing does.

        Ranks of a ring do it together.
        """
        return self

    @abstractmethod
    def velocity(
        self, flow: Any, x: mx.array, step: int, caches: Sequence[StepCache] = ()
    ) -> mx.array:
        """Noise minus image at step `step`, counted from 0: float32, of the shape of x [1, L, 4C].

        `caches` are the image's own, one a call, or none.
        """


Ask = Callable[[mx.array, mx.array, int], mx.array]
"""`ask(img, text, call)`: the velocity, float32, of packed latents `img` with a text's features."""


def guided_velocity(ask: Ask, img: mx.array, texts: Sequence[mx.array], scale: float) -> mx.array:
    """The velocity of a step, with one text or with a second one to move away from; lazy.

    Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): two calls of
    the transformer, and a step along `v_neg + scale * (v - v_neg)`. The base models of FLUX.2 are
    made for it; FLUX.1 dev, whose guidance is embedded, takes it on top.

    All that the second call computes waits for the first: collectives carry no tag, and ranks that
    have other tokens describe other graphs, in which nothing else would order the two.
    """
    asked = ask(img, texts[0], 0)
    if len(texts) == 1:
        return asked
    negative = ask(_behind(img, asked), _behind(texts[1], asked), 1)
    return negative + scale * (asked - negative)


def _behind(x: mx.array, before: mx.array) -> mx.array:
    """`x` to the bit, after `before`: by data, for in a CUDA graph nothing else gives an order."""
    return mx.where(mx.array(True), x, before.reshape(-1)[:1].astype(x.dtype))


class TextModels(Protocol):
    """Where a runtime finds the models and the vocabularies that read a prompt."""

    def text_model(self, name: str) -> Any:
        """One that reads the prompts of one request, whole or layer by layer."""

    @property
    def tokenizers(self) -> Any: ...

    def text_files(self, name: str) -> Sequence[Path]: ...


class PictureModels(Protocol):
    """Where a runtime finds the models that read a picture."""

    @property
    def ae(self) -> Any: ...

    @property
    def vision(self) -> Mapping[str, Any]: ...  # those of the role "vision", by component


class Runtime(ABC):
    """A family's models of one architecture: how they are made, and what they do together."""

    text_models: tuple[str, ...]  # names of the text encoders, in the order in which they load

    def __init__(self, architecture: Any) -> None:
        self.architecture: Any = architecture

    # Models

    @abstractmethod
    def build(self, component: str) -> nn.Module:
        """A component's model, its weights still to come. "transformer" is the denoiser with its
        modulator, "autoencoder", the `text_models` and what has the role "vision" the others.

        Raises `WeightsError` for sizes that don't go together.
        """

    def by_layers(
        self, component: str, dtype: mx.Dtype, layers: Callable[[], Iterator[nn.Module]]
    ) -> Any:
        """A text encoder that holds no layer: `layers` gives each when the text comes to it.

        Of those that have `Architecture.text_layers`.
        """
        raise NotImplementedError(component)

    @abstractmethod
    def is_part(self, part: Part, name: str) -> bool:
        """Whether a tensor of the transformer belongs to a part."""

    @abstractmethod
    def spread(self, flow: Any, placement: str, ranks: Ranks, shares: Shares = EVEN) -> Any:
        """The transformer on several hosts, for `tensor` or `sequence`; `shares` are theirs."""

    # Text

    @abstractmethod
    def load_tokenizers(self, folders: Mapping[str, Any]) -> Any:
        """The vocabularies. Raises `WeightsError` for those of another model."""

    @abstractmethod
    def tokenize(self, models: TextModels, prompt: str, padded: bool) -> tuple[mx.array, ...]:
        """A prompt's tokens [1, T], for each text encoder."""

    @abstractmethod
    def cut(self, models: TextModels, prompt: str) -> PromptCut | None:
        """What of a prompt the text encoders leave out; None: nothing."""

    @abstractmethod
    def encode(
        self, models: TextModels, prompt: str, padded: bool, negative: str | None = None
    ) -> PromptFeatures:
        """A prompt's features, lazy; `padded` to the length that the model was trained with.

        `negative` is what to move away from; None is the model's own, of one that is guided so.
        """

    @abstractmethod
    def blank(self, dtype: mx.Dtype) -> PromptFeatures:
        """PromptFeatures of the usual shapes that say nothing: steps are timed with them."""

    def blank_conditions(self, latent_size: tuple[int, int]) -> Conditions:
        """The same of pictures that the model can't do without."""
        return NO_CONDITIONS

    readers: Mapping[str, str]  # what makes each named feature, as a user would call it
    prompt_features: tuple[str, ...]  # those that say what is to be seen, which training reads

    @property
    @abstractmethod
    def feature_axes(self) -> Mapping[str, int]:
        """How many axes each named feature has."""

    optional_features: frozenset[str] = frozenset()  # of these, what not every prompt gives

    # Pictures beside the prompt

    def encode_pictures(
        self,
        models: PictureModels,
        pictures: Mapping[str, np.ndarray],
        strengths: Sequence[float] = (),
    ) -> Conditions:
        """What `plan` reads of `Architecture.pictures`, lazy; `strengths` are the references', of a
        model that takes such. Raises `UsageError` for others."""
        raise UsageError(f"This model reads no {', '.join(pictures)}.")

    # Steps

    @abstractmethod
    def plan(
        self,
        flow: Any,
        features: PromptFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        *,
        cfg: float = 1.0,
        conditions: Conditions = NO_CONDITIONS,
    ) -> DenoisePlan:
        """What all images of a request share, lazily.

        With `cfg` above 1, each step moves away from the negative prompt. Raises `UsageError` for
        conditions that are not this model's.
        """

    @abstractmethod
    def velocities(
        self,
        flow: Any,
        x: mx.array,
        features: PromptFeatures,
        times: mx.array,
        grid: tuple[int, int],
        guidance: float,
    ) -> mx.array:
        """Noise minus image of B images [B, L, 4C], each at its own noise level, for training.

        `features` are the prompts' (of `prompt_features`), one behind the other; `times` is float32
        [B], `grid` the rows and columns of tokens. A model that is asked twice a step for its
        guidance is asked once here: it learns from what is there.
        """

    @abstractmethod
    def conditioning(
        self, noise: mx.array, features: PromptFeatures, latent_size: tuple[int, int]
    ) -> tuple[mx.array, ...]:
        """What `FluxPipeline.generate_latents` gives first: the noise [N, L, 4C], then what the
        transformer is told beside it, for each of the N images."""
