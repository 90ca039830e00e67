"""Messages at random, from their annotations: valid ones, and frames that once were."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from typing import Any, Literal

import msgpack
import numpy as np

from fluxmesh.wire import limits
from fluxmesh.wire.messages import Message
from fluxmesh.wire.protocol import TYPES, Frame, encode

TEXT = "aß猫 z"
NAMES = "abcdef0123456789"


def sample(kind: type[Any], draw: random.Random) -> Any:
    """A dataclass whose every field holds something that it may."""
    hints = typing.get_type_hints(kind)
    values = {
        field.name: _value(hints[field.name], f"{kind.__name__}.{field.name}", draw)
        for field in dataclasses.fields(kind)
    }
    if {"shard", "shards"} <= values.keys():  # `Holding` looks whether the two fit
        values["shard"] = values["shard"] % values["shards"]
    return kind(**values)


def samples(draw: random.Random, rounds: int = 1) -> list[Message]:
    """Each type of message, `rounds` times."""
    return [sample(kind, draw) for _ in range(rounds) for kind in TYPES.values()]


def _limit(table: dict[str, Any], where: str, default: Any) -> Any:
    return table.get(where, table.get(where.rpartition(".")[2], default))


def _value(hint: Any, where: str, draw: random.Random) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is np.ndarray:
        return _array(where, draw)
    if dataclasses.is_dataclass(hint):
        return sample(typing.cast(type, hint), draw)
    if hint is bool:
        return draw.random() < 0.5
    if hint is int:
        least, most = _limit(limits.INTEGERS, where, (0, limits.MAX_INTEGER))
        return draw.choice([least, most, draw.randint(least, most)])
    if hint is float:
        return draw.uniform(0.001, 1e6)
    if hint is bytes:
        return draw.randbytes(draw.randint(0, limits.MAX_BYTES))
    if hint is str:
        letters = NAMES if _limit(limits.PATTERNS, where, None) else TEXT
        return "".join(draw.choice(letters) for _ in range(64))
    if origin is Literal:
        return draw.choice(parts)
    if origin in (types.UnionType, typing.Union):
        return None if draw.random() < 0.5 else _value(parts[0], where, draw)
    assert origin is tuple, where
    if parts[-1] is Ellipsis:
        return tuple(_value(parts[0], where, draw) for _ in range(draw.randint(0, 3)))
    return tuple(_value(part, where, draw) for part in parts)


def _array(where: str, draw: random.Random) -> np.ndarray:
    dtypes, shape = _limit(limits.ARRAYS, where, None)
    sizes = [draw.randint(1, 9) if length is None else length for length in shape]
    numbers = np.frombuffer(draw.randbytes(int(np.prod(sizes))), np.uint8)
    return numbers.astype(draw.choice(dtypes)).reshape(sizes)


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, arrays too, which `==` leaves out."""
    if one != other:
        return False
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray) and (a.dtype != b.dtype or not np.array_equal(a, b)):
            return False
    return True


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
