"""Files on their way from one folder to another over loopback: whole, resumed, damaged, refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, LocalNetworkError, OutputError, UsageError, WeightsError
from fluxmesh.wire.messages import ModelParcel, ParcelFile
from fluxmesh_agent.parcels import landing as landing_module
from fluxmesh_agent.parcels import receiving
from fluxmesh_agent.parcels.channel import END, ChannelError, ParcelChannel
from fluxmesh_agent.parcels.landing import Landing, landing
from fluxmesh_agent.parcels.receiving import ParcelReceiver
from fluxmesh_agent.parcels.relaying import RelaySource
from fluxmesh_agent.parcels.sending import DiskSource, FileSource, ParcelSender, Put

COMMIT = "c" * 40
CONTENT = "0123456789abcdef"
FILES = {
    "transformer/model.safetensors": random.Random(1).randbytes(9_000_001),
    "vae/model.safetensors": random.Random(2).randbytes(5_000_000),
    "vae/config.json": b"{}",
    "model_index.json": b'{"a": 1}',
    "empty.txt": b"",
}
QUICK = replace(DEADLINES, link_open=2.0, handshake=0.5)


class ModelDisk:
    """A host's models: files that lie there, and where more would land."""

    def __init__(self, folder: Path, files: Mapping[str, bytes] = FILES) -> None:
        self.files, self.folder = files, folder
        self.cache, self.models = folder / "cache", folder / "models"
        self.paths = {path: folder / "made" / path for path in files}
        for path, data in files.items():
            self.paths[path].parent.mkdir(parents=True, exist_ok=True)
            self.paths[path].write_bytes(data)

    def parcel(self, *, hub: bool = True) -> ModelParcel:
        files = [
            ParcelFile(path, len(data), _blob(path, data) if hub else "")
            for path, data in self.files.items()
        ]
        name = "somebody/flux" if hub else "flux-4bit"
        return ModelParcel(name, COMMIT if hub else "", CONTENT, tuple(files))

    def landing(self, parcel: ModelParcel) -> Landing:
        return landing(parcel, self.cache, self.models)

    def has(self, parcel: ModelParcel) -> bool:
        """Whether all of a parcel lies where it belongs, with the right bytes."""
        folder = self.models / parcel.name
        if parcel.commit:
            folder = self.cache / "models--somebody--flux" / "snapshots" / parcel.commit
        return all(
            (folder / path).is_file() and (folder / path).read_bytes() == data
            for path, data in FILES.items()
        )

    @property
    def everything(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}


def _blob(path: str, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return digest if path.endswith(".safetensors") else hashlib.sha1(data).hexdigest()


class SlowSource:
    """A disk's files in small pieces, with something done before each of them."""

    def __init__(self, source: FileSource, before: Callable[[int], None], piece: int) -> None:
        self.source, self.before, self.piece = source, before, piece
        self.sent = 0
        self.offsets: dict[str, list[int]] = {}

    def read(self, file: ParcelFile, offset: int, put: Put) -> bytes:
        self.offsets.setdefault(file.path, []).append(offset)

        def slowly(block: memoryview) -> None:
            for begin in range(0, len(block), self.piece):
                self.before(self.sent)
                piece = block[begin : begin + self.piece]
                put(piece)
                self.sent += len(piece)

        return self.source.read(file, offset, slowly)


class Comes:
    """A receiver at work in a thread, and where it listens."""

    def __init__(self, receiver: ParcelReceiver, pool: ThreadPoolExecutor) -> None:
        self.receiver = receiver
        self._listening: Future[Sequence[str]] = Future()
        self.end = pool.submit(receiver.run, self._listening.set_result)

    @property
    def addresses(self) -> Sequence[str]:
        while not self._listening.done():
            if self.end.done():
                self.end.result()
            time.sleep(0.005)
        return self._listening.result()


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of one, over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def comes(pool: ThreadPoolExecutor, place: Landing, token: bytes = b"t" * 32) -> Comes:
    return Comes(ParcelReceiver(place, token, ["127.0.0.1"], QUICK), pool)


def goes(
    parcel: ModelParcel, source: FileSource, addresses: Sequence[str], token: bytes = b"t" * 32
) -> ParcelSender:
    return ParcelSender(parcel, source, token, addresses, QUICK)


def sent(
    source: ModelDisk, target: ModelDisk, parcel: ModelParcel, via: FileSource | None = None
) -> None:
    """Sends it; raises what the receiver does."""
    with threads() as pool:
        receiver = comes(pool, target.landing(parcel))
        via = via or DiskSource(parcel, source.paths)
        with contextlib.suppress(FluxmeshError):
            goes(parcel, via, receiver.addresses).run()
        receiver.end.result(60)


@pytest.fixture
def source(tmp_path: Path) -> ModelDisk:
    return ModelDisk(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> ModelDisk:
    return ModelDisk(tmp_path / "target", {})


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


def test_a_snapshot_lies_in_the_cache_as_the_hubs_own_library_lays_it(
    source: ModelDisk, target: ModelDisk
) -> None:
    import huggingface_hub

    parcel = source.parcel()
    sent(source, target, parcel)
    repo = target.cache / "models--somebody--flux"
    for file in parcel.files:
        name = repo / "snapshots" / COMMIT / file.path
        assert os.readlink(name) == os.path.relpath(repo / "blobs" / file.blob, name.parent)
        got = huggingface_hub.try_to_load_from_cache(
            "somebody/flux", file.path, cache_dir=target.cache
        )
        assert got == str(name)
    (info,) = huggingface_hub.scan_cache_dir(target.cache).repos
    assert info.repo_id == "somebody/flux" and info.size_on_disk == parcel.nbytes
    assert not huggingface_hub.scan_cache_dir(target.cache).warnings


def test_a_disk_without_links_holds_files_where_others_hold_links(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refused)
    parcel = source.parcel()
    sent(source, target, parcel)
    assert target.has(parcel)
    # What was fetched on such a disk has no blobs to be called by.
    nameless = replace(parcel, files=tuple(replace(file, blob="") for file in parcel.files))
    other = ModelDisk(target.folder / "other", {})
    sent(source, other, nameless)
    assert other.has(parcel)


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


def test_a_full_disk_is_told_before_the_first_byte(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing_module, "LEFT_FREE", 1 << 60)
    with pytest.raises(OutputError, match=r"needs 0.0 GB more.*make room there"):
        sent(source, target, source.parcel())
    assert not [path for path in target.everything if path.endswith(".pushed")]


def test_a_disk_that_fills_meanwhile_is_told_and_the_push_goes_on_later(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel, written = source.parcel(), []
    write = os.write

    def full(handle: int, data: memoryview) -> int:
        written.append(len(data))
        if sum(written) > 7 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(receiving.os, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        sent(source, target, parcel)
    monkeypatch.undo()
    assert target.landing(parcel).missing < parcel.nbytes
    sent(source, target, parcel)
    assert target.has(parcel)


@pytest.mark.parametrize("link", ["models--somebody--flux", "models--somebody--flux/blobs"])
def test_a_link_in_the_cache_leads_no_file_out_of_it(
    source: ModelDisk, target: ModelDisk, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (target.cache / link).parent.mkdir(parents=True)
    (target.cache / link).symlink_to(outside)
    with pytest.raises(UsageError, match="is a link"):
        sent(source, target, source.parcel())
    assert not list(outside.iterdir())


def test_a_link_where_a_file_is_to_be_written_is_not_followed(
    source: ModelDisk, target: ModelDisk, tmp_path: Path
) -> None:
    parcel = source.parcel()
    place = target.landing(parcel)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    with place.opened():
        place.partial(parcel.files[0]).symlink_to(precious)
    with pytest.raises(OutputError):
        sent(source, target, parcel)
    assert precious.read_bytes() == b"mine"


def test_another_checkpoint_of_that_name_stays(source: ModelDisk, target: ModelDisk) -> None:
    other = target.models / "flux-4bit" / "model_index.json"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(UsageError, match="another checkpoint"):
        sent(source, target, source.parcel(hub=False))
    assert other.read_text() == "mine"


def test_what_a_push_of_another_version_left_gives_its_room_back(
    source: ModelDisk, target: ModelDisk
) -> None:
    for hub in (True, False):
        parcel = source.parcel(hub=hub)
        files = (*parcel.files[1:], replace(parcel.files[0], blob="f" * 64 if hub else ""))
        old = replace(parcel, commit="d" * 40 if hub else "", content="f" * 16, files=files)
        place = target.landing(old)
        with place.opened():
            place.partial(files[-1]).write_bytes(b"x" * 1000)
        left = place.partial(files[-1])
        sent(source, target, parcel)
        assert target.has(parcel) and not left.exists()


def test_a_second_push_of_the_same_waits_for_nobody(source: ModelDisk, target: ModelDisk) -> None:
    parcel = source.parcel()
    refused = pytest.raises(FluxmeshError, match="on its way to this host already")
    with target.landing(parcel).opened(), refused:
        sent(source, target, parcel)
    sent(source, target, parcel)


@pytest.mark.parametrize("words", [b"", b"x" * 64, b"x" * 1000, None])
def test_a_stranger_gets_nothing_and_gives_nothing(
    source: ModelDisk, target: ModelDisk, words: bytes | None
) -> None:
    """Who has not the token: silence, noise, or the right protocol with another one."""
    parcel = source.parcel()
    with threads() as pool:
        receiver = comes(pool, target.landing(parcel))
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


def test_nobody_who_comes_is_not_waited_for_for_ever(source: ModelDisk, target: ModelDisk) -> None:
    with threads() as pool, pytest.raises(LocalNetworkError, match="No host came"):
        comes(pool, target.landing(source.parcel())).end.result(60)


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


# Chains


@pytest.mark.parametrize("hub", [True, False])
def test_what_comes_in_goes_on_meanwhile(
    source: ModelDisk, target: ModelDisk, tmp_path: Path, hub: bool
) -> None:
    parcel = source.parcel(hub=hub)
    last = ModelDisk(tmp_path / "last", {})
    seen: list[int] = []
    with threads() as pool:
        middle = comes(pool, target.landing(parcel))
        end = comes(pool, last.landing(parcel), b"u" * 32)
        relay = goes(parcel, RelaySource(middle.receiver), end.addresses, b"u" * 32)
        relaying = pool.submit(relay.run)
        slow = SlowSource(
            DiskSource(parcel, source.paths),
            lambda _: (time.sleep(0.01), seen.append(end.receiver.done_bytes))[0],
            1 << 18,
        )
        goes(parcel, slow, middle.addresses).run()
        middle.end.result(60)
        relaying.result(60)
        end.end.result(60)
    assert target.has(parcel) and last.has(parcel)
    assert max(seen) > parcel.nbytes // 2  # it had most of it before the first had sent all


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


def test_a_token_is_used_for_one_side_of_one_connection(source: ModelDisk) -> None:
    """What a sender proves is no proof of a receiver: nobody can be answered with his own words."""
    with connection() as (a, b), threads() as pool:
        token = secrets.token_bytes(32)
        other = pool.submit(ParcelChannel.prove, b, token, 1.0, sends=True)
        with pytest.raises((ChannelError, OSError)):
            ParcelChannel.prove(a, token, 1.0, sends=True)
        with pytest.raises((ChannelError, OSError)):
            other.result(60)
