"""The codec: what is sent arrives, and nothing else does."""

from __future__ import annotations

import dataclasses
import random
import typing
from typing import Any

import msgpack
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import CollectiveTime, Holding, ModelVariant, StepShape
from fluxmesh.wire import limits, messages
from fluxmesh.wire.messages import (
    Done,
    Encode,
    HasFile,
    Heartbeat,
    Hello,
    LeaseQueued,
    Load,
    Loaded,
    Message,
    Pictured,
    Ports,
    Stepped,
)
from fluxmesh.wire.protocol import TYPES, Frame, ProtocolError, decode, encode
from tests.messages import forged, same, sample, samples

WEIGHTS = ModelVariant("tiny")


def stepped(latents: np.ndarray | None) -> Stepped:
    return Stepped("job", 1, 0, 1, 0.5, 0, latents)


def header(**changes: Any) -> list[Frame]:
    """The frames of a `LeaseQueued` with other keys in its header; None leaves a key out."""
    base = {"v": 1, "type": "Queued", "seq": 9, "fields": {"place": 1, "seconds": 2.0}}
    base = {key: value for key, value in {**base, **changes}.items() if value is not None}
    return [msgpack.packb(base)]


def test_every_message_arrives_as_it_was_sent() -> None:
    draw = random.Random(1)
    for message in samples(draw, rounds=40):
        seq, arrived = decode([bytes(frame) for frame in encode(message, 7)])
        assert seq == 7
        assert same(message, arrived), message


def test_every_concrete_class_of_the_contract_can_be_sent() -> None:
    parents = {base for kind in TYPES.values() for base in kind.__mro__[1:]}
    classes = {k for k in vars(messages).values() if isinstance(k, type) and issubclass(k, Message)}
    assert classes - set(TYPES.values()) == parents & classes


def test_every_array_of_the_contract_has_its_dtypes_and_shape() -> None:
    for kind in TYPES.values():
        for name, hint in typing.get_type_hints(kind).items():
            if np.ndarray in (hint, *typing.get_args(hint)):
                assert limits.ARRAYS.keys() & {name, f"{kind.__name__}.{name}"}, (kind, name)


def test_every_limit_is_that_of_a_field() -> None:
    kinds = [*TYPES.values(), ModelVariant, Holding, CollectiveTime]
    kinds += [messages.EngineCounters, StepShape]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    known |= {f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
    for table in (limits.INTEGERS, limits.TEXTS, limits.PATTERNS, limits.COUNTS, limits.ARRAYS):
        assert table.keys() <= known, table.keys() - known


def test_ten_thousand_forged_frames_are_a_message_or_a_protocol_error() -> None:
    draw = random.Random(2)
    refused = 0
    for _ in range(10_000):
        frames = forged(draw)
        try:
            _, message = decode(frames)
        except ProtocolError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
            assert error.code in ("version", "malformed")
        else:
            encode(message)  # what gets through is held to the same limits
    assert refused > 7000


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


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (header(v=2), "version"),
        (header(v="1"), "version"),
        (header(v=None), "version"),
        (header(type="Queued2"), "malformed"),
        (header(type="Report"), "malformed"),
        (header(type=["Queued"]), "malformed"),
        (header(fields={"place": 1, "seconds": 2.0, "more": 3}), "malformed"),
        (header(fields={"place": 1}), "malformed"),
        (header(fields={"place": True, "seconds": 2.0}), "malformed"),
        (header(fields={"place": -1, "seconds": 2.0}), "malformed"),
        (header(fields={"place": 2**63, "seconds": 2.0}), "malformed"),
        (header(fields={"place": 1.0, "seconds": 2.0}), "malformed"),
        (header(fields={"place": 1, "seconds": float("nan")}), "malformed"),
        (header(fields={"place": 1, "seconds": "2"}), "malformed"),
        (header(fields=[1, 2.0]), "malformed"),
        (header(extra=1), "malformed"),
        ([*header(), b"one frame too many"], "malformed"),
    ],
)
def test_what_is_no_message_is_told_with_its_number(frames: list[Frame], code: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(frames)
    assert (refused.value.code, refused.value.seq) == (code, 9)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\x80"] * 9,
        header(seq=None),
        header(seq=-1),
        header(seq=True),
        [msgpack.packb([1, 2])],
        [b"\xdd\xff\xff\xff\xff"],  # says it is a list of 4 billion items
        [b"\xc6\xff\xff\xff\xff"],  # says it has 4 GB
        [b"\x91" * 100_000],  # a list in a list in a list
        [b"\x00" * (limits.MAX_HEADER + 1)],
    ],
)
def test_frames_without_a_header_are_refused(frames: list[Frame]) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(frames)
    assert refused.value.seq == 0


@pytest.mark.parametrize(
    ("claim", "body"),
    [
        ({"dtype": "float32", "shape": [1, 4, 4]}, bytes(63)),
        ({"dtype": "float32", "shape": [1, 4, 4]}, bytes(65)),
        ({"dtype": "float32", "shape": [1, 4, 4]}, None),
        ({"dtype": "float64", "shape": [1, 4, 4]}, bytes(128)),
        ({"dtype": "object", "shape": [1, 4, 4]}, bytes(128)),
        ({"dtype": "float32", "shape": [4, 4]}, bytes(64)),
        ({"dtype": "float32", "shape": [1, 0, 4]}, b""),
        ({"dtype": "float32", "shape": [-1, -4, 4]}, bytes(64)),
        ({"dtype": "float32", "shape": [1, 4.0, 4]}, bytes(64)),
        ({"dtype": "float32", "shape": [1, True, 4]}, bytes(16)),
        ({"dtype": "float32", "shape": [2**62, 4, 4]}, bytes(64)),
        ({"dtype": "float32", "shape": [1 << 20, 1 << 20, 1 << 20]}, bytes(64)),
        ({"dtype": "float32"}, bytes(64)),
        ("float32", bytes(64)),
        (1, bytes(64)),
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_refused(
    claim: Any, body: bytes | None
) -> None:
    plain = msgpack.unpackb(bytes(encode(stepped(np.ones((1, 4, 4), np.float32)), 9)[0]))
    plain["fields"]["latents"] = claim
    frames: list[Frame] = [msgpack.packb(plain)]
    with pytest.raises(ProtocolError, match=r"latents") as refused:
        decode(frames if body is None else [*frames, body])
    assert refused.value.seq == 9


@pytest.mark.parametrize(
    "message",
    [
        LeaseQueued(-1, 0.0),
        LeaseQueued(1, float("inf")),
        LeaseQueued("1", 0.0),  # type: ignore[arg-type]
        Ports((0,)),
        Ports(tuple(range(1, 100))),
        Hello("../client", "1"),
        Hello("x" * 129, "1"),
        HasFile(1, "../../.ssh/id"),
        HasFile(1, "A" * 64),
        Encode(1, "job", 1, WEIGHTS, "x" * (1 << 18)),
        Encode(1, "job", 1, WEIGHTS, "\ud800"),
        Encode(1, "j" * 129, 1, WEIGHTS, "a cat"),
        Load(1, "job", 1, WEIGHTS, components=("x",) * 9),
        Load(1, "job", 1, "tiny"),  # type: ignore[arg-type]
        Pictured("job", 1, 0, 0.0, 0, np.zeros((4, 4, 4), np.uint8)),
        Pictured("job", 1, 0, 0.0, 0, np.zeros((4, 4, 3), np.float32)),
        stepped(np.zeros((1, 4, 4))),
        stepped(np.zeros((0, 4, 4), np.float32)),
        stepped([[[0.0]]]),  # type: ignore[arg-type]
        Message(),
    ],
    ids=str,
)
def test_what_the_other_side_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(ProtocolError):
        encode(message)


def test_an_array_over_the_limit_is_not_sent() -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), (1 << 13, 1 << 13, 3), (0, 0, 1))
    with pytest.raises(ProtocolError, match="at most"):
        encode(Pictured("job", 1, 0, 0.0, 0, huge))


def test_what_a_class_holds_its_own_fields_to_is_a_protocol_error() -> None:
    frame = encode(Loaded("job", 1, Holding(WEIGHTS, 5, 2, 1), 0.5), 9)[0]
    plain = msgpack.unpackb(bytes(frame))
    plain["fields"]["holding"]["shard"] = 2
    with pytest.raises(ProtocolError, match="Shard 2 of 2"):
        decode([msgpack.packb(plain)])


def test_a_field_with_a_default_may_be_left_out() -> None:
    frame = encode(Loaded("job", 1, Holding(WEIGHTS, 5), 0.5), 9)[0]
    plain = msgpack.unpackb(bytes(frame))
    del plain["fields"]["holding"]["shards"]
    assert decode([msgpack.packb(plain)])[1] == Loaded("job", 1, Holding(WEIGHTS, 5), 0.5)


def test_no_prompt_shows_in_what_a_log_might_print() -> None:
    message = Encode(1, "job", 1, WEIGHTS, "a secret castle")
    assert "castle" not in repr(message)
    with pytest.raises(ProtocolError) as refused:
        encode(dataclasses.replace(message, prompt="castle" * (1 << 16)))
    assert "castle" not in str(refused.value)


def test_messages_without_fields_are_small() -> None:
    assert len(encode(Heartbeat())) == len(encode(Done())) == 1
    assert sum(len(frame) for frame in encode(Heartbeat())) < 50


def test_sampling_reaches_every_field() -> None:
    draw = random.Random(3)
    found = [sample(messages.Paint, draw) for _ in range(20)]
    assert {each.mask is None for each in found} == {True, False}
