"""The fields of a message as plain values and frames, and back. Pure.

Below `protocol.py`, which has the envelope. A field's annotation says what it is and how large it
may be (`fluxmesh/bounds.py`). What is sent is held to it, and what arrives: a wrong type, a number
out of bounds, an array whose bytes don't match its shape are a `ProtocolError` before anything is
built of them, never a crash.

    int, float, bool, str, None     as they are
    tuple                           a list
    dataclass                       a map of its fields
    array                           {"dtype": ..., "shape": [...]}, and its bytes are the next frame
    arrays by name                  a map of such
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from fluxmesh.bounds import (
    DEFAULTS,
    MAX_DIMENSIONS,
    ArrayOf,
    Bound,
    Bytes,
    Count,
    NamedArrays,
    Range,
    Text,
)
from fluxmesh.errors import FluxmeshError

Frame = bytes | memoryview
Code = Literal["version", "malformed"]


class ProtocolError(FluxmeshError):
    """Frames that are no message. `code` is that of `messages.Refused`; `seq` 0 if unknown."""

    def __init__(self, text: str, code: Code = "malformed", seq: int = 0) -> None:
        super().__init__(text)
        self.code: Code = code
        self.seq = seq


# Classes


@functools.cache
def hints_of(kind: type[Any]) -> dict[str, Any]:
    """The annotations of a dataclass's fields, evaluated, with their bounds."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


@functools.cache
def _needed(kind: type) -> frozenset[str]:
    return frozenset(
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    )


@functools.cache
def bounded(hint: Any) -> tuple[Any, Bound | None]:
    """What a field is, and its bound: its own, or the default of what it is.

    Raises `TypeError` where the bound is that of something else, or one that it needs is missing.
    """
    own: Bound | None = None
    if typing.get_origin(hint) is Annotated:
        hint, *bounds = typing.get_args(hint)
        (own,) = (bound for bound in bounds if isinstance(bound, Bound))
    origin = typing.get_origin(hint) or hint
    bound = own or DEFAULTS.get(origin)
    if (kind := _BOUND_OF.get(origin)) is None:
        if own is not None:
            raise TypeError(f"{hint} can't be bounded by {own}.")
    elif not isinstance(bound, kind):
        raise TypeError(f"{hint} must be bounded by a {kind.__name__}.")
    return hint, bound


_BOUND_OF: dict[Any, type[Bound]] = {
    int: Range,
    str: Text,
    bytes: Bytes,
    tuple: Count,
    np.ndarray: ArrayOf,
    Mapping: NamedArrays,
}


def pack_fields(value: Any, where: str, arrays: list[Frame]) -> dict[str, Any]:
    """The fields of a dataclass, plain; the bytes of its arrays are added to `arrays`, uncopied."""
    return {
        name: _pack(getattr(value, name), hint, f"{where}.{name}", arrays)
        for name, hint in hints_of(value.__class__).items()
    }


def unpack_fields(plain: Any, kind: type, where: str, arrays: Iterator[Frame]) -> Any:
    """A dataclass of plain fields that came from anyone; its arrays are the next of `arrays`."""
    if type(plain) is not dict:
        raise ProtocolError(f"{where} is not a map of fields.")
    hints: dict[str, Any] = hints_of(kind)
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
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return _pack_array(value, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return _pack_named(value, bound, where, arrays)
    if dataclasses.is_dataclass(hint):
        if type(value) is not hint:
            raise ProtocolError(f"{where} must be a {getattr(hint, '__name__', hint)}.")
        return pack_fields(value, type(value).__name__, arrays)
    return _common(value, hint, bound, where, lambda v, h: _pack(v, h, where, arrays))


def _unpack(plain: Any, hint: Any, where: str, arrays: Iterator[Frame]) -> Any:
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return _unpack_array(plain, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return _unpack_named(plain, bound, where, arrays)
    if dataclasses.is_dataclass(hint):
        return unpack_fields(plain, typing.cast(type, hint), where, arrays)
    return _common(plain, hint, bound, where, lambda v, h: _unpack(v, h, where, arrays))


def _common(
    value: Any, hint: Any, bound: Bound | None, where: str, inner: Callable[[Any, Any], Any]
) -> Any:
    """What is held to the same rules on both ways; `inner` does the items of a tuple."""
    match bound:
        case Range():
            return integer(value, bound, where)
        case Text():
            return _text(value, bound, where)
        case Bytes():
            return _bytes(value, bound, where)
        case Count():
            return _tuple(value, typing.get_args(hint), bound, where, inner)
    if hint is bool:
        return _boolean(value, where)
    if hint is float:
        return _number(value, where)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if type(value) is not str or value not in parts:
            raise ProtocolError(f"{where} must be one of {', '.join(parts)}.")
        return value
    if origin not in (types.UnionType, typing.Union):
        raise TypeError(f"{where}: no rule for {hint}")
    (other,) = (part for part in parts if part is not type(None))
    return None if value is None else inner(value, other)


def _tuple(
    value: Any, parts: tuple[Any, ...], bound: Count, where: str, inner: Callable[[Any, Any], Any]
) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ProtocolError(f"{where} must be a list.")
    if len(parts) == 2 and parts[1] is Ellipsis:
        if len(value) > bound.most:
            raise ProtocolError(f"{where} has {len(value)} items; at most {bound.most}.")
        return tuple(inner(item, parts[0]) for item in value)
    if len(value) != len(parts):
        raise ProtocolError(f"{where} must have {len(parts)} items each.")
    return tuple(inner(item, part) for item, part in zip(value, parts, strict=True))


# Values


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ProtocolError(f"{where} must be true or false.")
    return bool(value)


def integer(value: Any, bound: Range, where: str) -> int:
    """A number of Python's or NumPy's, held to `bound`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ProtocolError(f"{where} must be an integer.")
    if not bound.least <= value <= bound.most:
        raise ProtocolError(f"{where} must be from {bound.least} to {bound.most}.")
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


def _text(value: Any, bound: Text, where: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"{where} must be text.")
    if len(value) > bound.most:
        raise ProtocolError(f"{where} has {len(value)} characters; at most {bound.most}.")
    if bound.pattern is not None and not bound.pattern.fullmatch(value):
        raise ProtocolError(f"{where} holds characters that it may not.")
    return value


def _bytes(value: Any, bound: Bytes, where: str) -> bytes:
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


def _pack_array(value: Any, bound: ArrayOf, where: str, arrays: list[Frame]) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{where} must be an array.")
    _check_array(value.dtype.name, value.shape, bound, where)
    arrays.append(np.ascontiguousarray(value).data.cast("B"))
    return {"dtype": value.dtype.name, "shape": list(value.shape)}


def _unpack_array(plain: Any, bound: ArrayOf, where: str, arrays: Iterator[Frame]) -> np.ndarray:
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


def _pack_named(
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
        plain[name] = _pack_array(array, own, f"{where}.{name}", arrays)
        left -= array.nbytes
    return plain


def _unpack_named(
    plain: Any, bound: NamedArrays, where: str, arrays: Iterator[Frame]
) -> dict[str, np.ndarray]:
    if type(plain) is not dict:
        raise ProtocolError(f"{where} must be a map.")
    _check_names(plain, bound, where)
    value, left = {}, bound.nbytes
    for name, item in plain.items():
        shape = item.get("shape") if type(item) is dict else None
        own = _any_shape(shape if type(shape) is list else (), bound, left)
        value[name] = array = _unpack_array(item, own, f"{where}.{name}", arrays)
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
