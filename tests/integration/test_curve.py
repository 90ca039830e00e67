"""The real transport between those who may talk: order, ends, heartbeats, rotation, no leak."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.storage.keys import Keys
from fluxmesh.wire.messages import Done, Heartbeat, LeaseQueued, Stepped
from fluxmesh.wire.transport import listener as listening
from fluxmesh.wire.transport.base import ConnectionClosed, NotAllowed
from fluxmesh.wire.transport.dialer import CurveDialer
from fluxmesh.wire.transport.listener import CurveListener
from tests.messages import same, samples
from tests.wire import MiddleBox, echo, run, wire


def test_messages_of_every_type_pass_in_order_both_ways(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            assert (near.user, far.user) == (made.keys.public, made.anna.public)
            assert far.label == "anna at 127.0.0.1"
            for here, there in ((near, far), (far, near)):
                sent = samples(random.Random(1), rounds=2)
                for number, message in enumerate(sent):
                    await here.send(message, number)
                for number, message in enumerate(sent):
                    seq, arrived = await there.receive()
                    assert seq == number and same(message, arrived)

    run(main())


def test_latents_of_a_large_picture_arrive_whole(tmp_path: Path) -> None:
    latents = np.random.default_rng(1).standard_normal((1, 16384, 64)).astype(np.float32)

    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            for step in (1, 2, 3):
                await far.send(
                    Stepped(
                        job="job",
                        ring_generation=1,
                        image=0,
                        step=step,
                        is_last=False,
                        seconds=0.5,
                        peak_bytes=0,
                        latents=latents,
                    )
                )
                _, arrived = await near.receive()
                assert isinstance(arrived, Stepped) and arrived.latents is not None
                assert arrived.step == step and np.array_equal(arrived.latents, latents)

    run(main())


def test_several_users_are_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            ben = Keys.new()
            made.allowlist.add("ben", ben.public)
            _, anna = await made.pair()
            other = await made.as_user(ben).connect(made.listener.address, made.keys.public)
            await other.send(Heartbeat(), 2)
            accepted = await made.listener.accept()
            assert (anna.user, accepted.user) == (made.anna.public, ben.public)
            assert await accepted.receive() == (2, Heartbeat())
            assert accepted.label == "ben at 127.0.0.1"

    run(main())


def test_each_side_is_told_at_once_when_the_other_closes(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            for closer in (0, 1):
                ends = await made.pair()
                await ends[closer].close()
                await ends[closer].close()
                for end in ends:
                    with pytest.raises(ConnectionClosed):
                        await asyncio.wait_for(end.receive(), 60)
                    with pytest.raises(ConnectionClosed):
                        await end.send(Done())

    run(main())


def test_what_was_sent_last_arrives_before_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            await far.send(Done(), 5)
            closing = asyncio.create_task(made.listener.close())
            assert await near.receive() == (5, Done())
            with pytest.raises(ConnectionClosed):
                await near.receive()
            await closing
            with pytest.raises(ConnectionClosed):
                await made.listener.accept()

    run(main())


def test_what_arrived_is_read_also_when_the_end_was_seen_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            for number in range(100):
                await far.send(Done(), number)
            await asyncio.sleep(0.2)  # all is here; most is taken off the socket, the rest waits
            closing = asyncio.create_task(made.listener.close())
            await asyncio.sleep(0.3)
            for number in range(100):
                assert await near.receive() == (number, Done())
            with pytest.raises(ConnectionClosed):
                await near.receive()
            await closing

    run(main())


def test_a_closed_listener_frees_its_port_and_a_taken_one_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            address = made.listener.address
            with pytest.raises(ConnectionClosed, match=address):
                await CurveListener.open(address, made.keys, made.allowlist)
            await made.listener.close()
            again = await CurveListener.open(address, made.keys, made.allowlist)
            await made.dialer.connect(address, made.keys.public)
            await again.close()
            with pytest.raises(ConnectionClosed, match=r"Nobody listens"):
                await made.dialer.connect(address, made.keys.public)

    run(main())


def test_who_dials_or_listens_with_what_is_no_key_is_told_and_can_close(tmp_path: Path) -> None:
    """A socket that is left open would make `close` wait for ever."""
    failures: list[BaseException] = []  # whose tracebacks hold what was made

    async def main() -> None:
        async with wire(tmp_path) as made:
            dialer = CurveDialer(made.anna)
            try:
                for key in ("", "short", "\u00e9" * 40):
                    with pytest.raises(ConnectionClosed, match="Can't connect to") as caught:
                        await dialer.connect(made.listener.address, key)
                    failures.append(caught.value)
                await asyncio.wait_for(dialer.close(), 60)
            finally:
                failures.clear()  # so that a failure of this test ends
                gc.collect()
            with pytest.raises(ConnectionClosed, match="Can't listen at"):
                broken = Keys(made.keys.public, "none")
                await CurveListener.open("127.0.0.1:0", broken, made.allowlist)

    run(main())


def test_only_the_address_that_was_named_is_bound(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            sockets = psutil.Process().net_connections("tcp")
            bound = {
                connection.laddr.ip for connection in sockets if connection.laddr.port == made.port
            }
            assert bound == {"127.0.0.1"}
            await made.works()

    run(main())


def test_a_peer_that_falls_silent_is_gone_within_six_seconds(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            middle = await MiddleBox.before(made.port)
            near, far = await made.pair(middle.address)
            middle.passing.clear()  # as a stopped process or a cut cable: open, and silent
            clock = asyncio.get_running_loop().time
            began = clock()
            for end in (near, far):
                with pytest.raises(ConnectionClosed, match="silent"):
                    await asyncio.wait_for(end.receive(), 60)
            assert 2 < clock() - began < 50  # TCP itself would wait for minutes
            await made.works()
            await middle.close()

    run(main())


def test_a_coordinator_that_is_killed_is_gone_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            code = f"""
import asyncio
from fluxmesh.storage.keys import Keys
from fluxmesh.wire.messages import Heartbeat
from fluxmesh.wire.transport.dialer import CurveDialer
async def main():
    keys = Keys.of(input())
    near = await CurveDialer(keys).connect({made.listener.address!r}, {made.keys.public!r})
    await near.send(Heartbeat(), 1)
    await near.receive()
asyncio.run(main())
"""
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
            assert child.stdin is not None
            child.stdin.write(made.anna.secret.encode() + b"\n")
            child.stdin.flush()
            far = await made.listener.accept()
            assert await far.receive() == (1, Heartbeat())
            child.kill()
            child.wait()
            child.stdin.close()
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(far.receive(), 60)

    run(main())


def test_a_coordinator_that_reads_nothing_is_put_out_and_holds_up_nobody(
    tmp_path: Path,
) -> None:
    large = Stepped(
        job="job",
        ring_generation=1,
        image=0,
        step=1,
        is_last=False,
        seconds=0.5,
        peak_bytes=0,
        latents=np.zeros((1, 4096, 16), np.float32),
    )

    async def fill(far: listening.AcceptedConnection) -> None:
        while True:
            await far.send(large)

    async def main() -> None:
        async with wire(tmp_path, replace(DEADLINES, full_line=0.5)) as made:
            near, far = await made.pair()
            filling = asyncio.create_task(fill(far))
            good = await made.pair()
            while not filling.done():
                await echo(*good)
                await asyncio.sleep(0.05)
            with pytest.raises(ConnectionClosed, match="does not read"):
                await filling
            await near.close()

    run(main())


def test_a_coordinator_that_floods_is_put_out_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            good = await made.pair()
            with pytest.raises(ConnectionClosed):
                for place in range(20_000):
                    await near.send(LeaseQueued(place, 0.0))
            await echo(*good)
            assert far.box.ended and len(far.box) <= 1024
            assert "anna at 127.0.0.1 floods" in caplog.text

    run(main())


def test_slow_reading_by_a_coordinator_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            count = 2000

            async def report() -> None:
                for place in range(count):
                    await far.send(LeaseQueued(place, 0.0))

            sending = asyncio.create_task(report())
            await asyncio.sleep(0.3)
            received = [await near.receive() for _ in range(count)]
            assert received == [(0, LeaseQueued(place, 0.0)) for place in range(count)]
            await sending

    run(main())


def test_keys_rotate_without_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            near, far = await made.pair()
            new = Keys.new()
            made.allowlist.add("anna", new.public)  # in the place of the old one
            renewed = made.as_user(new)
            again = await renewed.connect(made.listener.address, made.keys.public)
            await again.send(Heartbeat(), 1)
            accepted = await made.listener.accept()
            assert accepted.user == new.public
            with pytest.raises(NotAllowed, match="fluxmesh up"):
                await made.dialer.connect(made.listener.address, made.keys.public)
            # The connection that was open with the old key is of no more use either.
            await asyncio.sleep(1.1)
            await near.send(Heartbeat(), 2)
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(near.receive(), 60)
            with pytest.raises(ConnectionClosed, match="no longer in the allowlist"):
                await far.receive()
            assert await accepted.receive() == (1, Heartbeat())
            await echo(again, accepted)

    run(main())


def test_an_agent_with_new_keys_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            await made.works()
            address, old = made.listener.address, made.keys
            await made.listener.close()
            new = Keys.new()
            made.listener = await CurveListener.open(address, new, made.allowlist)
            with pytest.raises(NotAllowed, match="not the agent whose key is known"):
                await made.dialer.connect(address, old.public)
            made.keys = new
            await made.works()

    run(main())


def test_two_hundred_connections_leave_no_descriptor_and_no_record(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            await made.works()
            await asyncio.sleep(0.2)
            gc.collect()
            before = len(os.listdir("/dev/fd"))
            for _ in range(200):
                await made.works()
            async with asyncio.timeout(60):
                while len(os.listdir("/dev/fd")) > before + 4:
                    await asyncio.sleep(0.1)
                    gc.collect()
                while made.listener._by_identity or made.listener._strangers:
                    await asyncio.sleep(0.1)
            assert not made.listener._by_identity and not made.listener._strangers

    run(main())
