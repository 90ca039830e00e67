"""What single values of a message may be: numbers, texts and arrays, held to their bounds. Pure.

Below `fields.py`, which takes messages apart. A value of a wrong type, a number out of bounds, an
array whose bytes don't match its shape are a `ProtocolError` before anything is built of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fluxmesh.bounds import MAX_DIMENSIONS, ArrayOf, Bytes, NamedArrays, Range, Text
from fluxmesh.errors import FluxmeshError

Frame = bytes | memoryview
Code = Literal["version", "malformed"]

# Python's own and NumPy's
_TRUTHS = (bool, np.bool_)
_INTEGERS = (int, np.integer)
_NUMBERS = (float, int, np.floating)


class ProtocolError(FluxmeshError):
    """Frames that are no message. `code` is that of `messages.Refused`; `seq` 0 if unknown."""

    def __init__(self, text: str, code: Code = "malformed", seq: int = 0) -> None:
        super().__init__(text)
        self.code: Code = code
        self.seq = seq


# Values


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, _TRUTHS):
        raise ProtocolError(f"{where} must be true or false.")
    return bool(value)


def integer(value: Any, bound: Range, where: str) -> int:
    """A number of Python's or NumPy's, held to `bound`."""
    if not isinstance(value, _INTEGERS) or isinstance(value, bool):
        raise ProtocolError(f"{where} must be an integer.")
    if not bound.least <= value <= bound.most:
        raise ProtocolError(f"{where} must be from {bound.least} to {bound.most}.")
    return int(value)


def number(value: Any, where: str) -> float:
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise ProtocolError(f"{where} must be a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProtocolError(f"{where} must be a finite number.")
    return number


def text(value: Any, bound: Text, where: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"{where} must be text.")
    if len(value) > bound.most:
        raise ProtocolError(f"{where} has {len(value)} characters; at most {bound.most}.")
    if bound.pattern is not None and not bound.pattern.fullmatch(value):
        raise ProtocolError(f"{where} holds characters that it may not.")
    return value


def octets(value: Any, bound: Bytes, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise ProtocolError(f"{where} must be bytes.")
    if len(value) > bound.most:
        raise ProtocolError(f"{where} has {len(value)} bytes; at most {bound.most}.")
    return value


# Arrays


def _check_array(dtype: str, shape: Sequence[int], bound: ArrayOf, where: str) -> int:
    """The bytes of an array that `where` may hold."""
    if dtype not in bound.dtypes:
        raise ProtocolError(f"{where} must be {' or '.join(bound.dtypes)}.")
    fits = len(shape) == len(bound.shape) and all(
        length >= 1 if wanted is None else length == wanted
        for length, wanted in zip(shape, bound.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in bound.shape)
        raise ProtocolError(f"{where} must have the shape [{wanted}].")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > bound.nbytes:
        raise ProtocolError(f"{where} has {nbytes} bytes; at most {bound.nbytes}.")
    return nbytes


def pack_array(value: Any, bound: ArrayOf, where: str, arrays: list[Frame]) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{where} must be an array.")
    _check_array(value.dtype.name, value.shape, bound, where)
    arrays.append(np.ascontiguousarray(value).data.cast("B"))
    return {"dtype": value.dtype.name, "shape": list(value.shape)}


def unpack_array(plain: Any, bound: ArrayOf, where: str, arrays: Iterator[Frame]) -> np.ndarray:
    if type(plain) is not dict or plain.keys() != {"dtype", "shape"}:
        raise ProtocolError(f"{where} must be an array.")
    dtype, shape = plain["dtype"], plain["shape"]
    if type(dtype) is not str or type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"{where} must be an array.")
    if any(type(length) is not int or length > bound.nbytes for length in shape):
        raise ProtocolError(f"{where} has lengths that no array has.")
    nbytes = _check_array(dtype, shape, bound, where)
    frame = next(arrays, None)
    if frame is None or memoryview(frame).nbytes != nbytes:
        raise ProtocolError(f"{where} does not have the {nbytes} bytes of its shape.")
    array = np.frombuffer(frame, dtype).reshape(shape)
    array = np.require(array, requirements="A")  # a frame may begin at any address
    array.flags.writeable = False
    return array


# Arrays by name


def pack_named(
    value: Any, bound: NamedArrays, where: str, arrays: list[Frame]
) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise ProtocolError(f"{where} must be a map.")
    _check_names(value, bound, where)
    plain, left = {}, bound.nbytes
    for name, array in value.items():
        if not isinstance(array, np.ndarray):
            raise ProtocolError(f"{where}.{name} must be an array.")
        own = _any_shape(array.shape, bound, left)
        plain[name] = pack_array(array, own, f"{where}.{name}", arrays)
        left -= array.nbytes
    return plain


def unpack_named(
    plain: Any, bound: NamedArrays, where: str, arrays: Iterator[Frame]
) -> dict[str, np.ndarray]:
    if type(plain) is not dict:
        raise ProtocolError(f"{where} must be a map.")
    _check_names(plain, bound, where)
    value, left = {}, bound.nbytes
    for name, item in plain.items():
        shape = item.get("shape") if type(item) is dict else None
        own = _any_shape(shape if type(shape) is list else (), bound, left)
        value[name] = array = unpack_array(item, own, f"{where}.{name}", arrays)
        left -= array.nbytes
    return value


def _check_names(value: Mapping[Any, Any], bound: NamedArrays, where: str) -> None:
    if not 1 <= len(value) <= bound.most:
        raise ProtocolError(f"{where} has {len(value)} arrays; from 1 to {bound.most}.")
    for name in value:
        if type(name) is not str or not bound.name.fullmatch(name):
            raise ProtocolError(f"{where} has a name that it may not have.")


def _any_shape(shape: Sequence[object], bound: NamedArrays, left: int) -> ArrayOf:
    """What one of them may be, as long as it is an array at all: `left` bytes remain."""
    dimensions = max(1, min(len(shape), MAX_DIMENSIONS))
    return ArrayOf(bound.dtypes, (None,) * dimensions, left)
