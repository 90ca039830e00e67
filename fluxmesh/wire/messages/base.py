"""What every message is, and the fields that many of them have. Pure; below all other messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np

from fluxmesh.bounds import ArrayOf, Count, NamedArrays, Range, Text

TYPES: dict[str, type[Message]] = {}  # all that travels, by name

JobName = Annotated[str, Text(128)]
JobTitle = Annotated[str, Text(128)]  # what a job is, for people: "4 images, 512x768, dev"
ClientName = Annotated[str, Text(128, re.compile(r"[A-Za-z0-9_.-]{1,128}"))]
BootName = Annotated[str, Text(128)]
Version = Annotated[str, Text(64)]
Sha256 = Annotated[str, Text(64, re.compile(r"[0-9a-f]{64}"))]  # names a file: nothing of a path
Port = Annotated[int, Range(1, 65535)]
Ports = Annotated[tuple[Port, ...], Count(64)]
Rank = Annotated[int, Range(0, 1023)]  # in a ring
RingSize = Annotated[int, Range(1, 1024)]
Components = Annotated[tuple[str, ...], Count(8)]  # "text encoders", "transformer", "autoencoder"

Image = Annotated[int, Range(0, 1 << 31)]  # of a job, counted from 0
Latents = Annotated[np.ndarray, ArrayOf(("float32",), (None, None, None))]  # [images, L, 4C]
OneLatents = Annotated[np.ndarray, ArrayOf(("float32",), (1, None, None))]  # [1, L, 4C]
Picture = Annotated[np.ndarray, ArrayOf(("uint8",), (None, None, 3))]  # [height, width, 3]
Mask = Annotated[np.ndarray, ArrayOf(("uint8",), (None, None))]  # [height, width]
# Pictures by name, and what an engine made of them: `MAX_REFERENCES`, and what stands beside them.
Pictures = Annotated[Mapping[str, np.ndarray], NamedArrays(most=12, dtypes=("uint8",))]
Conditions = Annotated[Mapping[str, np.ndarray], NamedArrays(most=12)]
# What a model reads beside latents, by name: an engine makes it of a text or a picture, and whoever
# keeps it and sends it on to other engines does not know what it is.
Features = Annotated[Mapping[str, np.ndarray], NamedArrays()]


@dataclass(frozen=True)
class Message:
    """Base of all messages."""

    def __init_subclass__(cls, *, is_base: bool = False, **keys: Any) -> None:
        """`is_base`: of other messages, and never sent itself."""
        super().__init_subclass__(**keys)
        if is_base:
            return
        if cls.__name__ in TYPES:
            raise TypeError(f"There is a message {cls.__name__} already.")
        TYPES[cls.__name__] = cls

    @property
    def array_bytes(self) -> int:
        """Of its arrays together."""
        sizes: list[int] = []

        def count(array: np.ndarray) -> np.ndarray:
            sizes.append(array.nbytes)
            return array

        self.with_arrays(count)
        return sum(sizes)

    def with_arrays(self, change: Callable[[np.ndarray], np.ndarray]) -> Self:
        """The same, in which `change` has been made to all arrays."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                changed[name] = change(value)
            elif isinstance(value, Mapping):
                changed[name] = {key: change(array) for key, array in value.items()}
        return replace(self, **changed) if changed else self


@dataclass(frozen=True, kw_only=True)
class Changing(Message, is_base=True):
    """A request that changes the host: only the holder of its lease may send it."""

    fence: int


@dataclass(frozen=True)
class Report(Message, is_base=True):
    """Base of what an agent tells by itself."""
