"""Messages at random, from their annotations: valid ones, and frames that once were."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import msgpack
import numpy as np

from fluxmesh.bounds import ArrayOf, Bytes, Count, NamedArrays, Range, Text
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import StepTiming
from fluxmesh.request import MAX_REFERENCES
from fluxmesh.wire.fields import bounded, hints_of
from fluxmesh.wire.messages import Decode, EncodePictures, Message, Paint
from fluxmesh.wire.protocol import TYPES, Frame, encode

TEXT = "aß猫 z"
NAMES = "abcdef0123456789"


def sample(kind: type[Any], draw: random.Random) -> Any:
    """A dataclass whose every field holds something that it may."""
    values = {name: _value(hint, draw) for name, hint in hints_of(kind).items()}
    if {"shard", "shards"} <= values.keys():  # `Holding` looks whether the two fit
        values["shard"] = values["shard"] % values["shards"]
        units = tuple(draw.randint(1, 99) for _ in range(values["shards"]))
        values["shares"] = draw.choice([EVEN, Shares(heads=units, columns=units)])
    if kind is StepTiming:  # and so does this
        values["shares"] = draw.choice([EVEN, Shares(tokens=(1, 2, 3))])
        values["hosts"] = 3
    return kind(**values | _fitted(kind, values, draw))


def _fitted(kind: type[Any], values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Of fields that a class looks at together, those that are changed so that they fit."""
    if kind is EncodePictures:
        shapes = ((None, None, draw.choice((1, 3))) for _ in values["named"])
        named = zip(values["named"], shapes, strict=True)
        strengths = tuple(draw.uniform(0, 10) for _ in values["named"])[:MAX_REFERENCES]
        return {
            "named": {name: _array(("uint8",), shape, draw) for name, shape in named},
            "strengths": strengths if len(strengths) == len(values["named"]) else (),
        }
    if kind is Decode:
        return {"images": tuple(range(len(values["latents"])))}
    if kind is not Paint:
        return {}
    names = ("latents", "source", "basis_latents")
    like = {name: values["noise"] + 1 for name in names if values[name] is not None}
    if values["mask"] is not None:
        like["height"], like["width"] = values["mask"].shape
    return like


def samples(draw: random.Random, rounds: int = 1) -> list[Message]:
    """Each type of message, `rounds` times."""
    return [sample(kind, draw) for _ in range(rounds) for kind in TYPES.values()]


def _value(hint: Any, draw: random.Random) -> Any:
    hint, bound = bounded(hint)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    match bound:
        case ArrayOf():
            return _array(bound.dtypes, bound.shape, draw)
        case NamedArrays():
            shapes = [(None,) * draw.randint(1, 4) for _ in range(draw.randint(1, bound.most))]
            return {f"n{k}": _array(bound.dtypes, shape, draw) for k, shape in enumerate(shapes)}
        case Range():
            whole = draw.randint(bound.least, bound.most)
            return draw.choice([bound.least, bound.most, whole])
        case Bytes():
            return draw.randbytes(draw.randint(0, bound.most))
        case Text():
            letters = TEXT if bound.pattern is None else NAMES
            return "".join(draw.choice(letters) for _ in range(min(64, bound.most)))
        case Count():
            if parts[-1] is Ellipsis:
                return tuple(_value(parts[0], draw) for _ in range(draw.randint(0, 3)))
            return tuple(_value(part, draw) for part in parts)
    if dataclasses.is_dataclass(hint):
        return sample(typing.cast(type, hint), draw)
    if hint is bool:
        return draw.random() < 0.5
    if hint is float:
        return draw.uniform(0.001, 1e6)
    if origin is Literal:
        return draw.choice(parts)
    assert origin in (types.UnionType, typing.Union), hint
    return None if draw.random() < 0.5 else _value(parts[0], draw)


def _array(
    dtypes: tuple[str, ...], shape: tuple[int | None, ...], draw: random.Random
) -> np.ndarray:
    sizes = [draw.randint(1, 9) if length is None else length for length in shape]
    numbers = np.frombuffer(draw.randbytes(int(np.prod(sizes))), np.uint8)
    return numbers.astype(draw.choice(dtypes)).reshape(sizes)


def same(message: Message, other: Message) -> bool:
    """Whether two messages say the same, arrays too, which `==` leaves out."""
    return message == other and _arrays(message) == _arrays(other)


def _arrays(message: Message) -> list[tuple[object, ...]]:
    """Each of its arrays: where it is, dtype, shape, bytes."""
    arrays: list[tuple[object, ...]] = []
    for name, value in vars(message).items():
        named = value if isinstance(value, Mapping) else {"": value}
        arrays += [
            (name, key, array.dtype.str, array.shape, array.tobytes())
            for key, array in named.items()
            if isinstance(array, np.ndarray)
        ]
    return arrays


JUNK: list[Any] = [
    *(None, True, -1, 2**64 - 1, 1e308, float("nan"), float("inf"), "", "\x00", "../../etc/passwd"),
    *(
        b"",
        b"\xff" * 100,
        [],
        [[]],
        {},
        {"v": 1},
        "x" * 5000,
        list(range(2000)),
        msgpack.Timestamp(1),
    ),
]


def forged(draw: random.Random) -> list[Frame]:
    """Frames of a message, changed as an enemy or a defect might."""
    frames: list[Frame] = [
        bytes(each) for each in encode(sample(draw.choice(list(TYPES.values())), draw), 1)
    ]
    way = draw.randrange(6)
    if way == 0:  # bits
        data = bytearray(frames[0])
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        frames[0] = bytes(data)
    elif way == 1:  # cut
        index = draw.randrange(len(frames))
        frames[index] = frames[index][: draw.randrange(len(frames[index]) + 1)]
    elif way == 2:  # frames lost, repeated, added
        frames = [each for each in frames for _ in range(draw.choice([0, 1, 1, 2]))]
        frames += [draw.randbytes(5)] * draw.choice([0, 0, 1, 20])
    elif way == 3:  # noise
        frames = [draw.randbytes(draw.randint(0, 200)) for _ in range(draw.randint(1, 3))]
    else:  # a value of another type somewhere in the header
        header = msgpack.unpackb(bytes(frames[0]))
        frames[0] = msgpack.packb(_spoiled(header, draw))
    return frames


def _spoiled(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {each: value[each] for each in value if each != key}
        return {**value, key: _spoiled(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        index = draw.randrange(len(value))
        return [*value[:index], _spoiled(value[index], draw), *value[index + 1 :]]
    return draw.choice(JUNK)
