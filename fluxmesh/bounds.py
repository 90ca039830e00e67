"""What a field may hold at most: words for its annotation. Pure; below all that is described so.

    height: Pixels                                      # Annotated[int, Range(1, 1 << 15)]
    prompt: Annotated[str, Text(1 << 17)]
    ports: Annotated[tuple[Port, ...], Count(64)]       # the items have bounds of their own
    latents: Annotated[np.ndarray, ArrayOf(("float32",), (None, None, None))]
    features: Annotated[Mapping[str, np.ndarray], NamedArrays()]

A class that travels says with them what it takes, `wire/fields.py` holds to it what is sent and
what arrives. A number, a text, bytes or a tuple that says nothing is held to `DEFAULTS`; an array
must say what it is. They are far above what FLUX needs, and low enough that no message can fill a
host's memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fluxmesh.errors import UsageError

MAX_INTEGER = 2**63 - 1
MAX_ARRAY = 128 << 20  # bytes: the latents of 16 images at 2048 x 2048 are half of it
MAX_DIMENSIONS = 4  # of an array
MAX_PREVIEW = 256  # pixels along one side of a picture that is shown while it is painted


@dataclass(frozen=True)
class Range:
    """An integer's least and greatest value, both allowed."""

    least: int
    most: int


@dataclass(frozen=True)
class Text:
    """A text's length. Where `pattern` stands, all of it must match."""

    most: int = 4096  # characters
    pattern: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Bytes:
    """The length of a nonce or a token."""

    most: int = 64


@dataclass(frozen=True)
class Count:
    """How many items a tuple of any length has."""

    most: int


@dataclass(frozen=True)
class ArrayOf:
    """The dtypes that an array may have, and its shape: None is any length of at least 1."""

    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...]
    nbytes: int = MAX_ARRAY


@dataclass(frozen=True)
class NamedArrays:
    """Arrays of any shape by name, which whoever passes them on need not know."""

    most: int = 8  # of them; at least one
    name: re.Pattern[str] = re.compile(r"[a-z][a-z0-9_]{0,31}")
    dtypes: tuple[str, ...] = ("uint16", "float32")  # uint16 holds bfloat16
    nbytes: int = MAX_ARRAY  # of all of them together


Bound = Range | Text | Bytes | Count | ArrayOf | NamedArrays
DEFAULTS: dict[type, Bound] = {
    int: Range(0, MAX_INTEGER),
    str: Text(),
    bytes: Bytes(),
    tuple: Count(1024),
}


def check_shard(shard: int, shards: int) -> None:
    """Raises `UsageError` where there is no such part of so many."""
    if not 0 <= shard < shards:
        raise UsageError(f"Shard {shard} of {shards} does not exist.")


def sendable(sentence: str) -> str:
    """A text as a message may carry it, whatever somebody's file put into it."""
    return sentence.encode("utf-8", "replace").decode()[: Text.most]


Pixels = Annotated[int, Range(1, 1 << 15)]  # of a side
Bits = Annotated[int, Range(2, 16)]  # of a quantized weight
Shards = Annotated[int, Range(1, 1024)]
ShardIndex = Annotated[int, Range(0, 1023)]
