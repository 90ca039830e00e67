"""The twins of the transport: inside of one process, and broken on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fluxmesh.wire.messages import AskLogs, Done, Heartbeat, LeaseQueued, Message, Refused
from fluxmesh.wire.protocol import ProtocolError
from fluxmesh.wire.transport.base import Connection, ConnectionClosed, Dialer, Listener
from fluxmesh.wire.transport.inproc import InprocConnection, Network
from fluxmesh.wire.transport.stream import AsyncChannel
from tests.broken_transport import BrokenDialer, BrokenListener, Faults


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test that waits; one that hangs ends in 10 s."""
    asyncio.run(asyncio.wait_for(main, 60))


async def pair(network: Network) -> tuple[InprocConnection, InprocConnection]:
    """Both ends of a connection: the coordinator's, the agent's."""
    listener = network.listen()
    near = await network.dialer("anna").connect(listener.address, "key of the agent")
    return near, await listener.accept()


def test_messages_pass_both_ways_in_order() -> None:
    async def main() -> None:
        near, far = await pair(Network())
        assert (near.user, far.user) == ("key of the agent", "anna")
        for place in range(5):
            await near.send(LeaseQueued(place, 0.5), place)
        assert [await far.receive() for _ in range(5)] == [
            (i, LeaseQueued(i, 0.5)) for i in range(5)
        ]
        await far.send(Done(), 4)
        assert await near.receive() == (4, Done())

    run(main())


def test_what_arrived_before_the_end_is_received_and_then_the_end_for_ever() -> None:
    async def main() -> None:
        near, far = await pair(Network())
        await near.send(Done())
        await near.close()
        await near.close()
        assert await far.receive() == (0, Done())
        for _ in range(2):
            with pytest.raises(ConnectionClosed):
                await far.receive()
            with pytest.raises(ConnectionClosed):
                await near.receive()
            with pytest.raises(ConnectionClosed):
                await far.send(Done())

    run(main())


def test_a_receive_that_waits_ends_when_either_side_closes() -> None:
    async def main() -> None:
        for closer in (0, 1):
            ends = await pair(Network())
            waiting = [asyncio.create_task(end.receive()) for end in ends]
            await asyncio.sleep(0)
            await ends[closer].close()
            for task in waiting:
                with pytest.raises(ConnectionClosed):
                    await task

    run(main())


def test_an_agent_answers_nonsense_and_a_coordinator_is_told_of_it() -> None:
    async def main() -> None:
        near, far = await pair(Network())
        await near.send_frames([b"nonsense"])
        await near.send(Heartbeat(), 3)
        assert await far.receive() == (3, Heartbeat())
        _, answer = await near.receive()
        assert isinstance(answer, Refused) and answer.code == "malformed"
        await far.send_frames([b"nonsense"])
        await far.send(Done(), 3)
        with pytest.raises(ProtocolError):
            await near.receive()
        assert await near.receive() == (3, Done())

    run(main())


def test_nobody_listens_before_and_after_a_listener() -> None:
    async def main() -> None:
        network = Network()
        listener = network.listen("mac-1:7000")
        near = await network.dialer().connect("mac-1:7000", "key")
        await listener.accept()
        await listener.close()
        with pytest.raises(ConnectionClosed):
            await near.receive()
        for _ in range(2):
            with pytest.raises(ConnectionClosed):
                await listener.accept()
        with pytest.raises(ConnectionClosed, match="mac-1:7000"):
            await network.dialer().connect("mac-1:7000", "key")
        network.listen("mac-1:7000")  # a restarted agent has the same address

    run(main())


def test_the_codec_is_part_of_the_way() -> None:
    async def main() -> None:
        near, _ = await pair(Network())
        with pytest.raises(ProtocolError):
            await near.send(AskLogs(-1))

    run(main())


async def through(faults: Faults, count: int = 200) -> list[int]:
    """The numbers that arrive of `count` messages sent over a broken connection."""
    network = Network()
    listener = network.listen()
    near = await BrokenDialer(network.dialer(), faults).connect(listener.address, "key")
    far = await listener.accept()
    numbers: list[int] = []
    try:
        for number in range(count):
            await near.send(Heartbeat() if number % 2 else Done(), number)
    except ConnectionClosed:
        assert faults.cut
    await near.close()
    while True:
        try:
            numbers.append((await far.receive())[0])
        except ConnectionClosed:
            return numbers


def test_faults_happen_as_often_as_they_should_and_the_same_each_time() -> None:
    async def main() -> None:
        everything = list(range(200))
        assert await through(Faults()) == everything
        dropped = await through(Faults(seed=1, drop=0.3))
        assert 100 < len(dropped) < 180
        assert await through(Faults(seed=1, drop=0.3)) == dropped
        assert await through(Faults(seed=2, drop=0.3)) != dropped
        repeated = await through(Faults(seed=1, repeat=0.3))
        assert sorted(set(repeated)) == everything and 230 < len(repeated) < 290
        cut = await through(Faults(seed=1, cut=0.02))
        assert cut == everything[: len(cut)] and len(cut) < 200

    run(main())


def test_faults_can_be_kept_to_some_messages() -> None:
    async def main() -> None:
        faults = Faults(drop=1.0, only=(Heartbeat,))
        assert await through(faults) == list(range(0, 200, 2))

    run(main())


def test_a_late_message_holds_up_what_comes_behind_it() -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        assert await through(Faults(delay=1.0, seconds=0.01), 20) == list(range(20))
        assert clock() - began >= 0.2

    run(main())


def test_an_agents_side_can_be_broken_too() -> None:
    async def main() -> None:
        network = Network()
        listener = BrokenListener(network.listen("mac:1"), Faults(repeat=1.0))
        near = await network.dialer().connect("mac:1", "key")
        far = await listener.accept()
        await near.send(Heartbeat(), 1)
        await near.send(Heartbeat(), 2)
        assert [(await far.receive())[0] for _ in range(4)] == [1, 1, 2, 2]
        await far.send(Done(), 1)
        assert [await near.receive() for _ in range(2)] == [(1, Done())] * 2

    run(main())


def test_every_end_keeps_to_the_interface() -> None:
    """mypy is not run on tests: the names must be there."""
    parts = {
        Connection: [InprocConnection("", "", True), AsyncChannel],
        Listener: [Network().listen()],
        Dialer: [Network().dialer()],
    }
    for interface, ends in parts.items():
        wanted = [name for name in vars(interface) if not name.startswith("_")]
        assert wanted
        for end in ends:
            assert all(hasattr(end, name) for name in wanted), end


def test_messages_are_the_only_thing_that_is_sent() -> None:
    async def main() -> None:
        near, _ = await pair(Network())
        with pytest.raises(ProtocolError):
            await near.send(Message())

    run(main())
