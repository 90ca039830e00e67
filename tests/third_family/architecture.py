"""Patchwork's checkpoints in numbers. Pure, no mlx."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fluxmesh.models.base import Architecture, ModelComponent, ModelDefaults
from fluxmesh.models.partition import Partition
from fluxmesh.models.tensor_map import ComponentNames, Tensors, TensorTable
from fluxmesh.models.transformer_shape import TransformerShape

PATCH = 2  # latents along a token's side
COMPONENTS = (
    ModelComponent("letters", "text", "letters"),
    ModelComponent("denoiser", "denoiser", "painter"),
    ModelComponent("autoencoder", "autoencoder", "patches"),
)


@dataclass(frozen=True)
class JsonSizes:
    """A config that is written as it is called here."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class PainterSizes(JsonSizes):
    """Of the transformer."""

    width: int = 32
    steps_down: int = 2  # its blocks
    width_of_letters: int = 16


@dataclass(frozen=True)
class LetterSizes(JsonSizes):
    """Of what reads a prompt."""

    width: int = 16


@dataclass(frozen=True)
class PatchSizes(JsonSizes):
    """Of the autoencoder."""

    numbers: int = 6  # of a latent
    side: int = 4  # pixels of it


@dataclass(frozen=True)
class NoShift(JsonSizes):
    """Time steps at even distances."""

    shift: float = 1.0

    use_dynamic_shifting = False

    def mu(self, image_seq_len: int, steps: int, /) -> float:
        return 0.0


@dataclass(frozen=True)
class PatchworkArchitecture(Architecture):
    """A checkpoint of Patchwork."""

    transformer: PainterSizes = PainterSizes()
    letters: LetterSizes = LetterSizes()
    autoencoder: PatchSizes = PatchSizes()
    defaults: ModelDefaults = ModelDefaults(3, 1.0, 32, 32, 24)
    schedule: NoShift = NoShift()

    always_pads = True
    takes_guidance = False
    distilled_steps = None

    @property
    def shifting(self) -> NoShift:
        return self.schedule

    @property
    def components(self) -> tuple[ModelComponent, ...]:
        return COMPONENTS

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.numbers

    @property
    def downsampling(self) -> int:
        return self.autoencoder.side

    @property
    def token_numbers(self) -> int:
        return self.latent_channels * PATCH**2

    def tensors_in(self, folder: str) -> Tensors:
        table, width = TensorTable(), self.transformer.width

        def linear(name: str, out: int, into: int) -> None:
            table.linear(name, name, out, into, bias=False)

        if folder == "letters":
            table.same("table.weight", "table.weight", (256, self.letters.width))
            linear("mix", self.letters.width, self.letters.width)
        elif folder == "patches":
            pixels = 3 * self.autoencoder.side**2
            linear("see", self.latent_channels, pixels)
            linear("show", pixels, self.latent_channels)
        else:
            linear("enter", width, self.token_numbers)
            linear("place", width, 2)
            linear("clock", width, 1)
            linear("read", width, self.transformer.width_of_letters)
            linear("leave", self.token_numbers, width)
            for i in range(self.transformer.steps_down):
                name = f"stairs.{i}"
                table.same(f"{name}.norm.weight", f"{name}.norm.weight", (width,))
                linear(f"{name}.look", 3 * width, width)
                linear(f"{name}.widen", 2 * width, width)
                linear(f"{name}.narrow", width, 2 * width)
        return table.tensors

    def modulates(self, name: str) -> bool:
        return False

    def group_size(self, folder: str, name: str, shape: tuple[int, ...]) -> int | None:
        is_matrix = name.startswith("stairs.") and len(shape) == 2
        return 32 if folder == "painter" and is_matrix else None

    @property
    def rules(self) -> Mapping[str, bool]:
        width = self.transformer.width_of_letters
        return {"the painter must read what the letters give": width == self.letters.width}

    @property
    def adapter_names(self) -> tuple[ComponentNames, ...]:
        return (ComponentNames("painter", self.tensors_in("painter"), ("painter.",)),)

    @property
    def shape(self) -> TransformerShape:
        width, depth = self.transformer.width, self.transformer.steps_down
        return TransformerShape(width, 2 * width, 1, 0, depth)

    @property
    def block_lists(self) -> tuple[str, ...]:
        return ("stairs",)

    @property
    def partition(self) -> Partition:
        """It has one head, which nothing divides."""
        width = self.transformer.width
        return Partition(1, width, 2 * width, lambda shard: {}, lambda name, columns: None)

    @property
    def finest_width(self) -> int:
        return 3

    @property
    def finest_encoded_width(self) -> int:
        return 3

    def decode_flops(self, height: int, width: int) -> float:
        return 6.0 * height * width * self.latent_channels
