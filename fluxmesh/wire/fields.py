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
    given = {
        name: _unpack(plain[name], hint, f"{kind.__name__}.{name}", arrays)
        for name, hint in hints.items()
        if name in plain
    }
    try:
        return kind(**given)
    except FluxmeshError as error:  # what the class itself holds its fields to
        raise ProtocolError(f"{where}: {error}") from None


def _pack(value: Any, hint: Any, where: str, arrays: list[Frame]) -> Any:
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return values.pack_array(value, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return values.pack_named(value, bound, where, arrays)
    if dataclasses.is_dataclass(hint):
        if type(value) is not hint:
            raise ProtocolError(f"{where} must be a {getattr(hint, '__name__', hint)}.")
        return pack_fields(value, type(value).__name__, arrays)
    return _common(value, hint, bound, where, lambda v, h: _pack(v, h, where, arrays))


def _unpack(plain: Any, hint: Any, where: str, arrays: Iterator[Frame]) -> Any:
    hint, bound = bounded(hint)
    if isinstance(bound, ArrayOf):
        return values.unpack_array(plain, bound, where, arrays)
    if isinstance(bound, NamedArrays):
        return values.unpack_named(plain, bound, where, arrays)
    if dataclasses.is_dataclass(hint):
        return unpack_fields(plain, typing.cast(type, hint), where, arrays)
    return _common(plain, hint, bound, where, lambda v, h: _unpack(v, h, where, arrays))


def _common(
    value: Any, hint: Any, bound: Bound | None, where: str, inner: Callable[[Any, Any], Any]
) -> Any:
    """What is held to the same rules on both ways; `inner` does the items of a tuple."""
    match bound:
        case Range():
            return values.integer(value, bound, where)
        case Text():
            return values.text(value, bound, where)
        case Bytes():
            return values.octets(value, bound, where)
        case Count():
            return _tuple(value, typing.get_args(hint), bound, where, inner)
    if hint is bool:
        return values.boolean(value, where)
    if hint is float:
        return values.number(value, where)
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
