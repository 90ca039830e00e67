"""What a family of models tells of its checkpoints: nothing else need know it. Pure, no mlx.

A family is a folder (`flux1/`, `flux2/`). Its `Architecture` says in numbers what one checkpoint
is made of: components with their roles and tensors, what a shard of the denoiser holds, the
geometry of latents, the length of a text, the arithmetic of a step and of a decode. The planner
asks it, and so may everything that reads, quantizes, deals out or writes weights: the way of asking
stays when a family comes.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, Self

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.partition import Partition
from fluxmesh.models.tensor_map import ComponentNames, Tensors, parameter_count
from fluxmesh.models.transformer_shape import TransformerShape
from fluxmesh.request import (
    DTYPE_BYTES,
    MAX_REFERENCES,
    Condition,
    FilledRequest,
    GenerateRequest,
    MapKind,
    SourceImage,
)

Role = Literal["text", "vision", "modulator", "denoiser", "autoencoder"]
"""What a component is for. A modulator works before the first step alone, and the denoiser's blocks
need nothing of it but its results: whoever is short of memory lets it leave. What has the role
"vision" sees reference pictures for a model that reads text (`Architecture.reading_with`): it works
where and when the text encoders do."""


Part = Literal["all", "modulation", "blocks"]
"""Of a transformer: "modulation" is what making modulations needs, "blocks" all that is left when
that has been released."""


class Shifting(Protocol):
    """How a family shifts the time steps of a generation (`sampling/schedule.py`)."""

    @property
    def use_dynamic_shifting(self) -> bool: ...

    @property
    def shift(self) -> float: ...  # used when not dynamic

    def mu(self, image_seq_len: int, steps: int, /) -> float: ...


@dataclass(frozen=True)
class ModelDefaults:
    """What a request takes where the user says nothing."""

    steps: int
    guidance: float
    height: int  # pixels
    width: int  # pixels
    t5_max_length: int  # tokens that a prompt is padded and cut to
    reference_area: int = 1024 * 1024  # pixels of a reference picture; a larger one is made smaller


@dataclass(frozen=True)
class ModelComponent:
    """A part of a model that is loaded, and let go of, as a whole."""

    name: str
    role: Role
    folder: str  # of a diffusers folder, where its tensors are; two components may share one


class Architecture(ABC):
    """One checkpoint's models in numbers: a frozen dataclass, so that two that are equal count
    alike. Its fields are the configs of its models, `defaults`, and what else tells it from others.
    """

    defaults: ModelDefaults
    transformer: Any  # the config of modulator and denoiser, for the family's own code
    autoencoder: Any  # its config
    always_pads = False  # prompts: the transformer reads the rows of padding too
    takes: frozenset[Condition] = frozenset()  # beside a prompt and a picture to begin from
    most_references = MAX_REFERENCES  # pictures, of a model that takes any
    is_tool = False  # it can't paint from a prompt alone
    follows: MapKind | None = None  # of a model that takes `control`, if it is known of which kind
    fills_by_channels = False  # it reads what it paints into at every step, and its mask
    true_cfg = 2.0  # strength against a negative prompt, where a request gives none
    guidance_is_cfg = False  # its guidance is classifier-free: `cfg` and `guidance` are one
    remembers_references = False  # keys and values of their tokens are computed once a request

    @property
    @abstractmethod
    def shifting(self) -> Shifting:
        """How time steps are shifted."""

    @property
    @abstractmethod
    def takes_guidance(self) -> bool:
        """Whether the strength of guidance changes what it paints."""

    @property
    @abstractmethod
    def distilled_steps(self) -> int | None:
        """Of a model that was distilled to paint in few steps, how many; None for any other.

        Such a model knows the noise levels of these steps alone, and is trained at them.
        """

    @property
    def undistilled(self) -> Architecture | None:
        """The model that it was distilled from, where people have that: its adapters fit both."""
        return None

    @property
    @abstractmethod
    def components(self) -> tuple[ModelComponent, ...]:
        """Everything that a picture needs, in the order in which it is needed."""

    @abstractmethod
    def tensors_in(self, folder: str) -> Tensors:
        """Every tensor that a folder's files must have, unquantized, by its name in the model."""

    @abstractmethod
    def modulates(self, name: str) -> bool:
        """Whether a tensor of modulator and denoiser, which share a folder, is the modulator's."""

    def tensors(self, component: str) -> Tensors:
        """Those of a component that are held in memory, by the name that its module has."""
        (part,) = (part for part in self.components if part.name == component)
        tensors = self.tensors_in(part.folder)
        if part.role not in ("modulator", "denoiser"):
            return tensors
        is_modulator = part.role == "modulator"
        return {
            name: tensor for name, tensor in tensors.items() if self.modulates(name) == is_modulator
        }

    @abstractmethod
    def group_size(self, folder: str, name: str, shape: tuple[int, ...]) -> int | None:
        """Columns that share a scale where a tensor is quantized; None where it is kept whole."""

    @property
    @abstractmethod
    def rules(self) -> Mapping[str, bool]:
        """What must hold of the configs before the models can compute, in words, and whether it
        does."""

    @property
    @abstractmethod
    def adapter_names(self) -> tuple[ComponentNames, ...]:
        """What adapters may change, and call it; the denoiser's component comes first."""

    @property
    @abstractmethod
    def shape(self) -> TransformerShape:
        """The denoiser's sizes."""

    @property
    @abstractmethod
    def block_lists(self) -> tuple[str, ...]:
        """What the denoiser calls its lists of blocks, in the order in which they run."""

    @property
    @abstractmethod
    def partition(self) -> Partition:
        """How modulator and denoiser can be dealt to hosts."""

    @property
    def latent_channels(self) -> int:
        """Numbers of one latent."""
        channels: int = self.autoencoder.z_channels
        return channels

    @property
    def downsampling(self) -> int:
        """Pixels that a latent covers along one side."""
        side: int = self.autoencoder.downsampling
        return side

    @property
    @abstractmethod
    def finest_width(self) -> int:
        """Channels of a decode's largest array, at a picture's full height and width."""

    @property
    @abstractmethod
    def finest_encoded_width(self) -> int:
        """The same of an encode."""

    @abstractmethod
    def decode_flops(self, height: int, width: int) -> float:
        """Arithmetic of decoding one image."""

    @property
    def configs(self) -> Mapping[str, Any]:
        """The sizes of its models, and its schedule, each a dataclass."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {
            name: value
            for name, value in values
            if dataclasses.is_dataclass(value) and name != "defaults"
        }

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that a picture depends on, beside weights and vocabularies."""
        fields = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        values = (getattr(self, name) for name in fields if name != "defaults")
        return (*values, self.text_length)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, as the denoiser reads it."""
        return self.defaults.t5_max_length

    def tokens(self, height: int, width: int) -> int:
        """S: tokens of text and image, for a picture of that many pixels."""
        side = 2 * self.downsampling  # pixels along a token
        return self.text_length + math.ceil(height / side) * math.ceil(width / side)

    def calls(self, guidance: float, cfg: float) -> int:
        """Of the denoiser in a step."""
        strength = guidance if self.guidance_is_cfg else cfg
        return 2 if strength > 1 and (self.guidance_is_cfg or "cfg" in self.takes) else 1

    # Conditions. Their pictures have names, that whoever sends them on need not understand.

    def fitted(self, picture: np.ndarray) -> np.ndarray:
        """A reference picture, uint8 [H, W, 3], at the size at which the model reads it.

        Raises `UsageError` for one that the model does not take.
        """
        return picture

    def size_of(self, references: Sequence[np.ndarray]) -> tuple[int, int] | None:
        """(height, width) in pixels of a picture that is made of fitted references, where the user
        asks for none; None: the model's own."""
        return None

    def size_of_control(self, control: np.ndarray) -> tuple[int, int]:
        """(height, width) in pixels of a picture that follows a map, where the user asks for none:
        the map's proportions, as many pixels as the model paints by itself."""
        side = 2 * self.downsampling
        height, width = control.shape[:2]
        scale = math.sqrt(self.defaults.height * self.defaults.width / (height * width))
        rows, columns = (max(1, round(scale * length / side)) for length in (height, width))
        return rows * side, columns * side

    def start(self, request: FilledRequest) -> SourceImage | None:
        """The picture whose latents the steps begin from, and what of it is put back after each."""
        return request.source

    def pictures(self, request: FilledRequest) -> Mapping[str, np.ndarray]:
        """What an engine encodes of a request's conditions, by name (`Runtime.encode_pictures`).

        References are fitted. The picture to begin from is among them only where the model
        `fills_by_channels`.
        """
        return named_references(request.references)

    def check_pictures(self, pictures: Mapping[str, np.ndarray]) -> None:
        """Raises `UsageError` for what is not as `pictures` names and shapes it."""
        for name, picture in pictures.items():
            is_reference = name.startswith(REFERENCE) and name.removeprefix(REFERENCE).isdecimal()
            if not is_reference or "references" not in self.takes:
                raise UsageError(f"The picture {name!r} came, which this model does not read.")
            self.check_reference(name, picture)

    def check_reference(self, name: str, picture: np.ndarray) -> None:
        """Raises `UsageError` for pixels that are not of a size at which references are read."""
        self.check_picture(name, picture)

    def check_picture(self, name: str, picture: np.ndarray, channels: int = 3) -> None:
        """Raises `UsageError` for pixels that are not [height, width, channels], whole tokens."""
        side = 2 * self.downsampling
        is_whole = all(length and length % side == 0 for length in picture.shape[:2])
        if picture.ndim != 3 or picture.shape[2] != channels or not is_whole:
            raise UsageError(
                f"The picture {name!r} came as {list(picture.shape)}; this model reads "
                f"[height, width, {channels}], both sides multiples of {side}."
            )

    def lacking(self, request: GenerateRequest) -> str | None:
        """Why the model can't paint without what a request leaves out, as a clause and a remedy;
        None where nothing lacks."""
        return None

    def reading_with(self, reader: Architecture) -> Self | None:
        """The same, reading reference pictures with the models of `reader` that have the role
        "vision"; None where they are not made for it."""
        return None

    def added_tokens(self, references: Sequence[np.ndarray]) -> int:
        """Tokens that the denoiser reads of fitted references, beside text and picture."""
        side = 2 * self.downsampling
        sizes = (picture.shape for picture in references)
        return sum(math.ceil(shape[0] / side) * math.ceil(shape[1] / side) for shape in sizes)

    def step_flops(self, height: int, width: int) -> float:
        """Arithmetic of one step of one image."""
        return self.shape.flops(self.tokens(height, width))

    def with_inputs(self, inputs: Mapping[str, int], name: str) -> Self:
        """The same with more inputs to some of the denoiser's linears, by their names.

        `name` is that of the adapter which brings them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no linear that takes more inputs")

    def text_flops(self) -> float:
        """Arithmetic of reading one text; without attention's scores, a hundredth of it."""
        numbers = sum(math.prod(shape) for shape in _text_matrices(self))
        return 2.0 * numbers * self.text_length

    @property
    def text_row(self) -> int:
        """Numbers of the widest array that a text encoder makes of a whole prompt."""
        return max(map(max, _text_matrices(self)), default=0) * self.text_length

    def text_layers(self, component: str) -> tuple[str, ...]:
        """How the names of each layer of a text encoder begin, in the order in which they run.

        They hold all that it has: who can't hold it reads the text layer by layer. () for a text
        encoder that is only read as a whole.
        """
        return ()

    def text_layer_bytes(self, dtype: str, bits: int | None) -> int | None:
        """Bytes of the largest layer where every text encoder is made of them; else None."""
        return _text_layer_bytes(self, dtype, bits)

    def looked_up_in(self, folder: str) -> frozenset[str]:
        """Names of a folder's tensors that no model holds: their rows are read when needed."""
        parts = (part.name for part in self.components if part.folder == folder)
        held = {name for part in parts for name in self.tensors(part)}
        return frozenset(self.tensors_in(folder).keys() - held)

    def folder(self, component: str) -> str:
        """Where a component's tensors are. Raises `KeyError` for one that this model lacks."""
        return {part.name: part.folder for part in self.components}[component]

    def of_role(self, *roles: Role) -> tuple[ModelComponent, ...]:
        return tuple(component for component in self.components if component.role in roles)

    def nbytes(self, roles: Iterable[Role], dtype: str, bits: int | None) -> int:
        """Bytes in memory of all components of these roles."""
        return sum(
            _component_bytes(self, component.name, dtype, bits)
            for component in self.of_role(*roles)
        )

    @property
    def transformer_tensors(self) -> Tensors:
        """Modulator and denoiser together: what an adapter may change."""
        parts = (self.tensors(part.name) for part in self.of_role("modulator", "denoiser"))
        return {name: tensor for tensors in parts for name, tensor in tensors.items()}

    def split_bytes(self, dtype: str, bits: int | None) -> int:
        """Of modulator and denoiser, the bytes that `tensor` splits among its hosts."""
        return round(sum(_split_bytes(self, dtype, bits)))

    def largest_split_bytes(self, dtype: str, bits: int | None) -> int:
        """Bytes of the largest linear of these."""
        return _largest_split_bytes(self, dtype, bits)

    def column_part(self, dtype: str, bits: int | None) -> float:
        """The part of these bytes that follows the MLPs' columns; the rest follows the heads."""
        heads, columns = _split_bytes(self, dtype, bits)
        return columns / max(1, heads + columns)

    def parameters(self, role: Role) -> int:
        """Numbers in all components of a role."""
        parts = (self.tensors(component.name) for component in self.of_role(role))
        return sum(map(parameter_count, parts))


REFERENCE = "reference_"  # and its number, from 1: the name of a reference picture


def named_references(pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Reference pictures by the names under which they travel, in their order."""
    return {f"{REFERENCE}{number}": picture for number, picture in enumerate(pictures, start=1)}


@lru_cache(maxsize=256)
def _component_bytes(
    architecture: Architecture, component: str, dtype: str, bits: int | None
) -> int:
    tensors = architecture.tensors(component)
    return _bytes(architecture, component, tensors, dtype, bits)


@lru_cache(maxsize=64)
def _split_bytes(architecture: Architecture, dtype: str, bits: int | None) -> tuple[float, float]:
    """Bytes that follow the heads, and the MLPs' columns."""
    parts = architecture.partition.column_parts
    total = columns = 0.0
    for component in architecture.of_role("modulator", "denoiser"):
        by_part: dict[float, Any] = {}  # few: linears of one kind are cut alike
        for name, tensor in architecture.tensors(component.name).items():
            if (part := parts.get(name.rpartition(".")[0])) is not None:
                by_part.setdefault(part, {})[name] = tensor
        for part, split in by_part.items():
            nbytes = _bytes(architecture, component.name, split, dtype, bits)
            total, columns = total + nbytes, columns + part * nbytes
    return total - columns, columns


@lru_cache(maxsize=64)
def _largest_split_bytes(architecture: Architecture, dtype: str, bits: int | None) -> int:
    modules, largest = architecture.partition.modules, 0
    for component in architecture.of_role("modulator", "denoiser"):
        for name, tensor in architecture.tensors(component.name).items():
            if name.rpartition(".")[0] in modules:
                own = {name: tensor}
                largest = max(largest, _bytes(architecture, component.name, own, dtype, bits))
    return largest


@lru_cache(maxsize=64)
def _text_matrices(architecture: Architecture) -> tuple[tuple[int, ...], ...]:
    """Shapes of what text encoders multiply each token with: what of them is quantized."""
    return tuple(
        tensor.shape
        for part in architecture.of_role("text")
        for name, tensor in architecture.tensors(part.name).items()
        if architecture.group_size(part.folder, name, tensor.shape) is not None
    )


@lru_cache(maxsize=64)
def _text_layer_bytes(architecture: Architecture, dtype: str, bits: int | None) -> int | None:
    largest = 0
    for part in architecture.of_role("text"):
        layers, tensors = architecture.text_layers(part.name), architecture.tensors(part.name)
        if not layers:
            return None
        for layer in layers:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(layer)}
            largest = max(largest, _bytes(architecture, part.name, own, dtype, bits))
    return largest


def _bytes(
    architecture: Architecture, component: str, tensors: Tensors, dtype: str, bits: int | None
) -> int:
    """Bytes of tensors in memory, the large matrices quantized where `bits` says so."""
    total, folder = 0, architecture.folder(component)
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        group = architecture.group_size(folder, name, tensor.shape) if bits else None
        if bits is None or group is None:
            total += count * DTYPE_BYTES[dtype]
        else:  # a scale and a bias a group
            total += count * bits // 8 + 2 * (count // group) * DTYPE_BYTES[dtype]
    return total
