"""Arrays that travel by name: they arrive whatever they are, and nothing else does."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from fluxmesh.wire.messages import Done
from fluxmesh.wire.messages.training import PutFeatures
from fluxmesh.wire.protocol import Frame, ProtocolError, decode, encode
from tests.messages import same
from tests.unit.frames import stepped

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
