"""The stream between an agent and its engine: a real socket pair, both ends."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from fluxmesh.wire import limits
from fluxmesh.wire.messages import Beat, Message, Stepped
from fluxmesh.wire.protocol import ProtocolError, encode
from fluxmesh.wire.transport import stream
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.stream import AsyncChannel, Channel
from tests.messages import same, samples

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=[stream.ROOM, 8192], ids=["roomy", "as-on-macos"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ends = stream.pair()
    for end in ends:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, buffer, request.param)
    yield ends
    for end in ends:
        end.close()


def large() -> Stepped:
    """More than a socket holds, so that it passes in pieces."""
    return Stepped(
        job="job",
        ring_generation=1,
        image=0,
        step=1,
        is_last=False,
        seconds=0.5,
        peak_bytes=0,
        latents=np.ones((1, 4096, 256), np.float32),
    )


def test_messages_of_every_type_pass_in_order_both_ways(pair: Pair) -> None:
    sent = samples(random.Random(1), rounds=3)

    async def agent() -> None:
        channel = await AsyncChannel.open(pair[0])
        for number, message in enumerate(sent):
            seq, arrived = await channel.receive()
            assert seq == number and same(message, arrived)
        for number, message in enumerate(sent):
            await channel.send(message, number)
        assert await asyncio.to_thread(has_read.wait, 60)  # what `close` finds unread is lost
        await channel.close()

    def engine() -> None:
        channel = Channel(pair[1])
        for number, message in enumerate(sent):
            channel.send(message, number)
        for number, message in enumerate(sent):
            seq, arrived = channel.receive()
            answers.append(seq == number and same(message, arrived))
        has_read.set()
        with pytest.raises(ConnectionClosed):
            channel.receive()
        answers.append(True)

    answers: list[bool] = []
    has_read = threading.Event()
    thread = threading.Thread(target=engine)
    thread.start()
    asyncio.run(agent())
    thread.join(60)
    assert answers == [True] * (len(sent) + 1)


def test_megabytes_pass_both_ways_at_once(pair: Pair) -> None:
    count, arrived = 3, []
    engine = Channel(pair[1])

    def send() -> None:
        for number in range(count):
            engine.send(large(), number)

    def receive() -> None:
        for _ in range(count):
            arrived.append(engine.receive())

    async def agent() -> list[tuple[int, Message]]:
        channel = await AsyncChannel.open(pair[0])

        async def send_all() -> None:
            for number in range(count):
                await channel.send(large(), number)

        sending = asyncio.create_task(send_all())
        received = [await channel.receive() for _ in range(count)]
        await sending
        for thread in threads:  # what was sent may wait in this loop, and would end with it
            await asyncio.to_thread(thread.join, 60)
        return received

    threads = [threading.Thread(target=work, daemon=True) for work in (send, receive)]
    for thread in threads:
        thread.start()
    returned = asyncio.run(asyncio.wait_for(agent(), 120))
    for messages in (returned, arrived):
        assert [number for number, _ in messages] == list(range(count))
        assert all(same(message, large()) for _, message in messages)


def test_threads_that_send_at_once_mix_no_bytes(pair: Pair) -> None:
    channel, kinds = Channel(pair[1]), []

    def beat() -> None:
        for _ in range(200):
            channel.send(Beat(job="job", ring_generation=1, doing="encoding"))

    def step() -> None:
        for _ in range(5):
            channel.send(large())

    threads = [threading.Thread(target=work) for work in (beat, step, beat)]
    for thread in threads:
        thread.start()
    other = Channel(pair[0])
    for _ in range(405):
        kinds.append(type(other.receive()[1]))
    for thread in threads:
        thread.join(60)
    assert (kinds.count(Beat), kinds.count(Stepped)) == (400, 5)


def test_the_end_of_one_side_is_told_to_the_other(pair: Pair) -> None:
    engine = Channel(pair[1])
    pair[0].close()
    with pytest.raises(ConnectionClosed):
        engine.receive()
    with pytest.raises(ConnectionClosed):
        for _ in range(2):
            engine.send(large())


def test_a_message_that_breaks_off_is_the_end(pair: Pair) -> None:
    async def agent() -> Message:
        return (await (await AsyncChannel.open(pair[0])).receive())[1]

    frames = encode(large())
    pair[1].sendall(struct.pack(">3I", 2, len(frames[0]), len(frames[1])) + frames[0] + b"half")
    pair[1].close()
    with pytest.raises(ConnectionClosed):
        asyncio.run(agent())


def test_a_thread_that_waits_is_woken_when_its_own_side_closes(pair: Pair) -> None:
    channel, ends = Channel(pair[1]), []

    def wait() -> None:
        with pytest.raises(ConnectionClosed):
            channel.receive()
        ends.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    channel.close()
    thread.join(60)
    assert ends == [True]


def test_a_receive_that_is_cancelled_in_the_middle_loses_nothing(pair: Pair) -> None:
    async def agent() -> None:
        channel = await AsyncChannel.open(pair[0])
        frames = encode(large(), 5)
        head = struct.pack(">3I", 2, len(frames[0]), len(frames[1])) + bytes(frames[0])
        for piece in (head[:2], head[2:9], head[9:40], head[40:] + b"\x00\x00"):
            pair[1].sendall(piece)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(channel.receive(), 0.02)
        rest = bytes(frames[1])[2:]
        thread = threading.Thread(target=pair[1].sendall, args=(rest,))
        thread.start()
        seq, message = await channel.receive()
        thread.join(60)
        assert seq == 5 and isinstance(message, Stepped)
        await channel.close()

    asyncio.run(agent())


def test_an_engine_that_reads_nothing_does_not_hold_up_its_agent(pair: Pair) -> None:
    async def agent() -> None:
        channel = await AsyncChannel.open(pair[0])
        waiting = asyncio.create_task(channel.send(large()))
        await asyncio.sleep(0.05)
        began = asyncio.get_running_loop().time()
        await channel.close()
        assert asyncio.get_running_loop().time() - began < 30
        with pytest.raises(ConnectionClosed):
            await waiting

    asyncio.run(agent())


def test_a_send_that_waits_ends_when_the_engine_dies(pair: Pair) -> None:
    async def agent() -> None:
        channel = await AsyncChannel.open(pair[0])
        waiting = asyncio.create_task(channel.send(large()))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pair[1].close()
        with pytest.raises(ConnectionClosed):
            await waiting
        await channel.close()

    asyncio.run(agent())


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack(">I", 0),
        struct.pack(">I", limits.MAX_FRAMES + 1),
        struct.pack(">10I", 9, *[limits.MAX_FRAME] * 9),  # each as large as one may be
        struct.pack(">2I", 1, 0xFFFFFFFF),  # says that 4 GB follow
        struct.pack(">2I", 1, 4) + b"none",
        b"Traceback (most recent call last):\n",
    ],
)
def test_nonsense_is_refused_on_both_sides_before_memory_is_taken(
    pair: Pair, nonsense: bytes
) -> None:
    async def agent() -> None:
        await (await AsyncChannel.open(pair[0])).receive()

    pair[1].sendall(nonsense)
    with pytest.raises(ProtocolError):
        asyncio.run(agent())
    left, right = socket.socketpair()
    with left, right:
        left.sendall(nonsense)
        with pytest.raises(ProtocolError):
            Channel(right).receive()


def test_the_ends_of_a_stream_are_given_room(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, roomy = socket.socketpair(), stream.pair()
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        before = plain[0].getsockopt(socket.SOL_SOCKET, buffer)
        for end in roomy:
            # Linux grants at most net.core.?mem_max, and counts its own book-keeping twice.
            assert end.getsockopt(socket.SOL_SOCKET, buffer) > before
    for end in (*plain, *roomy):
        end.close()


def test_a_system_that_gives_no_more_room_gives_a_stream_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tight(socket.socket):
        def setsockopt(self, *_: object) -> None:  # type: ignore[override]
            raise OSError(55, "No buffer space available")

    def ends() -> tuple[socket.socket, socket.socket]:
        return tuple(Tight(fileno=end.detach()) for end in whole())  # type: ignore[return-value]

    whole = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", ends)
    near, far = stream.pair()
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    near.close()
    far.close()
