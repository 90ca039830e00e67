"""How to paint, whatever the prompt: what options, a picture's recipe and defaults say together.

What the user chose is laid over the settings of a picture (`--from`), and those over the defaults
below; what is still None after that, the checkpoint decides.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.request import MAX_REFERENCES, AdapterRef, GenerateRequest, SourceImage
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
    text_bits: int | None = None
    adapter: tuple[tuple[str, float], ...] = ()
    fuse_adapter: bool = False
    no_t5_padding: bool = False
    decoding_batch_size: int = 1
    preload_models: bool = False
    low_memory: bool = False
    no_metadata: bool = False  # PNG files hold nothing but the pixels
    cache: float = 0.0
    image: str | bytes | None = None  # a file's path, or what is in it
    strength: float | None = None
    mask: str | bytes | None = None
    outpaint: tuple[int, int, int, int] | None = None
    # Pictures that the prompt speaks of, and how much each of them counts.
    reference: tuple[tuple[str | bytes, float], ...] = ()
    redux: str | None = None  # with what they are read, by a model that reads none by itself
    control: str | bytes | None = None  # a map of edges or depth
    control_from: str | bytes | None = None  # a picture whose edges are such a map
    negative_prompt: str | None = None
    cfg: float | None = None

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
            text_bits=recipe.text_bits,
            adapter=tuple((path, scale) for path, scale, _ in recipe.adapters),
            fuse_adapter=recipe.fuse_adapters,
            no_t5_padding=not recipe.t5_padding,
            decoding_batch_size=recipe.decoding_batch_size,
            cache=recipe.cache,
            image=source.image if source else None,
            strength=source.strength if source else None,
            mask=source.mask if source else None,
            outpaint=source.outpaint if source else None,
            reference=tuple(
                (file.name, strength)
                for file, strength in zip(
                    recipe.references,
                    recipe.reference_strengths or (1.0,) * len(recipe.references),
                    strict=True,
                )
            ),
            redux=recipe.redux or None,
            control=recipe.control.name if recipe.control else None,
            control_from=recipe.control_from.name if recipe.control_from else None,
            negative_prompt=recipe.negative,
            cfg=recipe.cfg,
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
        text_bits = weights.text_bits if self.text_bits is None else self.text_bits
        return replace(self, dtype=weights.dtype, bits=weights.bits, text_bits=text_bits)

    @property
    def effective_bits(self) -> int | None:
        """Bits a weight, None where nothing is quantized; `--bits` alone quantizes too."""
        if self.bits is not None:
            return self.bits
        return 4 if self.quantize else None

    def without_effect(self, *, save_raw: bool = False) -> list[str]:
        """What was chosen and changes nothing here, a sentence each."""
        sentences = []
        if self.n_rows > 1 and (save_raw or self.n_images == 1):
            why = "each image is a file of its own" if save_raw else "there is one image"
            sentences.append(f"`n_rows` has no effect: it is of a grid, and {why}.")
        if self.fuse_adapter and not self.adapter:
            sentences.append("`fuse_adapter` has no effect: there is no `adapter`.")
        if self.redux and not self.reference:
            sentences.append("`redux` has no effect: there is no `reference`.")
        return sentences

    def request(
        self,
        prompt: str,
        seed: int,
        *,
        model: str = "",
        stepwise: bool = False,
        preview_every: int = 0,
        source: SourceImage | None = None,
        references: Sequence[np.ndarray] = (),
        control: np.ndarray | None = None,
    ) -> GenerateRequest:
        """The request for `prompt`; raises `UsageError` naming the option that is wrong.

        What is None here is left open in it, too. `source`, `references` and `control` are what is
        in the files, once these are read.
        """
        for option in ("mask", "outpaint", "strength") if self.image is None else ():
            if getattr(self, option) is not None:
                raise UsageError(
                    f"`{option}` says how to change `image`; give one.", setting=option
                )
        for option in ("image", "mask", "reference", "control", "control_from"):
            names = [file for file, _ in self.reference] if option == "reference" else ()
            if getattr(self, option) == "" or "" in names:
                raise UsageError(f"What it was made from was no file by name; give `{option}`.")
        if len(self.reference) > MAX_REFERENCES:
            raise UsageError.about(
                "reference", f"is given {len(self.reference)} times", f"{MAX_REFERENCES} at most"
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UsageError.about(
                "strength", f"is {self.strength}", "it must be above 0 and at most 1"
            )
        if self.n_rows < 1:
            raise UsageError.about("n_rows", f"is {self.n_rows}", "it must be at least 1")
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
            text_bits=self.text_bits,
            adapters=tuple(AdapterRef(path, scale) for path, scale in self.adapter),
            fuse_adapters=self.fuse_adapter,
            t5_padding=not self.no_t5_padding,
            decoding_batch_size=self.decoding_batch_size,
            preload=self.preload_models,
            low_memory=self.low_memory,
            stepwise=stepwise,
            preview_every=preview_every,
            cache=self.cache,
            source=source,
            references=tuple(references),
            reference_strengths=tuple(strength for _, strength in self.reference)
            if references
            else (),
            redux=self.redux or "",
            control=control,
            control_is_found=control is not None and self.control_from is not None,
            negative=self.negative_prompt or None,  # "" puts that of config.toml aside
            cfg=self.cfg,
        )


def draw_seed() -> int:
    """A seed for a user who gave none: short enough to be typed again."""
    return secrets.randbelow(2**32)
