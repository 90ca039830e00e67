"""Files on their way from one folder to another over loopback: whole, resumed, damaged, refused."""

from __future__ import annotations

import contextlib
import hashlib
import random
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, LocalNetworkError, UsageError, WeightsError
from fluxmesh.wire.messages import ParcelFile
from fluxmesh_agent.parcels.channel import END, ChannelError, ParcelChannel
from fluxmesh_agent.parcels.relaying import RelaySource
from fluxmesh_agent.parcels.sending import DiskSource
from tests.unit.parcels.pushes import (
    COMMIT,
    FILES,
    QUICK,
    ModelDisk,
    SlowSource,
    comes,
    goes,
    sent,
    threads,
)


@pytest.mark.parametrize("hub", [True, False])
def test_a_checkpoint_arrives_whole_and_under_its_name_at_last(
    source: ModelDisk, target: ModelDisk, hub: bool
) -> None:
    parcel = source.parcel(hub=hub)
    early: list[bool] = []

    def look(_: int) -> None:
        early.append((target.models / "flux-4bit").exists())
        early.append((target.cache / "models--somebody--flux/refs/main").exists())

    sent(source, target, parcel, SlowSource(DiskSource(parcel, source.paths), look, 1 << 20))

    assert target.has(parcel)
    assert early and not any(early)
    assert not [path for path in target.everything if "pushed" in path or "incoming" in path]


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_push_goes_on_where_it_stopped(
    source: ModelDisk, target: ModelDisk, hub: bool, seed: int
) -> None:
    parcel = source.parcel(hub=hub)
    stop_at = random.Random(seed).randrange(1 << 16, parcel.nbytes)
    first = SlowSource(DiskSource(parcel, source.paths), lambda _: None, 1 << 16)

    with threads() as pool:
        receiver = comes(pool, target.landing(parcel))
        sender = goes(parcel, first, receiver.addresses)
        first.before = lambda done: sender.stop() if done >= stop_at else None
        with pytest.raises(FluxmeshError):
            sender.run()
        with pytest.raises(LocalNetworkError, match="sending host is gone"):
            receiver.end.result(60)
    assert not target.has(parcel)
    left = parcel.nbytes - target.landing(parcel).missing
    assert left > stop_at - (8 << 20)  # what was on the way alone is lost

    second = SlowSource(DiskSource(parcel, source.paths), lambda _: None, 1 << 22)
    sent(source, target, parcel, second)

    assert target.has(parcel)
    assert second.sent == parcel.nbytes - left
    again = SlowSource(DiskSource(parcel, source.paths), lambda _: None, 1 << 22)
    if hub:
        sent(source, target, parcel, again)
        assert again.sent == 0  # all of it is there


@pytest.mark.parametrize("hub", [True, False])
def test_a_byte_that_changes_on_the_way_is_noticed_and_the_file_sent_again(
    source: ModelDisk, target: ModelDisk, hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel, hurt = source.parcel(hub=hub), []
    whole = ParcelChannel.send

    def damaging(channel: ParcelChannel, block: memoryview) -> None:
        if len(block) > 1 << 20 and not hurt:
            hurt.append(True)
            block = memoryview(bytes([block[0] ^ 1]) + bytes(block[1:]))
        whole(channel, block)

    monkeypatch.setattr(ParcelChannel, "send", damaging)
    via = SlowSource(DiskSource(parcel, source.paths), lambda _: None, 1 << 22)
    sent(source, target, parcel, via)

    assert hurt and target.has(parcel)
    assert sorted(map(len, via.offsets.values()))[-1] == 2  # it came twice


def test_a_file_that_is_damaged_where_it_comes_from_is_told_and_not_kept(
    source: ModelDisk, target: ModelDisk
) -> None:
    parcel = source.parcel()
    path = source.paths["transformer/model.safetensors"]
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="transformer/model.safetensors arrives damaged"):
        sent(source, target, parcel)
    assert not target.has(parcel)
    assert parcel.files[0].blob not in {Path(each).name for each in target.everything}


def test_what_an_interrupted_push_left_is_not_believed(
    source: ModelDisk, target: ModelDisk
) -> None:
    """A power cut may leave a file of the right length with other bytes."""
    parcel = source.parcel(hub=False)
    place = target.landing(parcel)
    with place.opened():
        place.partial(parcel.files[0]).write_bytes(b"x" * 4_000_000)
        place.partial(parcel.files[1]).write_bytes(b"x" * 6_000_000)  # longer than the file
    sent(source, target, parcel)
    assert target.has(parcel)


def test_two_files_of_one_content_are_sent_once(tmp_path: Path, target: ModelDisk) -> None:
    data = random.Random(5).randbytes(3_000_000)
    twins = ModelDisk(tmp_path / "twins", {f"{part}/model.safetensors": data for part in "ab"})
    parcel = twins.parcel()
    via = SlowSource(DiskSource(parcel, twins.paths), lambda _: None, 1 << 20)
    sent(twins, target, parcel, via)
    assert via.sent == len(data)
    snapshot = target.cache / "models--somebody--flux" / "snapshots" / COMMIT
    assert [(snapshot / file.path).read_bytes() for file in parcel.files] == [data, data]


def test_nobody_who_comes_is_not_waited_for_for_ever(source: ModelDisk, target: ModelDisk) -> None:
    with threads() as pool, pytest.raises(LocalNetworkError, match="No host came"):
        comes(pool, target.landing(source.parcel()), deadlines=QUICK).end.result(60)


def test_a_sender_tries_one_address_after_another(source: ModelDisk, target: ModelDisk) -> None:
    parcel = source.parcel()
    with threads() as pool, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        receiver = comes(pool, target.landing(parcel))
        addresses = [f"127.0.0.1:{taken.getsockname()[1]}", *receiver.addresses]
        goes(parcel, DiskSource(parcel, source.paths), addresses).run()
        receiver.end.result(60)
        assert receiver.receiver.address == "127.0.0.1"
    assert target.has(parcel)


def test_a_host_that_has_other_files_sends_none(source: ModelDisk) -> None:
    parcel = source.parcel()
    more = replace(parcel, files=(*parcel.files, ParcelFile("other.json", 3)))
    with pytest.raises(UsageError, match=r"no other\.json"):
        DiskSource(more, source.paths)


# Who is let in


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of one, over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


@pytest.mark.parametrize("words", [b"", b"x" * 64, b"x" * 1000, None])
def test_a_stranger_gets_nothing_and_gives_nothing(
    source: ModelDisk, target: ModelDisk, words: bytes | None
) -> None:
    """Who has not the token: silence, noise, or the right protocol with another one."""
    parcel = source.parcel()
    with threads() as pool:
        soon = replace(DEADLINES, handshake=2.0)
        receiver = comes(pool, target.landing(parcel), deadlines=soon)
        ip, _, port = receiver.addresses[0].rpartition(":")
        with socket.create_connection((ip, int(port))) as stranger:
            if words is None:
                with pytest.raises((ChannelError, OSError)):
                    ParcelChannel.prove(stranger, b"u" * 32, 2.0, sends=True)
            else:
                stranger.sendall(words)
            goes(parcel, DiskSource(parcel, source.paths), receiver.addresses).run()
            receiver.end.result(60)
    assert target.has(parcel)


def test_a_receiver_that_does_not_know_the_token_is_sent_nothing(source: ModelDisk) -> None:
    parcel = source.parcel()
    with socket.create_server(("127.0.0.1", 0)) as server, threads() as pool:
        heard = pool.submit(_echo, server)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LocalNetworkError):
            goes(parcel, DiskSource(parcel, source.paths), [address]).run()
        assert heard.result(60) <= 64  # its nonce, and its proof


def _echo(server: socket.socket) -> int:
    """Says back what it hears, which is what it takes to be believed without a secret."""
    peer, _ = server.accept()
    count = 0
    with peer, contextlib.suppress(OSError):
        peer.settimeout(2.0)
        while data := peer.recv(4096):
            count += len(data)
            peer.sendall(data)
    return count


def test_a_hash_that_is_not_signed_is_not_believed() -> None:
    """Who changes a file on the way can't make its hash fit, though nothing is encrypted."""
    with connection() as (a, b), threads() as pool:
        proving = pool.submit(ParcelChannel.prove, b, b"t" * 32, 1.0, sends=False)
        sender = ParcelChannel.prove(a, b"t" * 32, 1.0, sends=True)
        receiver = proving.result(60)
        digest = hashlib.sha256(b"content").digest()
        sender.end(3, digest)
        assert receiver.length() == END and receiver.hash(3) == digest
        sender.end(3, digest)  # the hash of one file is not that of another
        receiver.length()
        with pytest.raises(ChannelError, match="not signed"):
            receiver.hash(4)
        a.sendall(b"\xff" * 4 + hashlib.sha256(b"other").digest() + b"0" * 32)
        receiver.length()
        with pytest.raises(ChannelError, match="not signed"):
            receiver.hash(3)


def test_a_token_is_used_for_one_side_of_one_connection(source: ModelDisk) -> None:
    """What a sender proves is no proof of a receiver: nobody can be answered with his own words."""
    with connection() as (a, b), threads() as pool:
        token = secrets.token_bytes(32)
        other = pool.submit(ParcelChannel.prove, b, token, 1.0, sends=True)
        with pytest.raises((ChannelError, OSError)):
            ParcelChannel.prove(a, token, 1.0, sends=True)
        with pytest.raises((ChannelError, OSError)):
            other.result(60)


# Chains


@pytest.mark.parametrize("hub", [True, False])
def test_what_comes_in_goes_on_meanwhile(
    source: ModelDisk, target: ModelDisk, tmp_path: Path, hub: bool
) -> None:
    parcel = source.parcel(hub=hub)
    last = ModelDisk(tmp_path / "last", {})
    half, waited = parcel.nbytes // 2, time.monotonic() + 60
    with threads() as pool:
        middle = comes(pool, target.landing(parcel))
        end = comes(pool, last.landing(parcel), b"u" * 32)
        relay = goes(parcel, RelaySource(middle.receiver), end.addresses, b"u" * 32)
        relaying = pool.submit(relay.run)

        def wait(sent: int) -> None:
            """Nothing more is sent before the last host has the first half."""
            while sent > 3 * half // 2 and end.receiver.done_bytes < half:
                assert time.monotonic() < waited, "it does not go on"
                time.sleep(0.01)

        slow = SlowSource(DiskSource(parcel, source.paths), wait, 1 << 18)
        goes(parcel, slow, middle.addresses).run()
        middle.end.result(60)
        relaying.result(60)
        end.end.result(60)
    assert target.has(parcel) and last.has(parcel)


def test_what_an_earlier_push_brought_goes_on_too(
    source: ModelDisk, target: ModelDisk, tmp_path: Path
) -> None:
    parcel = source.parcel(hub=False)
    place, last = target.landing(parcel), ModelDisk(tmp_path / "last", {})
    with place.opened():
        for file in parcel.files[:2]:
            place.whole(file).write_bytes(FILES[file.path])
    with threads() as pool:
        middle = comes(pool, place)
        end = comes(pool, last.landing(parcel), b"u" * 32)
        relay = goes(parcel, RelaySource(middle.receiver), end.addresses, b"u" * 32)
        relaying = pool.submit(relay.run)
        goes(parcel, DiskSource(parcel, source.paths), middle.addresses).run()
        for task in (middle.end, relaying, end.end):
            task.result(60)
    assert last.has(parcel)


def test_a_chain_that_breaks_is_told_down_to_its_end(
    source: ModelDisk, target: ModelDisk, tmp_path: Path
) -> None:
    parcel = source.parcel()
    last = ModelDisk(tmp_path / "last", {})
    with threads() as pool:
        middle = comes(pool, target.landing(parcel))
        end = comes(pool, last.landing(parcel), b"u" * 32)
        relay = goes(parcel, RelaySource(middle.receiver), end.addresses, b"u" * 32)
        relaying = pool.submit(relay.run)
        slow = SlowSource(DiskSource(parcel, source.paths), lambda _: time.sleep(0.01), 1 << 16)
        sender = goes(parcel, slow, middle.addresses)
        slow.before = lambda done: sender.stop() if done > 3 << 20 else None
        with pytest.raises(FluxmeshError):
            sender.run()
        for task in (middle.end, relaying, end.end):
            with pytest.raises(FluxmeshError):
                task.result(60)
    assert not last.has(parcel)
    sent(source, last, parcel)
    assert last.has(parcel)
