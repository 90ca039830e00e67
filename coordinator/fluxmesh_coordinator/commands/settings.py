"""How to paint, whatever the prompt: what options, a picture's recipe and defaults say together.

What the user chose is laid over the settings of a picture (`--from`), and those over the defaults
below; what is still None after that, the checkpoint decides.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from fluxmesh.errors import UsageError
from fluxmesh.request import AdapterRef, GenerateRequest, SourceImage
from fluxmesh_coordinator.artifacts.recipe import Recipe

if TYPE_CHECKING:
    from fluxmesh.cluster.snapshot import ModelVariant


@dataclass(frozen=True)
class GenerateSettings:
    """How to paint, whatever the prompt; None leaves a choice to the model or to chance."""

    model: str | None = None
    n_images: int = 1
    image_size: tuple[int, int] | None = None  # height, width in pixels
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n_rows: int = 1
    dtype: str = "bfloat16"
    quantize: bool = False
    bits: int | None = None
    adapter: tuple[tuple[str, float], ...] = ()
    fuse_adapter: bool = False
    no_t5_padding: bool = False
    decoding_batch_size: int = 1
    preload_models: bool = False
    low_memory: bool = False
    cache: float = 0.0
    image: str | bytes | None = None  # a file's path, or what is in it
    strength: float | None = None
    mask: str | bytes | None = None
    outpaint: tuple[int, int, int, int] | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        """The settings that made a picture."""
        source = recipe.source
        sized = source is None or source.sized
        return cls(
            model=recipe.model,
            n_images=recipe.n_images,
            image_size=(recipe.height, recipe.width) if sized else None,
            steps=recipe.steps,
            guidance=recipe.guidance,
            seed=recipe.seed,
            n_rows=recipe.n_rows,
            dtype=recipe.dtype,
            quantize=recipe.bits is not None,
            bits=recipe.bits,
            adapter=tuple((path, scale) for path, scale, _ in recipe.adapters),
            fuse_adapter=recipe.fuse_adapters,
            no_t5_padding=not recipe.t5_padding,
            decoding_batch_size=recipe.decoding_batch_size,
            cache=recipe.cache,
            image=source.image if source else None,
            strength=source.strength if source else None,
            mask=source.mask if source else None,
            outpaint=source.outpaint if source else None,
        )

    def with_chosen(self, chosen: Mapping[str, Any]) -> Self:
        """These settings, with what the user chose laid over them."""
        names = {field.name for field in fields(self)}
        return replace(self, **{name: chosen[name] for name in names & chosen.keys()})

    def as_loaded(self, weights: ModelVariant | None) -> Self:
        """Who leaves the model to the mesh gets it as `fluxmesh up` loaded it, quantized or not."""
        is_open = self.model is None and self.dtype == GenerateSettings.dtype
        if weights is None or not is_open or self.effective_bits is not None:
            return self
        return replace(self, dtype=weights.dtype, bits=weights.bits)

    @property
    def effective_bits(self) -> int | None:
        """Bits a weight, None where nothing is quantized; `--bits` alone quantizes too."""
        if self.bits is not None:
            return self.bits
        return 4 if self.quantize else None

    def request(
        self,
        prompt: str,
        seed: int,
        *,
        model: str = "",
        stepwise: bool = False,
        source: SourceImage | None = None,
    ) -> GenerateRequest:
        """The request for `prompt`; raises `UsageError` naming the option that is wrong.

        What is None here is left open in it, too.
        """
        for option in ("mask", "outpaint", "strength") if self.image is None else ():
            if getattr(self, option) is not None:
                raise UsageError(f"--{option} says how to change --image; give one.")
        for option in ("image", "mask"):
            if getattr(self, option) == "":  # of a recipe
                raise UsageError(f"What it was made from was no file by name; give --{option}.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UsageError(f"--strength is {self.strength}; it must be above 0 and at most 1.")
        if self.n_rows < 1:
            raise UsageError(f"--n-rows is {self.n_rows}; it must be at least 1.")
        height, width = self.image_size or (None, None)
        if source is not None:
            height, width = source.pixels.shape[:2]
        return GenerateRequest(
            prompt=prompt,
            seed=seed,
            model=model,
            n_images=self.n_images,
            height=height,
            width=width,
            steps=self.steps,
            guidance=self.guidance,
            dtype=self.dtype,
            bits=self.effective_bits,
            adapters=tuple(AdapterRef(path, scale) for path, scale in self.adapter),
            fuse_adapters=self.fuse_adapter,
            t5_padding=not self.no_t5_padding,
            decoding_batch_size=self.decoding_batch_size,
            preload=self.preload_models,
            low_memory=self.low_memory,
            stepwise=stepwise,
            cache=self.cache,
            source=source,
        )


def draw_seed() -> int:
    """A seed for a user who gave none: short enough to be typed again."""
    return secrets.randbelow(2**32)
