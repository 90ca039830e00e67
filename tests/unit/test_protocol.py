"""The codec: what is sent arrives, and nothing else does."""

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
from fluxmesh.wire.messages.training import PutFeatures
from fluxmesh.wire.protocol import TYPES, VERSION, Frame, ProtocolError, decode, encode
from tests.messages import forged, same, sample, samples

WEIGHTS = ModelVariant("tiny")


def stepped(latents: np.ndarray | None) -> Stepped:
    return Stepped(
        job="job",
        ring_generation=1,
        image=0,
        step=1,
        is_last=False,
        seconds=0.5,
        peak_bytes=0,
        latents=latents,
    )


def header(**changes: Any) -> list[Frame]:
    """The frames of a `LeaseQueued` with other keys in its header; None leaves a key out."""
    base = {"v": VERSION, "type": "LeaseQueued", "seq": 9, "fields": {"place": 1, "seconds": 2.0}}
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


def test_the_frames_that_are_spoiled_below_are_a_message() -> None:
    assert decode(header()) == (9, LeaseQueued(1, 2.0))


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (header(v=VERSION + 1), "version"),
        (header(v="1"), "version"),
        (header(v=None), "version"),
        (header(type="LeaseQueued2"), "malformed"),
        (header(type="Report"), "malformed"),
        (header(type=["LeaseQueued"]), "malformed"),
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
        [b"\x80"] * (limits.MAX_FRAMES + 1),
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
        HasFile(fence=1, sha256="../../.ssh/id"),
        HasFile(fence=1, sha256="A" * 64),
        Encode(fence=1, job="job", ring_generation=1, weights=WEIGHTS, prompt="x" * (1 << 18)),
        Encode(fence=1, job="job", ring_generation=1, weights=WEIGHTS, prompt="\ud800"),
        Encode(fence=1, job="j" * 129, ring_generation=1, weights=WEIGHTS, prompt="a cat"),
        Load(fence=1, job="job", ring_generation=1, weights=WEIGHTS, components=("x",) * 9),
        Load(fence=1, job="job", ring_generation=1, weights="tiny"),  # type: ignore[arg-type]
        Pictured(
            job="job",
            ring_generation=1,
            image=0,
            seconds=0.0,
            peak_bytes=0,
            pixels=np.zeros((4, 4, 4), np.uint8),
        ),
        Pictured(
            job="job",
            ring_generation=1,
            image=0,
            seconds=0.0,
            peak_bytes=0,
            pixels=np.zeros((4, 4, 3), np.float32),
        ),
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


# Features


FLOATS = np.ones((2, 3), np.float32)
BITS = np.ones((1, 4, 4), np.uint16)


def put(features: Any) -> PutFeatures:
    return PutFeatures(fence=1, job="job", ring_generation=1, name="crop 0 0", features=features)


def claimed(claim: Any, *bodies: bytes) -> list[Frame]:
    """`PutFeatures` whose header says something else of its features."""
    plain = msgpack.unpackb(bytes(encode(put({"a": FLOATS}), 9)[0]))
    plain["fields"]["features"] = claim
    return [msgpack.packb(plain), *bodies]


def array(*shape: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


def test_arrays_travel_by_name_whatever_they_are() -> None:
    sent = {"pooled": FLOATS, "t5": BITS, "x_9": np.arange(5, dtype=np.float32)}
    frames = encode(put(sent))
    assert len(frames) == 4
    _, arrived = decode([bytes(frame) for frame in frames])
    assert isinstance(arrived, PutFeatures) and same(arrived, put(sent))
    assert list(arrived.features) == list(sent)
    assert not arrived.features["t5"].flags.writeable
    assert not same(arrived, put({**sent, "t5": BITS + 1})) and not same(arrived, put({"t5": BITS}))


def test_a_message_knows_its_arrays_also_those_by_name() -> None:
    message = put({"a": FLOATS, "b": BITS})
    assert message.array_bytes == FLOATS.nbytes + BITS.nbytes
    assert stepped(np.ones((1, 4, 4), np.float32)).array_bytes == 64 and Done().array_bytes == 0
    changed = message.with_arrays(lambda array: array * 2)
    assert (changed.features["a"] == 2).all() and (changed.features["b"] == 2).all()
    assert (message.features["a"] == 1).all()


@pytest.mark.parametrize(
    "features",
    [
        {},
        {f"n{k}": FLOATS for k in range(9)},
        {"": FLOATS},
        {"T5": FLOATS},
        {"../t5": FLOATS},
        {"t5\n": FLOATS},
        {"x" * 33: FLOATS},
        {5: FLOATS},
        {"a": [[1.0]]},
        {"a": FLOATS.astype(np.float64)},
        {"a": FLOATS.astype(object)},
        {"a": np.ones((), np.float32)},
        {"a": np.ones((1, 1, 1, 1, 1), np.float32)},
        {"a": np.ones((1, 0), np.float32)},
        [("a", FLOATS)],
        FLOATS,
        None,
    ],
    ids=str,
)
def test_features_that_the_other_side_would_refuse_are_not_sent(features: Any) -> None:
    with pytest.raises(ProtocolError, match="features"):
        encode(put(features))


@pytest.mark.parametrize(
    "frames",
    [
        claimed({"a": array(2, 3)}),  # without its frame
        claimed({"a": array(2, 3)}, bytes(23)),
        claimed({"a": array(2, 3)}, bytes(24), bytes(24)),
        claimed({"a": array(2, 3), "b": array(1)}, bytes(24)),
        claimed({"a": array(2, 3), "b": array(1)}, bytes(4), bytes(24)),
        claimed({}),
        claimed({f"n{k}": array(1) for k in range(9)}, *[bytes(4)] * 9),
        claimed({"../a": array(1)}, bytes(4)),
        claimed({b"a": array(1)}, bytes(4)),
        claimed({"a": array(1, dtype="float64")}, bytes(8)),
        claimed({"a": array(1, dtype="object")}, bytes(8)),
        claimed({"a": array()}, bytes(4)),
        claimed({"a": array(1, 1, 1, 1, 1)}, bytes(4)),
        claimed({"a": array(0)}, b""),
        claimed({"a": array(-1)}, bytes(4)),
        claimed({"a": array(True)}, bytes(4)),
        claimed({"a": array(1.0)}, bytes(4)),
        claimed({"a": array(2**62, 4)}, bytes(4)),
        claimed({"a": {"dtype": "float32"}}, bytes(4)),
        claimed({"a": {"dtype": "float32", "shape": {}}}, bytes(4)),
        claimed({"a": {"dtype": "float32", "shape": None}}, bytes(4)),
        claimed({"a": [1]}, bytes(4)),
        claimed({"a": None}, bytes(4)),
        claimed([array(1)], bytes(4)),
        claimed("a", bytes(4)),
        claimed(None),
    ],
)
def test_features_that_are_not_what_their_header_says_are_refused(frames: list[Frame]) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(frames)
    assert refused.value.seq == 9 and len(str(refused.value)) < 300


def test_features_together_are_no_larger_than_one_array_may_be() -> None:
    half = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1 << 24,), (0,))  # 64 MiB
    over = np.zeros(1, np.float32)
    with pytest.raises(ProtocolError, match=r"features\.c has 4 bytes; at most 0"):
        encode(put({"a": half, "b": half, "c": over}))
    bodies = [bytes(1 << 26), bytes(1 << 26), bytes(4)]
    claim = {"a": array(1 << 24), "b": array(1 << 24), "c": array(1)}
    with pytest.raises(ProtocolError, match=r"features\.c"):
        decode(claimed(claim, *bodies))
    assert isinstance(
        decode(claimed({"a": claim["a"], "b": claim["b"]}, *bodies[:2]))[1], PutFeatures
    )


def test_all_frames_of_a_message_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = encode(stepped(np.ones((1, 4, 4), np.float32)))
    size = sum(memoryview(frame).nbytes for frame in frames)
    monkeypatch.setattr(limits, "MAX_MESSAGE", size)
    assert isinstance(decode(frames)[1], Stepped)
    monkeypatch.setattr(limits, "MAX_MESSAGE", size - 1)
    with pytest.raises(ProtocolError, match="at most"):
        decode(frames)


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


def test_an_array_over_the_limit_is_not_sent() -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), (1 << 13, 1 << 13, 3), (0, 0, 1))
    with pytest.raises(ProtocolError, match="at most"):
        encode(
            Pictured(job="job", ring_generation=1, image=0, seconds=0.0, peak_bytes=0, pixels=huge)
        )


def test_what_a_class_holds_its_own_fields_to_is_a_protocol_error() -> None:
    frame = encode(
        Loaded(
            job="job",
            ring_generation=1,
            holding=Holding(weights=WEIGHTS, nbytes=5, shards=2, shard=1),
            seconds=0.5,
        ),
        9,
    )[0]
    plain = msgpack.unpackb(bytes(frame))
    plain["fields"]["holding"]["shard"] = 2
    with pytest.raises(ProtocolError, match="Shard 2 of 2"):
        decode([msgpack.packb(plain)])


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
    samples = [sample(messages.Paint, draw) for _ in range(20)]
    assert {each.mask is None for each in samples} == {True, False}
