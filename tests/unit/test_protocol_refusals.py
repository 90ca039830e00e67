"""What the codec refuses: frames that are no message, and messages that nobody would take."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import Holding
from fluxmesh.wire import limits
from fluxmesh.wire.messages import (
    Decode,
    Encode,
    EncodePictures,
    HasFile,
    Hello,
    LeaseQueued,
    Load,
    Loaded,
    Message,
    Paint,
    Pictured,
    Ports,
    Stepped,
)
from fluxmesh.wire.protocol import VERSION, Frame, ProtocolError, decode, encode
from tests.messages import forged
from tests.unit.frames import WEIGHTS, stepped


def header(**changes: Any) -> list[Frame]:
    """The frames of a `LeaseQueued` with other keys in its header; None leaves a key out."""
    base = {"v": VERSION, "type": "LeaseQueued", "seq": 9, "fields": {"place": 1, "seconds": 2.0}}
    base = {key: value for key, value in {**base, **changes}.items() if value is not None}
    return [msgpack.packb(base)]


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


def test_all_frames_of_a_message_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = encode(stepped(np.ones((1, 4, 4), np.float32)))
    size = sum(memoryview(frame).nbytes for frame in frames)
    monkeypatch.setattr(limits, "MAX_MESSAGE", size)
    assert isinstance(decode(frames)[1], Stepped)
    monkeypatch.setattr(limits, "MAX_MESSAGE", size - 1)
    with pytest.raises(ProtocolError, match="at most"):
        decode(frames)


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


HEAD: dict[str, Any] = {"fence": 1, "job": "job", "ring_generation": 1, "weights": WEIGHTS}
SIZE: dict[str, Any] = {"height": 32, "width": 48}


def paint(**arrays: np.ndarray) -> Paint:
    """One whose latents are [1, 6, 16]."""
    return Paint(
        **HEAD,
        **SIZE,
        placement="data",
        image=0,
        steps=2,
        first=0,
        guidance=1.0,
        low_memory=False,
        preview=False,
        strength=1.0,
        features={"prompt": np.zeros((1, 2, 4), np.float32)},
        **{"latents": None, "noise": np.zeros((1, 6, 16), np.float32), **arrays},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("message", "field", "shape", "sentence"),
    [
        (
            EncodePictures(**HEAD, named={"mask": np.zeros((32, 48, 3), np.uint8)}),
            ("named", "mask"),
            [32, 144],
            "The picture 'mask' came as [32, 144], and that is no picture",
        ),
        (
            EncodePictures(**HEAD, named={"control": np.zeros((32, 48, 3), np.uint8)}),
            ("named", "control"),
            [32, 72, 2],
            "The picture 'control' came as [32, 72, 2], and that is no picture",
        ),
        *(
            (
                paint(**{name: np.zeros((1, 6, 16), np.float32)}),
                (name,),
                [1, 12, 8],
                f"`{name}` came as [1, 12, 8] and the noise as [1, 6, 16]",
            )
            for name in ("latents", "source", "basis_latents")
        ),
        (
            paint(mask=np.zeros((32, 48), np.uint8)),
            ("mask",),
            [48, 32],
            "The mask came as [48, 32] for an image of 32x48",
        ),
        (
            Decode(**HEAD, **SIZE, images=(0, 1), latents=np.zeros((2, 6, 16), np.float32)),
            ("latents",),
            [1, 12, 16],
            "The latents of 1 images came for 2",
        ),
    ],
)
def test_arrays_that_do_not_go_together_are_refused_in_a_sentence(
    message: Message, field: tuple[str, ...], shape: list[int], sentence: str
) -> None:
    first, *arrays = encode(message, 9)
    plain = msgpack.unpackb(bytes(first))
    array = plain["fields"]
    for name in field:
        array = array[name]
    array["shape"] = shape
    with pytest.raises(ProtocolError) as refused:
        decode([msgpack.packb(plain), *arrays])
    assert sentence in str(refused.value) and str(refused.value).count(". ") == 0
