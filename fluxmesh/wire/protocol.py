"""Messages to frames and back: a msgpack header, then the arrays as they lie in memory. Pure.

    frame 0   {"v": 1, "type": "Stepped", "seq": 0, "fields": {"job": ..., "latents": <array>}}
    frame 1.. the bytes of the arrays, in the order of their fields

Everything that arrives is held to the annotations of `messages.py` and `training/messages.py` and
to `limits.py` before anything is built from it: an unknown version, type or field, a missing one, a
wrong type, a number out of bounds, an array whose bytes don't match its shape are a
`ProtocolError`, never a crash. What is sent is held to the same, so that a mistake shows where it
was made. There is no pickle, and no code travels. `transport/` and `stream.py` carry the frames.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgpack
import numpy as np

from fluxmesh.errors import FluxmeshError
from fluxmesh.wire import limits, messages
from fluxmesh.wire import training_messages as training
from fluxmesh.wire.messages import Message

VERSION = 1  # of the protocol: rises when an old peer would misread a message

Frame = bytes | memoryview
Code = Literal["version", "malformed"]

_BASES = {messages.Message, messages.Changing, messages.Work, messages.Report}
TYPES: dict[str, type[Message]] = {
    name: kind
    for name, kind in (vars(messages) | vars(training)).items()
    if isinstance(kind, type) and issubclass(kind, Message) and kind not in _BASES
}


class ProtocolError(FluxmeshError):
    """Frames that are no message. `code` is that of `messages.Refused`; `seq` 0 if unknown."""

    def __init__(self, text: str, code: Code = "malformed", seq: int = 0) -> None:
        super().__init__(text)
        self.code: Code = code
        self.seq = seq


def encode(message: Message, seq: int = 0) -> list[Frame]:
    """The frames of a message. `seq` matches answers to requests; reports have 0.

    Arrays aren't copied: they must not change before the frames are sent. Raises `ProtocolError`
    where a field is not what its annotation and its limits say.
    """
    name = type(message).__name__
    if TYPES.get(name) is not type(message):
        raise ProtocolError(f"{name} is no message that can be sent.")
    arrays: list[Frame] = []
    fields = _pack_fields(message, name, arrays)
    header = {"v": VERSION, "type": name, "seq": _integer(seq, "seq"), "fields": fields}
    try:
        packed: bytes = msgpack.packb(header)
    except UnicodeEncodeError:
        raise ProtocolError(f"{name} holds text that is not Unicode.") from None
    if len(packed) > limits.MAX_HEADER:
        raise ProtocolError(f"{name} is {len(packed)} bytes without its arrays, over the limit.")
    return [packed, *arrays]


def decode(frames: Sequence[Frame]) -> tuple[int, Message]:
    """(seq, message) of frames from anyone. Arrays are views of the frames, and read-only.

    Raises `ProtocolError` for whatever `encode` would not have made.
    """
    if not 1 <= len(frames) <= limits.MAX_FRAMES:
        raise ProtocolError(f"A message of {len(frames)} frames; at most {limits.MAX_FRAMES}.")
    header = _header(frames[0])
    seq = header.get("seq")
    if type(seq) is not int or not 0 <= seq <= limits.MAX_INTEGER:
        raise ProtocolError("A message without a sequence number.")
    try:
        return seq, _message(header, frames[1:])
    except ProtocolError as error:
        error.seq = seq
        raise


def _header(frame: Frame) -> dict[str, Any]:
    size = memoryview(frame).nbytes
    if size > limits.MAX_HEADER:
        raise ProtocolError(f"A header of {size} bytes; at most {limits.MAX_HEADER}.")
    try:
        header = msgpack.unpackb(frame, use_list=True, max_ext_len=0)
    except (ValueError, RecursionError):  # what msgpack raises for all that is not msgpack
        raise ProtocolError("A header that is not msgpack.") from None
    if type(header) is not dict:
        raise ProtocolError("A header that is not a map.")
    return header


def _message(header: dict[str, Any], arrays: Sequence[Frame]) -> Message:
    if header.get("v") != VERSION:
        raise ProtocolError(
            f"The other side speaks another version of the protocol than {VERSION}; "
            "install the same fluxmesh on all machines.",
            "version",
        )
    if header.keys() != {"v", "type", "seq", "fields"}:
        raise ProtocolError("A header with keys that are unknown or missing.")
    name = header["type"]
    kind = TYPES.get(name) if type(name) is str else None
    if kind is None:
        raise ProtocolError("A message of a type that is unknown.")
    left = iter(arrays)
    message: Message = _unpack_fields(header["fields"], kind, kind.__name__, left)
    if next(left, None) is not None:
        raise ProtocolError(f"{kind.__name__} has more frames than arrays.")
    return message


# Fields


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """The annotations of a dataclass's fields, evaluated."""
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


@functools.cache
def _needed(kind: type) -> frozenset[str]:
    return frozenset(
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    )


def _pack_fields(value: Any, where: str, arrays: list[Frame]) -> dict[str, Any]:
    return {
        name: _pack(getattr(value, name), hint, f"{where}.{name}", arrays)
        for name, hint in _hints(value.__class__).items()
    }


def _unpack_fields(plain: Any, kind: type, where: str, arrays: Iterator[Frame]) -> Any:
    if type(plain) is not dict:
        raise ProtocolError(f"{where} is not a map of fields.")
    hints: dict[str, Any] = _hints(kind)
    if not plain.keys() <= hints.keys():
        raise ProtocolError(f"{where} has fields that are unknown.")
    if missing := _needed(kind) - plain.keys():
        raise ProtocolError(f"{where} lacks {', '.join(sorted(missing))}.")
    values = {
        name: _unpack(plain[name], hint, f"{kind.__name__}.{name}", arrays)
        for name, hint in hints.items()
        if name in plain
    }
    try:
        return kind(**values)
    except FluxmeshError as error:  # what the class itself holds its fields to
        raise ProtocolError(f"{where}: {error}") from None


def _pack(value: Any, hint: Any, where: str, arrays: list[Frame]) -> Any:
    if hint is np.ndarray:
        return _pack_array(value, where, arrays)
    if dataclasses.is_dataclass(hint):
        if type(value) is not hint:
            raise ProtocolError(f"{where} must be a {getattr(hint, '__name__', hint)}.")
        return _pack_fields(value, type(value).__name__, arrays)
    return _common(value, hint, where, lambda v, h: _pack(v, h, where, arrays))


def _unpack(plain: Any, hint: Any, where: str, arrays: Iterator[Frame]) -> Any:
    if hint is np.ndarray:
        return _unpack_array(plain, where, arrays)
    if dataclasses.is_dataclass(hint):
        return _unpack_fields(plain, typing.cast(type, hint), where, arrays)
    return _common(plain, hint, where, lambda v, h: _unpack(v, h, where, arrays))


def _common(value: Any, hint: Any, where: str, inner: Callable[[Any, Any], Any]) -> Any:
    """What is held to the same rules on both ways; `inner` does the items of a tuple."""
    if hint in _SCALARS:
        return _SCALARS[hint](value, where)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if type(value) is not str or value not in parts:
            raise ProtocolError(f"{where} must be one of {', '.join(parts)}.")
        return value
    if origin in (types.UnionType, typing.Union):
        (other,) = (part for part in parts if part is not type(None))
        return None if value is None else inner(value, other)
    assert origin is tuple, f"{where}: no rule for {hint}"
    return _tuple(value, parts, where, inner)


def _tuple(
    value: Any, parts: tuple[Any, ...], where: str, inner: Callable[[Any, Any], Any]
) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ProtocolError(f"{where} must be a list.")
    if len(parts) == 2 and parts[1] is Ellipsis:
        most = _limit(limits.COUNTS, where, limits.MAX_COUNT)
        if len(value) > most:
            raise ProtocolError(f"{where} has {len(value)} items; at most {most}.")
        return tuple(inner(item, parts[0]) for item in value)
    if len(value) != len(parts):
        raise ProtocolError(f"{where} must have {len(parts)} items each.")
    return tuple(inner(item, part) for item, part in zip(value, parts, strict=True))


# Values


def _limit(table: dict[str, Any], where: str, default: Any) -> Any:
    """The limit of "Class.field", or of "field"."""
    return table.get(where, table.get(where.rpartition(".")[2], default))


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ProtocolError(f"{where} must be true or false.")
    return bool(value)


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ProtocolError(f"{where} must be an integer.")
    least, most = _limit(limits.INTEGERS, where, (0, limits.MAX_INTEGER))
    if not least <= value <= most:
        raise ProtocolError(f"{where} must be from {least} to {most}.")
    return int(value)


def _number(value: Any, where: str) -> float:
    if not isinstance(value, float | int | np.floating) or isinstance(value, bool):
        raise ProtocolError(f"{where} must be a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProtocolError(f"{where} must be a finite number.")
    return number


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"{where} must be text.")
    most = _limit(limits.TEXTS, where, limits.MAX_TEXT)
    if len(value) > most:
        raise ProtocolError(f"{where} has {len(value)} characters; at most {most}.")
    pattern = _limit(limits.PATTERNS, where, None)
    if pattern is not None and not pattern.fullmatch(value):
        raise ProtocolError(f"{where} holds characters that it may not.")
    return value


def _bytes(value: Any, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise ProtocolError(f"{where} must be bytes.")
    if len(value) > limits.MAX_BYTES:
        raise ProtocolError(f"{where} has {len(value)} bytes; at most {limits.MAX_BYTES}.")
    return value


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    bool: _boolean,
    int: _integer,
    float: _number,
    str: _text,
    bytes: _bytes,
}


# Arrays


def _check_array(dtype: str, shape: Sequence[int], where: str) -> int:
    """The bytes of an array that `where` may hold."""
    dtypes, pattern = _limit(limits.ARRAYS, where, ((), ()))
    if dtype not in dtypes:
        raise ProtocolError(f"{where} must be {' or '.join(dtypes)}.")
    fits = len(shape) == len(pattern) and all(
        length >= 1 if wanted is None else length == wanted
        for length, wanted in zip(shape, pattern, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in pattern)
        raise ProtocolError(f"{where} must have the shape [{wanted}].")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > limits.MAX_FRAME:
        raise ProtocolError(f"{where} has {nbytes} bytes; at most {limits.MAX_FRAME}.")
    return nbytes


def _pack_array(value: Any, where: str, arrays: list[Frame]) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{where} must be an array.")
    _check_array(value.dtype.name, value.shape, where)
    arrays.append(np.ascontiguousarray(value).data.cast("B"))
    return {"dtype": value.dtype.name, "shape": list(value.shape)}


def _unpack_array(plain: Any, where: str, arrays: Iterator[Frame]) -> np.ndarray:
    if type(plain) is not dict or plain.keys() != {"dtype", "shape"}:
        raise ProtocolError(f"{where} must be an array.")
    dtype, shape = plain["dtype"], plain["shape"]
    if type(dtype) is not str or type(shape) is not list or len(shape) > 4:
        raise ProtocolError(f"{where} must be an array.")
    if any(type(length) is not int or length > limits.MAX_FRAME for length in shape):
        raise ProtocolError(f"{where} has lengths that no array has.")
    nbytes = _check_array(dtype, shape, where)
    frame = next(arrays, None)
    if frame is None or memoryview(frame).nbytes != nbytes:
        raise ProtocolError(f"{where} does not have the {nbytes} bytes of its shape.")
    array = np.frombuffer(frame, dtype).reshape(shape)
    array = np.require(array, requirements="A")  # a frame may begin at any address
    array.flags.writeable = False
    return array
