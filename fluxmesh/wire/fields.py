"""The fields of a message as plain values and frames, and back. Pure.

Below `protocol.py`, which has the envelope. A field's annotation says what it is and how large it
may be (`fluxmesh/bounds.py`). What is sent is held to it, and what arrives, value by value
(`values.py`): whatever is not as it says is a `ProtocolError`, never a crash.

    int, float, bool, str, None     as they are
    tuple                           a list
    dataclass                       a map of its fields
    array                           {"dtype": ..., "shape": [...]}, and its bytes are the next frame
    arrays by name                  a map of such
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np

from fluxmesh.bounds import (
    DEFAULTS,
    ArrayOf,
    Bound,
    Bytes,
    Count,
    NamedArrays,
    Range,
    Text,
)
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire import values
from fluxmesh.wire.values import Frame, ProtocolError


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


def pack_fields(value: Any, arrays: list[Frame]) -> dict[str, Any]:
    """The fields of a dataclass, plain; the bytes of its arrays are added to `arrays`, uncopied."""
    return {
        name: pack(getattr(value, name), arrays) for name, pack in _packers(value.__class__).items()
    }


def unpack_fields(plain: Any, kind: type, where: str, arrays: Iterator[Frame]) -> Any:
    """A dataclass of plain fields that came from anyone; its arrays are the next of `arrays`."""
    if type(plain) is not dict:
        raise ProtocolError(f"{where} is not a map of fields.")
    unpackers = _unpackers(kind)
    if not plain.keys() <= unpackers.keys():
        raise ProtocolError(f"{where} has fields that are unknown.")
    if missing := _needed(kind) - plain.keys():
        raise ProtocolError(f"{where} lacks {', '.join(sorted(missing))}.")
    given = {
        name: unpack(plain[name], arrays) for name, unpack in unpackers.items() if name in plain
    }
    try:
        return kind(**given)
    except FluxmeshError as error:  # what the class itself holds its fields to
        raise ProtocolError(f"{where}: {error}") from None


# How each field is converted, worked out once a class. A class may hold itself: its own fields are
# looked up when there is a value.

Conversion = Callable[[Any, Any], Any]  # of a value, with the arrays of its message


@functools.cache
def _packers(kind: type) -> dict[str, Conversion]:
    return {name: _packer(hint, f"{kind.__name__}.{name}") for name, hint in hints_of(kind).items()}


@functools.cache
def _unpackers(kind: type) -> dict[str, Conversion]:
    return {
        name: _unpacker(hint, f"{kind.__name__}.{name}") for name, hint in hints_of(kind).items()
    }


def _packer(hint: Any, where: str) -> Conversion:
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return lambda value, arrays: values.pack_array(value, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return lambda value, arrays: values.pack_named(value, bound, where, arrays)
    if dataclasses.is_dataclass(hint):

        def pack(value: Any, arrays: list[Frame]) -> dict[str, Any]:
            if type(value) is not hint:
                raise ProtocolError(f"{where} must be a {getattr(hint, '__name__', hint)}.")
            return pack_fields(value, arrays)

        return pack
    return _common(hint, bound, where, lambda part: _packer(part, where))


def _unpacker(hint: Any, where: str) -> Conversion:
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return lambda plain, arrays: values.unpack_array(plain, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return lambda plain, arrays: values.unpack_named(plain, bound, where, arrays)
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(type, hint)
        return lambda plain, arrays: unpack_fields(plain, kind, where, arrays)
    return _common(hint, bound, where, lambda part: _unpacker(part, where))


def _common(
    hint: Any, bound: Bound | None, where: str, conversion_of: Callable[[Any], Conversion]
) -> Conversion:
    """Of what is held to the same rules on both ways; `conversion_of` is for what is within."""
    match bound:
        case Range():
            return lambda value, _arrays: values.integer(value, bound, where)
        case Text():
            return lambda value, _arrays: values.text(value, bound, where)
        case Bytes():
            return lambda value, _arrays: values.octets(value, bound, where)
        case Count():
            return _tuple(typing.get_args(hint), bound, where, conversion_of)
    if hint is bool:
        return lambda value, _arrays: values.boolean(value, where)
    if hint is float:
        return lambda value, _arrays: values.number(value, where)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:

        def one_of(value: Any, _arrays: Any) -> str:
            if type(value) is not str or value not in parts:
                raise ProtocolError(f"{where} must be one of {', '.join(parts)}.")
            return value

        return one_of
    if origin not in (types.UnionType, typing.Union):
        raise TypeError(f"{where}: no rule for {hint}")
    (other,) = (conversion_of(part) for part in parts if part is not type(None))
    return lambda value, arrays: None if value is None else other(value, arrays)


def _tuple(
    parts: tuple[Any, ...], bound: Count, where: str, conversion_of: Callable[[Any], Conversion]
) -> Conversion:
    any_number = len(parts) == 2 and parts[1] is Ellipsis
    each = [conversion_of(part) for part in parts if part is not Ellipsis]

    def items(value: Any, arrays: Any) -> tuple[Any, ...]:
        if not isinstance(value, tuple | list):
            raise ProtocolError(f"{where} must be a list.")
        if any_number:
            if len(value) > bound.most:
                raise ProtocolError(f"{where} has {len(value)} items; at most {bound.most}.")
            return tuple(each[0](item, arrays) for item in value)
        if len(value) != len(each):
            raise ProtocolError(f"{where} must have {len(each)} items each.")
        return tuple(convert(item, arrays) for convert, item in zip(each, value, strict=True))

    return items
