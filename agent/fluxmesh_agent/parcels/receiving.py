"""Takes a checkpoint's files from another host and keeps what has the right hash.

Runs in threads, one a connection: an event loop must not wait for a disk. What comes in can be sent
on to a third host meanwhile (`relaying.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, LocalNetworkError, OutputError, UsageError, WeightsError
from fluxmesh.storage import durable
from fluxmesh.wire.messages.parcel import ParcelFile
from fluxmesh.wire.transport import ports, sockets
from fluxmesh_agent.parcels.channel import (
    BLOCK,
    BYE,
    END,
    WAIT,
    ChannelError,
    Metronome,
    ParcelChannel,
)
from fluxmesh_agent.parcels.landing import Landing

log = logging.getLogger(__name__)

STRANGERS = 8  # connections at once that have not proved the token yet
TRIES = 2  # of a file whose hash is wrong
SYNCED = 1 << 30  # bytes of a file that the system may hold back from the disk


@dataclass
class Arrival:
    """How much of one file is here."""

    number: int
    file: ParcelFile
    size: int = 0  # bytes on the disk, which others may read
    tries: int = 0  # that ended with a wrong hash; what was read of an earlier one is void
    digest: bytes | None = None  # when it is whole; empty where an earlier push has brought it


class ParcelReceiver:
    """One checkpoint that comes to this host."""

    def __init__(
        self, landing: Landing, token: bytes, ips: Sequence[str], deadlines: Deadlines = DEADLINES
    ) -> None:
        """Listens at each of `ips` that is this host's, for whoever knows `token`."""
        self.landing, self.deadlines = landing, deadlines
        self.address = ""  # the one that it comes in at
        self.failure: FluxmeshError | None = None
        self.news = threading.Condition()
        self._token, self._ips = token, ips
        self.arrivals = {
            file.path: Arrival(number, file) for number, file in enumerate(landing.parcel.files)
        }
        self._line: deque[Arrival] = deque()
        self._servers: list[socket.socket] = []
        self._channels: set[ParcelChannel] = set()
        self._strangers = threading.Semaphore(STRANGERS)

    @property
    def done_bytes(self) -> int:
        return sum(arrival.size for arrival in self.arrivals.values())

    def run(self, listening: Callable[[Sequence[str]], None]) -> None:
        """Until all of it is here and in its place; then, or where that fails, nobody listens.

        `listening` hears the addresses once there is room on the disk. Raises `FluxmeshError`:
        `LocalNetworkError` where the sending host is gone, `OutputError` where the disk does not
        take it, `WeightsError` where a file arrives with another hash.
        """
        with contextlib.ExitStack() as stack:
            with _disk(self.landing.root):
                stack.enter_context(self.landing.opened())
                self._look()
            listening(self._listen(stack))
            try:
                self._accept()
                self._say_goodbye()
            finally:
                self._fail(FluxmeshError("It is over."))  # whoever still comes is sent away
            if not self._is_whole():
                assert self.failure is not None
                raise self.failure
            with _disk(self.landing.root):
                self.landing.place()

    def stop(self) -> None:
        """From any thread: `run` ends soon, and what has arrived stays."""
        self._fail(FluxmeshError("The push was stopped."))

    # Within

    def _look(self) -> None:
        """What is here already, and what is to be fetched."""
        contents = set[Path]()
        for arrival in self.arrivals.values():
            whole = self.landing.whole(arrival.file)
            if self.landing.has(arrival.file):
                arrival.size, arrival.digest = arrival.file.nbytes, b""
            elif whole not in contents:  # two files may have one content
                arrival.size = self.landing.arrived(arrival.file)
                self._line.append(arrival)
            contents.add(whole)

    def _listen(self, stack: contextlib.ExitStack) -> list[str]:
        addresses: list[str] = []
        reason = "none was named"
        for ip in dict.fromkeys(self._ips):
            try:
                server = ports.bound(ip)
                stack.callback(server.close)
                server.listen(STRANGERS)
                server.setblocking(False)
            except (OSError, ValueError) as error:
                reason = f"{ip}: {error}"
                continue
            self._servers.append(server)
            addresses.append(sockets.join(ip, server.getsockname()[1]))
        if not self._servers:
            raise UsageError(f"This host has no address at which it could listen ({reason}).")
        return addresses

    def _accept(self) -> None:
        """Lets senders in until it is over."""
        end = time.monotonic() + self.deadlines.link_open
        with selectors.DefaultSelector() as selector:
            for server in self._servers:
                selector.register(server, selectors.EVENT_READ)
            while self.failure is None and not self._is_whole():
                for key, _ in selector.select(self.deadlines.tick):
                    self._let_in(key.fileobj)
                if not self.address and time.monotonic() > end:
                    self._fail(LocalNetworkError("No host came to send it."))

    def _say_goodbye(self) -> None:
        """Waits until the sender has heard that all is here."""
        with self.news:
            self.news.wait_for(
                lambda: self.failure is not None or not self._channels, self.deadlines.linger
            )

    def _let_in(self, server: object) -> None:
        assert isinstance(server, socket.socket)
        try:
            sock, origin = server.accept()
        except OSError:
            return  # it has left again
        if not self._strangers.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._meet, args=(sock, origin[0]), daemon=True).start()

    def _meet(self, sock: socket.socket, origin: str) -> None:
        with sock:
            try:
                channel = ParcelChannel.prove(
                    sock, self._token, self.deadlines.handshake, sends=False
                )
            except (OSError, ChannelError) as error:
                log.warning("refused a push from %s: %s", origin, error)
                return
            finally:
                self._strangers.release()
            with self.news:
                if self.failure is not None:
                    return
                self._channels.add(channel)
                self.address = sock.getsockname()[0]
            try:
                self._take(channel)
            except (OSError, ChannelError) as error:
                log.warning("a push from %s broke off: %s", origin, error)
            except FluxmeshError as error:
                self._fail(error)
            except Exception:
                log.exception("a push failed")
                self._fail(FluxmeshError("The push failed; see `fluxmesh logs`."))
            with self.news:
                self._channels.discard(channel)
                self.news.notify_all()
                is_last = not self._channels
            if is_last and not self._is_whole():
                self._fail(LocalNetworkError("The sending host is gone."))

    def _take(self, channel: ParcelChannel) -> None:
        """Asks for one file after another, until none is left."""
        while True:
            with self.news:
                if not self._line:
                    break
                arrival = self._line.popleft()
            try:
                is_whole = self._fetch(channel, arrival)
            except (OSError, ChannelError):
                with self.news:
                    self._line.appendleft(arrival)  # for another connection
                raise
            if not is_whole:
                with self.news:
                    self._line.appendleft(arrival)
        channel.ask(BYE, 0)

    def _fetch(self, channel: ParcelChannel, arrival: Arrival) -> bool:
        """Takes what is missing of a file; whether its hash was right in the end."""
        file, path = arrival.file, self.landing.partial(arrival.file)
        buffer = memoryview(bytearray(BLOCK))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with _disk(path):
            part = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        with part:
            digest = hashlib.sha256()
            metronome = Metronome(lambda: channel.ask(WAIT, 0))
            with _disk(path):
                if os.fstat(part.fileno()).st_size > file.nbytes:
                    part.truncate(0)
            size = 0
            while count := part.readinto(buffer):  # what an interrupted push has left
                digest.update(buffer[:count])
                size += count
                metronome.tick()
            self._note(arrival, size)
            channel.ask(arrival.number, size)
            synced = size
            while (length := channel.length()) != END:
                if size + length > file.nbytes:
                    raise ChannelError(f"It sends more of {file.path} than there is.")
                channel.fill(buffer[:length])
                digest.update(buffer[:length])
                with _disk(path):
                    _write(part.fileno(), buffer[:length])
                    if size - synced >= SYNCED:
                        durable.sync(part.fileno())
                        synced = size
                size += length
                self._note(arrival, size)
            stated = channel.hash(arrival.number)
            right = bytes.fromhex(file.sha256) if file.sha256 else stated
            with _disk(path):
                if size == file.nbytes and digest.digest() == stated == right:
                    durable.sync(part.fileno())
                    os.replace(path, self.landing.whole(file))
                    self._settle(arrival, stated)
                    return True
                part.truncate(0)
        return self._again(arrival)

    def _note(self, arrival: Arrival, size: int) -> None:
        with self.news:
            arrival.size = size
            self.news.notify_all()

    def _settle(self, arrival: Arrival, digest: bytes) -> None:
        """A file is whole, and with it all that have the same content."""
        whole = self.landing.whole(arrival.file)
        with self.news:
            for other in self.arrivals.values():
                if self.landing.whole(other.file) == whole:
                    other.size, other.digest = other.file.nbytes, digest
            self.news.notify_all()

    def _again(self, arrival: Arrival) -> bool:
        """A file's hash was wrong. Raises `WeightsError` where it was before, too."""
        with self.news:
            arrival.size = 0
            arrival.tries += 1
            self.news.notify_all()
        log.warning("%s arrived with another hash than it was sent with", arrival.file.path)
        if arrival.tries >= TRIES:
            raise WeightsError(
                f"{arrival.file.path} arrives damaged (its SHA-256 is wrong) and was not kept; it "
                "may be damaged where it comes from: fetch it there again with `fluxmesh models "
                "pull`, or push from another host."
            )
        return False

    def _is_whole(self) -> bool:
        return all(arrival.digest is not None for arrival in self.arrivals.values())

    def _fail(self, error: FluxmeshError) -> None:
        """The first failure stays; all connections end."""
        with self.news:
            self.failure = self.failure or error
            for channel in self._channels:
                with contextlib.suppress(OSError):
                    channel.sock.shutdown(socket.SHUT_RDWR)
            self.news.notify_all()


def _write(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the disk says, as the sentence that a user reads. Raises `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {path} can't grow; make room and push again, it goes on where "
                "it stopped."
            ) from None
        raise OutputError(f"{path} can't be written: {error.strerror or error}.") from None
