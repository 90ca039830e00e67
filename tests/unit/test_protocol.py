"""The contract and its codec: every message arrives as it was sent, every field has its bound."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgpack
import numpy as np
import pytest

from fluxmesh.bounds import ArrayOf, NamedArrays, Range, Text
from fluxmesh.cluster.snapshot import CollectiveTime, Holding, ModelVariant
from fluxmesh.wire import limits, messages
from fluxmesh.wire.fields import bounded, hints_of
from fluxmesh.wire.messages import Done, Encode, Heartbeat, LeaseQueued, Loaded, Message, Stepped
from fluxmesh.wire.protocol import TYPES, ProtocolError, decode, encode
from tests.messages import same, sample, samples
from tests.unit.frames import WEIGHTS, stepped


def test_every_message_arrives_as_it_was_sent() -> None:
    draw = random.Random(1)
    for message in samples(draw, rounds=40):
        seq, arrived = decode([bytes(frame) for frame in encode(message, 7)])
        assert seq == 7
        assert same(message, arrived), message


def test_every_concrete_class_of_the_contract_can_be_sent() -> None:
    parents = {base for kind in TYPES.values() for base in kind.__mro__[1:]}
    spaces = vars(messages) | vars(messages.training)
    classes = {k for k in spaces.values() if isinstance(k, type) and issubclass(k, Message)}
    assert classes - set(TYPES.values()) == parents & classes
    assert len(classes) > 60


def inner(hint: Any) -> Iterator[Any]:
    """A field's annotation, and all in it that has a bound of its own."""
    yield hint
    plain, bound = bounded(hint)
    for part in () if isinstance(bound, NamedArrays) else typing.get_args(plain):
        if part not in (Ellipsis, type(None)) and not isinstance(part, str):
            yield from inner(part)


def test_every_field_has_the_bound_of_what_it_is() -> None:
    kinds: list[type[Any]] = list(TYPES.values())
    for kind in kinds:  # grows: what stands in a message is held to bounds too
        for hint in hints_of(kind).values():
            for each in inner(hint):
                plain, bound = bounded(each)
                assert (
                    bound is not None
                    or plain in (bool, float)
                    or typing.get_args(plain)
                    or (dataclasses.is_dataclass(plain))
                ), (kind, each)
                if dataclasses.is_dataclass(plain) and plain not in kinds:
                    kinds.append(plain)
    assert {ModelVariant, Holding, CollectiveTime} <= set(kinds)


@pytest.mark.parametrize(
    "hint",
    [
        np.ndarray,
        Mapping[str, np.ndarray],
        Annotated[np.ndarray, Range(1, 2)],
        Annotated[int, Text(5)],
        Annotated[float, Range(1, 2)],
        Annotated[tuple[int, ...], Text(5)],
    ],
)
def test_a_field_without_a_bound_that_it_needs_or_with_one_of_another_kind_is_a_mistake(
    hint: Any,
) -> None:
    with pytest.raises(TypeError, match="bounded"):
        bounded(hint)


def test_two_messages_of_one_name_are_a_mistake() -> None:
    with pytest.raises(TypeError, match="Beat already"):
        type("Beat", (messages.WorkReport,), {})


def test_latents_travel_uncopied_and_arrive_read_only() -> None:
    latents = np.arange(2 * 16 * 64, dtype=np.float32).reshape(2, 16, 64)
    frames = encode(stepped(latents))
    assert isinstance(frames[1], memoryview) and frames[1].obj is not None
    assert np.shares_memory(np.frombuffer(frames[1], np.float32), latents)
    _, arrived = decode(frames)
    assert isinstance(arrived, Stepped) and arrived.latents is not None
    assert np.shares_memory(arrived.latents, latents)
    with pytest.raises(ValueError, match="read-only"):
        arrived.latents[0] = 0


def test_an_array_that_lies_askew_in_memory_arrives_whole() -> None:
    latents = np.ones((1, 4, 4), np.float32)
    head, body = encode(stepped(latents))
    _, arrived = decode([head, memoryview(b"x" + bytes(body))[1:]])
    assert isinstance(arrived, Stepped) and arrived.latents is not None
    assert arrived.latents.flags.aligned and np.array_equal(arrived.latents, latents)


def test_an_array_that_is_not_contiguous_is_sent_in_order() -> None:
    latents = np.arange(32, dtype=np.float32).reshape(1, 4, 8).transpose(0, 2, 1)
    _, arrived = decode(encode(stepped(latents)))
    assert isinstance(arrived, Stepped) and np.array_equal(arrived.latents, latents)


def test_numbers_of_numpy_are_sent_as_numbers() -> None:
    _, arrived = decode(encode(LeaseQueued(np.int64(3), np.float32(1.5))))  # type: ignore[arg-type]
    assert arrived == LeaseQueued(3, 1.5) and type(arrived.place) is int


def test_the_largest_message_fits_into_the_frames_that_one_may_have() -> None:
    for kind in TYPES.values():
        bounds = [
            bounded(part)[1]
            for hint in hints_of(kind).values()
            for part in inner(hint)
            if not dataclasses.is_dataclass(part)
        ]
        arrays = sum(isinstance(bound, ArrayOf) for bound in bounds)
        named = sum(bound.most for bound in bounds if isinstance(bound, NamedArrays))
        assert 1 + arrays + named <= limits.MAX_FRAMES, kind


def test_a_field_with_a_default_may_be_left_out() -> None:
    frame = encode(
        Loaded(
            job="job", ring_generation=1, holding=Holding(weights=WEIGHTS, nbytes=5), seconds=0.5
        ),
        9,
    )[0]
    plain = msgpack.unpackb(bytes(frame))
    del plain["fields"]["holding"]["shards"]
    assert decode([msgpack.packb(plain)])[1] == Loaded(
        job="job", ring_generation=1, holding=Holding(weights=WEIGHTS, nbytes=5), seconds=0.5
    )


def test_no_prompt_shows_in_what_a_log_might_print() -> None:
    message = Encode(
        fence=1, job="job", ring_generation=1, weights=WEIGHTS, prompt="a secret castle"
    )
    assert "castle" not in repr(message)
    with pytest.raises(ProtocolError) as refused:
        encode(dataclasses.replace(message, prompt="castle" * (1 << 16)))
    assert "castle" not in str(refused.value)


def test_messages_without_fields_are_small() -> None:
    assert len(encode(Heartbeat())) == len(encode(Done())) == 1
    assert sum(len(frame) for frame in encode(Heartbeat())) < 50


def test_sampling_reaches_every_field() -> None:
    draw = random.Random(3)
    paints = [sample(messages.Paint, draw) for _ in range(20)]
    assert {paint.mask is None for paint in paints} == {True, False}
