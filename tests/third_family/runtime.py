"""What Patchwork computes: its models, and what they do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError
from fluxmesh.models.base import Part
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.partition import Shard
from fluxmesh.models.runtime import (
    NO_CONDITIONS,
    Conditions,
    DenoisePlan,
    PromptFeatures,
    Runtime,
    TextModels,
)
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import PromptCut
from tests.third_family.architecture import PATCH, PatchworkArchitecture
from tests.third_family.family import Letters


class LetterReader(nn.Module):
    """Bytes to features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(256, width)
        self.mix = nn.Linear(width, width, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        """Ids [1, T] to [1, T, width]."""
        return mx.tanh(self.mix(self.table(ids)))


class Stair(nn.Module):
    """One attention of all tokens, and what is beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.look = nn.Linear(width, 3 * width, bias=False)
        self.widen = nn.Linear(width, 2 * width, bias=False)
        self.narrow = nn.Linear(2 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens [B, S, width]."""
        inside = self.norm(x)
        q, k, v = mx.split(self.look(inside)[:, None], 3, axis=-1)
        scale = x.shape[-1] ** -0.5
        seen = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0]
        return x + seen + self.narrow(nn.gelu(self.widen(inside)))


class PatchPainter(nn.Module):
    """The transformer."""

    modulation_released = False  # it has none

    def __init__(self, model: PatchworkArchitecture) -> None:
        super().__init__()
        width, numbers = model.transformer.width, model.token_numbers
        self.enter = nn.Linear(numbers, width, bias=False)
        self.place = nn.Linear(2, width, bias=False)
        self.clock = nn.Linear(1, width, bias=False)
        self.read = nn.Linear(model.transformer.width_of_letters, width, bias=False)
        self.leave = nn.Linear(width, numbers, bias=False)
        self.stairs = [Stair(width) for _ in range(model.transformer.steps_down)]

    @property
    def dtype(self) -> mx.Dtype:
        return self.enter.weight.dtype

    def release_modulation(self) -> None:
        return

    def make_room(self) -> None:
        return

    def hold(self, shard: Shard) -> None:
        assert shard == Shard(), "it can't be dealt out"

    def __call__(self, img: mx.array, txt: mx.array, places: mx.array, times: mx.array) -> mx.array:
        """The velocity of packed latents [B, L, 4C], with text [B, T, letters], times [B]."""
        clock = self.clock(times.astype(self.dtype)[:, None])[:, None]
        img = self.enter(img.astype(self.dtype)) + self.place(places.astype(self.dtype)) + clock
        x = mx.concatenate([self.read(txt.astype(self.dtype)), img], axis=1)
        for stair in self.stairs:
            x = stair(x)
        return self.leave(x[:, txt.shape[1] :])


class Patches(nn.Module):
    """The autoencoder: a square of pixels is one latent."""

    def __init__(self, numbers: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.see = nn.Linear(3 * side**2, numbers, bias=False)
        self.show = nn.Linear(numbers, 3 * side**2, bias=False)

    def encode(self, x: mx.array) -> mx.array:
        """Pictures [B, H, W, 3] in [-1, 1] to latents [B, h, w, C]."""
        B, H, W, _ = x.shape
        squares = x.reshape(B, H // self.side, self.side, W // self.side, self.side, 3)
        squares = squares.transpose(0, 1, 3, 2, 4, 5)
        latents: mx.array = self.see(squares.reshape(B, H // self.side, W // self.side, -1))
        return latents

    def decode_tiled(self, z: mx.array) -> mx.array:
        """Latents to pictures."""
        B, h, w, _ = z.shape
        squares = mx.tanh(self.show(z.astype(self.show.weight.dtype)))
        squares = squares.reshape(B, h, w, self.side, self.side, 3).transpose(0, 1, 3, 2, 4, 5)
        return squares.reshape(B, h * self.side, w * self.side, 3)


def places_of(grid: tuple[int, int]) -> mx.array:
    """Rows and columns of tokens [1, L, 2], from 0 to 1."""
    rows, columns = grid
    row, column = mx.meshgrid(mx.arange(rows) / rows, mx.arange(columns) / columns, indexing="ij")
    return mx.stack([row.reshape(-1), column.reshape(-1)], axis=-1)[None]


@dataclass(frozen=True)
class PatchworkPlan(DenoisePlan):
    """Of one request."""

    times: list[float]
    latent_size: tuple[int, int]
    text: mx.array
    places: mx.array

    @property
    def arrays(self) -> Sequence[Any]:
        return (self.text, self.places)

    def velocity(
        self, flow: PatchPainter, x: mx.array, step: int, caches: Sequence[StepCache] = ()
    ) -> mx.array:
        return flow(x, self.text, self.places, mx.array([self.times[step]])).astype(mx.float32)


class PatchworkRuntime(Runtime):
    """The models of one checkpoint of Patchwork."""

    architecture: PatchworkArchitecture
    text_models = ("letters",)
    readers: Mapping[str, str] = {"letters": "what reads letters"}
    prompt_features = ("letters",)
    feature_axes: Mapping[str, int] = {"letters": 3}  # type: ignore[assignment]

    def build(self, component: str) -> nn.Module:
        sizes = self.architecture
        if component == "letters":
            return LetterReader(sizes.letters.width)
        if component == "autoencoder":
            return Patches(sizes.autoencoder.numbers, sizes.autoencoder.side)
        return PatchPainter(sizes)

    def is_part(self, part: Part, name: str) -> bool:
        return part != "modulation" or name == "enter.weight"  # which tells the dtype

    def spread(self, flow: Any, placement: str, ranks: Ranks, shares: Shares = EVEN) -> Any:
        raise UsageError("Patchwork paints a picture on one host; choose `placement` data.")

    def load_tokenizers(self, folders: Mapping[str, Any]) -> Letters:
        return Letters(self.architecture.text_length)

    def tokenize(self, models: TextModels, prompt: str, padded: bool) -> tuple[mx.array, ...]:
        return (mx.array([models.tokenizers.ids(prompt)]),)

    def cut(self, models: TextModels, prompt: str) -> PromptCut | None:
        letters: Letters = models.tokenizers
        return letters.cut(prompt)

    def encode(
        self, models: TextModels, prompt: str, padded: bool, negative: str | None = None
    ) -> PromptFeatures:
        return {"letters": models.text_model("letters")(*self.tokenize(models, prompt, padded))}

    def blank(self, dtype: mx.Dtype) -> PromptFeatures:
        shape = (1, self.architecture.text_length, self.architecture.letters.width)
        return {"letters": mx.zeros(shape, dtype)}

    def plan(
        self,
        flow: PatchPainter,
        features: PromptFeatures,
        times: list[float],
        latent_size: tuple[int, int],
        guidance: float,
        *,
        cfg: float = 1.0,
        conditions: Conditions = NO_CONDITIONS,
    ) -> PatchworkPlan:
        rows, columns = (side // PATCH for side in latent_size)
        return PatchworkPlan(times, latent_size, features["letters"], places_of((rows, columns)))

    def velocities(
        self,
        flow: PatchPainter,
        x: mx.array,
        features: PromptFeatures,
        times: mx.array,
        grid: tuple[int, int],
        guidance: float,
    ) -> mx.array:
        return flow(x, features["letters"], places_of(grid), times)

    def conditioning(
        self, noise: mx.array, features: PromptFeatures, latent_size: tuple[int, int]
    ) -> tuple[mx.array, ...]:
        return (noise, features["letters"])
