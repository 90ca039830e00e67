"""Nobody gets in: each attempt is refused with a log line, and the agent goes on working."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
import zmq.asyncio

from fluxmesh.storage.keys import Allowlist, Keys
from fluxmesh.wire import limits
from fluxmesh.wire.messages import Heartbeat, Refused
from fluxmesh.wire.protocol import Frame, decode, encode
from fluxmesh.wire.transport import gate
from fluxmesh.wire.transport.base import ConnectionClosed, NotAllowed
from tests.messages import forged
from tests.wire import MiddleBox, Wire, echo, run, wire

# What a peer with CURVE sends first: signature, version 3.1, mechanism, as a client.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
FOUR_GB = b"\x06" + struct.pack(">Q", 4 << 30)  # header of a long command
FOUR_GB_MESSAGE = b"\x02" + struct.pack(">Q", 4 << 30)  # and of a long message


@pytest.fixture(autouse=True)
def all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Waits for a log line; monitors tell a moment later."""
    end = time.monotonic() + 60
    while text not in caplog.text:
        assert time.monotonic() < end, f"no line says {text!r}:\n{caplog.text}"
        await asyncio.sleep(0.02)


async def nothing_arrives(made: Wire) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(made.listener.accept(), 0.3)


def test_a_peer_without_a_key_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            for mechanism in ("NULL", "PLAIN"):
                with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
                    stranger.linger = 0
                    if mechanism == "PLAIN":
                        stranger.plain_username, stranger.plain_password = b"anna", b"anna"
                    stranger.connect(f"tcp://{made.listener.address}")
                    await stranger.send_multipart(encode(Heartbeat(), 1))
                    await nothing_arrives(made)
                await logged(caplog, "refused ")
                caplog.clear()
                await made.works()

    run(main())


def test_a_wrong_key_is_refused_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            stranger = Keys.new()
            with pytest.raises(NotAllowed, match="does not know this user's key"):
                await made.as_user(stranger).connect(made.listener.address, made.keys.public)
            await logged(caplog, f"refused 127.0.0.1: the key {stranger.public} is not in")
            assert stranger.secret not in caplog.text
            await nothing_arrives(made)
            await made.works()

    run(main())


def test_the_public_key_of_a_user_is_of_no_use_without_its_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            forged_keys = Keys(made.anna.public, Keys.new().secret)
            with pytest.raises(ConnectionClosed):
                await made.as_user(forged_keys).connect(
                    made.listener.address, made.keys.public, 2.0
                )
            await nothing_arrives(made)
            await made.works()

    run(main())


def test_an_empty_allowlist_lets_nobody_in(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            await made.works()
            made.allowlist.remove("anna")
            with pytest.raises(NotAllowed):
                await made.dialer.connect(made.listener.address, made.keys.public)
            (made.allowlist.folder / "anna.pub").write_text("*\n")
            with pytest.raises(NotAllowed):
                await made.dialer.connect(made.listener.address, made.keys.public)
            made.allowlist.add("anna", made.anna.public)
            await made.works()

    run(main())


def test_an_allowlist_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            made.allowlist.folder.rename(tmp_path / "elsewhere")
            with pytest.raises(NotAllowed):
                await made.dialer.connect(made.listener.address, made.keys.public)
            (tmp_path / "elsewhere").rename(made.allowlist.folder)
            await made.works()

    run(main())


def test_nobody_is_let_in_while_the_gate_does_not_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            await made.works()
            await made.listener._gate.close()
            with pytest.raises(ConnectionClosed):
                await made.dialer.connect(made.listener.address, made.keys.public, 1.0)
            await nothing_arrives(made)

    run(main())


def test_what_the_gate_can_not_check_is_refused_and_the_gate_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Allowlist) -> dict[str, str]:
        raise OSError("the disk is gone")

    async def main() -> None:
        async with wire(tmp_path) as made:
            good = await made.pair()
            with monkeypatch.context() as patch:
                patch.setattr(Allowlist, "users", broken)
                with pytest.raises(NotAllowed):
                    await made.dialer.connect(made.listener.address, made.keys.public)
                await good[0].send(Heartbeat(), 2)
                await logged(caplog, "could not be sorted")
            await echo(*good)
            await made.works()

    run(main())


def test_a_replayed_hello_opens_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            middle = await MiddleBox.before(made.port)
            near, far = await made.pair(middle.address)
            await echo(near, far)
            heard = bytes(middle.heard)
            assert len(heard) > 500  # greeting, hello, initiate, messages
            for original_is_gone in (False, True):
                if original_is_gone:
                    await near.close()
                    await middle.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
                writer.write(heard)
                await asyncio.wait_for(reader.read(), 60)  # until the agent hangs up
                writer.close()
                await logged(caplog, "refused ")
                caplog.clear()
                await nothing_arrives(made)
            await made.works()

    run(main())


def test_a_user_can_not_speak_in_the_name_of_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            ben = Keys.new()
            made.allowlist.add("ben", ben.public)
            near, far = await made.pair()
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as thief:
                arm(thief, made, ben)
                thief.routing_id = near._socket.routing_id
                thief.connect(f"tcp://{made.listener.address}")
                await thief.send_multipart(encode(Heartbeat(), 66))
                await nothing_arrives(made)
                await echo(near, far)  # the owner is neither cut off nor impersonated
                assert len(far.box) == 0
            await made.works()

    run(main())


def arm(sock: zmq.asyncio.Socket, made: Wire, keys: Keys) -> None:
    sock.linger = 0
    sock.curve_serverkey = made.keys.public.encode()
    sock.curve_publickey = keys.public.encode()
    sock.curve_secretkey = keys.secret.encode()


def test_ten_thousand_fuzzed_messages_of_a_user_are_each_answered_and_none_crashes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # ten thousand lines are slow to capture

    async def main() -> None:
        draw, count = random.Random(4), 10_000
        async with wire(tmp_path) as made:
            good = await made.pair()
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as fuzzer:
                arm(fuzzer, made, made.anna)
                fuzzer.connect(f"tcp://{made.listener.address}")
                await fuzzer.send_multipart(encode(Heartbeat()))
                far = await made.listener.accept()
                understood = 0

                async def receive() -> None:
                    nonlocal understood
                    while True:
                        await far.receive()
                        understood += 1

                agent = asyncio.create_task(receive())
                refused = 0
                for _ in range(count // 100):
                    batch: list[list[Frame]] = [forged(draw) or [b""] for _ in range(100)]
                    before = understood
                    for frames in batch:
                        await fuzzer.send_multipart(frames)
                    answers = 0
                    while answers + (understood - before) < 100:
                        answer = await asyncio.wait_for(fuzzer.recv_multipart(), 60)
                        assert isinstance(decode(answer)[1], Refused)
                        answers += 1
                    refused += answers
                    await echo(*good)
                assert refused > 7000 and not agent.done()
                agent.cancel()
            await made.works()

    run(main(), 250)


def test_random_bytes_on_the_port_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: 1e6))  # one minute

    async def main() -> None:
        draw = random.Random(5)
        async with wire(tmp_path) as made:
            good = await made.pair()
            for number in range(300):
                _, writer = await asyncio.open_connection("127.0.0.1", made.port)
                start = [b"", GREETING, GREETING[: draw.randrange(64)]][number % 3]
                writer.write(start + draw.randbytes(draw.randrange(400)))
                writer.close()
                if number % 50 == 0:
                    await echo(*good)
            await logged(caplog, "refused ")
            await nothing_arrives(made)
            await made.works()
        assert len(caplog.records) <= 32  # strangers do not fill the disk

    run(main())


def test_a_stranger_who_says_nothing_is_put_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            await asyncio.wait_for(reader.read(), 60)
            writer.close()
            await logged(caplog, "refused ")

    run(main())


def peak_bytes() -> int:
    """The most memory that this process had at a time."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.mark.parametrize("header", [FOUR_GB, FOUR_GB_MESSAGE, b"\x02" + b"\xff" * 8])
def test_a_strangers_frame_of_four_gigabytes_is_refused_at_its_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            before = peak_bytes()
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(GREETING + header + bytes(1 << 16))
            await asyncio.wait_for(hung_up(reader), 60)
            writer.close()
            await logged(caplog, "refused ")
            await made.works()
            assert peak_bytes() - before < 64 << 20

    run(main())


@pytest.mark.parametrize("header", [FOUR_GB, FOUR_GB_MESSAGE])
def test_a_users_frame_of_four_gigabytes_ends_that_connection_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            before = peak_bytes()
            good = await made.pair()
            middle = await MiddleBox.before(made.port)
            _, far = await made.pair(middle.address)
            assert middle.to_agent is not None
            middle.to_agent.write(header + bytes(1 << 16))
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(far.receive(), 60)
            await logged(caplog, "frame over the limit")
            await echo(*good)
            await made.works()
            await middle.close()
            assert peak_bytes() - before < 64 << 20

    run(main())


def test_a_frame_at_the_limit_passes_and_one_above_it_ends_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with wire(tmp_path) as made:
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as sender:
                arm(sender, made, made.anna)
                sender.reconnect_ivl = -1
                sender.connect(f"tcp://{made.listener.address}")
                await sender.send_multipart(encode(Heartbeat()))
                far = await made.listener.accept()
                await far.receive()
                largest = bytes(limits.MAX_FRAME)
                waiting = asyncio.create_task(far.receive())
                await sender.send_multipart([*encode(Heartbeat(), 3), largest])
                answer = decode(await asyncio.wait_for(sender.recv_multipart(), 60))
                assert answer[0] == 3 and isinstance(answer[1], Refused)
                await sender.send_multipart([*encode(Heartbeat(), 4), largest + bytes(4096)])
                with pytest.raises(ConnectionClosed):
                    await asyncio.wait_for(waiting, 60)
            await made.works()

    run(main())


async def hung_up(reader: asyncio.StreamReader) -> None:
    """Reads until the other side closes; it may do so with a reset."""
    try:
        while await reader.read(1 << 16):
            continue
    except ConnectionResetError:
        return
