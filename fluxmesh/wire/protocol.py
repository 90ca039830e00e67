"""Messages to frames and back: a msgpack header, then the arrays as they lie in memory. Pure.

    frame 0   {"v": 4, "type": "Stepped", "seq": 0, "fields": {"job": ..., "latents": <array>}}
    frame 1.. the bytes of the arrays, in the order of their fields

Everything that arrives is held to `limits.py` and to the bounds of its fields (`fields.py`) before
anything is built from it: an unknown version, type or field, a missing one, a wrong type or size
are a `ProtocolError`, never a crash. What is sent is held to the same, so that a mistake shows
where it was made. There is no pickle, and no code travels. `transport/` carries the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from fluxmesh.bounds import MAX_INTEGER, Range
from fluxmesh.wire import limits
from fluxmesh.wire.fields import pack_fields, unpack_fields
from fluxmesh.wire.messages import Message
from fluxmesh.wire.messages.base import TYPES
from fluxmesh.wire.values import Frame, ProtocolError, integer

__all__ = ["TYPES", "VERSION", "Frame", "ProtocolError", "decode", "encode"]

VERSION = 4  # of the protocol: rises when an old peer would misread a message
SEQUENCE = Range(0, MAX_INTEGER)


def encode(message: Message, seq: int = 0) -> list[Frame]:
    """The frames of a message. `seq` matches answers to requests; reports have 0.

    Arrays aren't copied: they must not change before the frames are sent. Raises `ProtocolError`
    where a field is not what its annotation says.
    """
    name = type(message).__name__
    if TYPES.get(name) is not type(message):
        raise ProtocolError(f"{name} is no message that can be sent.")
    arrays: list[Frame] = []
    fields = pack_fields(message, arrays)
    header = {"v": VERSION, "type": name, "seq": integer(seq, SEQUENCE, "seq"), "fields": fields}
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
    size = sum(memoryview(frame).nbytes for frame in frames)
    if size > limits.MAX_MESSAGE:
        raise ProtocolError(f"A message of {size} bytes; at most {limits.MAX_MESSAGE}.")
    header = _header(frames[0])
    seq = header.get("seq")
    if type(seq) is not int or not 0 <= seq <= MAX_INTEGER:
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
            "install the same fluxmesh on all machines, then `fluxmesh down` and `fluxmesh up`.",
            "version",
        )
    if header.keys() != {"v", "type", "seq", "fields"}:
        raise ProtocolError("A header with keys that are unknown or missing.")
    name = header["type"]
    kind = TYPES.get(name) if type(name) is str else None
    if kind is None:
        raise ProtocolError("A message of a type that is unknown.")
    left = iter(arrays)
    message: Message = unpack_fields(header["fields"], kind, kind.__name__, left)
    if next(left, None) is not None:
        raise ProtocolError(f"{kind.__name__} has more frames than arrays.")
    return message
