"""Sends a checkpoint's files: from the disk, or as they come in from another host.

Runs in threads, one a connection; nothing here is of an event loop. Each connection sends the files
that the receiver asks for over it, from where the receiver has come to.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, LocalNetworkError, UsageError
from fluxmesh.wire.messages.parcel import ModelParcel, ParcelFile
from fluxmesh.wire.transport import local_network
from fluxmesh_agent.parcels.channel import BLOCK, ChannelError, Metronome, ParcelChannel

log = logging.getLogger(__name__)

STREAMS = 4  # files at once: hashing one keeps up with 10 Gb/s, a thunderbolt cable carries more

Put = Callable[[memoryview], None]  # takes a block of a file, or an empty one as a sign of life


class FileSource(Protocol):
    """Where the files of a parcel come from."""

    def read(self, file: ParcelFile, offset: int, put: Put) -> bytes:
        """Gives `put` a file from `offset` on, and returns the hash of all of it.

        Raises `OSError`, or `FluxmeshError` where it can't be had.
        """


class DiskSource:
    """Files that are whole."""

    def __init__(self, parcel: ModelParcel, paths: Mapping[str, Path]) -> None:
        """Raises `UsageError` where the parcel holds what is not among `paths`."""
        for file in parcel.files:
            if file.path not in paths or paths[file.path].stat().st_size != file.nbytes:
                raise UsageError(f"This host has no {file.path} of {file.nbytes} bytes.")
        self._paths = paths

    def read(self, file: ParcelFile, offset: int, put: Put) -> bytes:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
        metronome = Metronome(lambda: put(buffer[:0]))
        with open(self._paths[file.path], "rb", buffering=0) as source:
            if file.sha256:  # the Hub has told the hash: what was sent before need not be read
                source.seek(offset)
            place = offset if file.sha256 else 0
            while count := source.readinto(buffer):
                if not file.sha256:
                    digest.update(buffer[:count])
                fresh = max(offset - place, 0)  # where what was not sent yet begins
                if fresh < count:
                    put(buffer[fresh:count])
                else:
                    metronome.tick()
                place += count
        return bytes.fromhex(file.sha256) if file.sha256 else digest.digest()


class ParcelSender:
    """One checkpoint on its way to one host."""

    def __init__(
        self,
        parcel: ModelParcel,
        source: FileSource,
        token: bytes,
        addresses: Sequence[str],
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """To whoever listens at the first of `addresses` that can be reached, and knows `token`."""
        self.parcel, self.source, self.deadlines = parcel, source, deadlines
        self._token, self._addresses = token, addresses
        self._lock = threading.Lock()
        self._channels: list[ParcelChannel] = []
        self._is_stopped = False

    def run(self) -> None:
        """Until the receiver has all of it. Raises `FluxmeshError`: `LocalNetworkError` where it
        can't be reached, or is gone."""
        first, address = self._dial(self._addresses)
        channels = [first]
        try:
            for _ in range(min(STREAMS, len(self.parcel.files)) - 1):
                channels.append(self._dial([address])[0])
        except FluxmeshError as error:  # one does it too, more slowly
            log.warning("fewer connections than usual: %s", error)
        failures: list[FluxmeshError] = []
        threads = [
            threading.Thread(target=self._serve, args=(channel, failures), daemon=True)
            for channel in channels
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def stop(self) -> None:
        """From any thread, and at any time: `run` ends soon."""
        with self._lock:
            self._is_stopped = True
            for channel in self._channels:
                _shut(channel.sock)

    def _dial(self, addresses: Sequence[str]) -> tuple[ParcelChannel, str]:
        reason = "it has no address"
        is_kept_out = False
        for address in addresses:
            ip, _, port = address.rpartition(":")
            try:
                sock = socket.create_connection(
                    (ip.strip("[]"), int(port)), self.deadlines.link_connect
                )
            except OSError as error:
                reason = f"{address}: {local_network.reason(error)}"
                is_kept_out = is_kept_out or local_network.is_kept_out(error)
                continue
            try:
                channel = ParcelChannel.prove(
                    sock, self._token, self.deadlines.handshake, sends=True
                )
            except (OSError, ChannelError) as error:
                sock.close()
                reason = f"{address}: {error}"
                continue
            with self._lock:
                self._channels.append(channel)
                if self._is_stopped:
                    _shut(sock)
            return channel, address
        raise LocalNetworkError(f"The host that lacks the model can't be reached ({reason}).")

    def _serve(self, channel: ParcelChannel, failures: list[FluxmeshError]) -> None:
        try:
            while (wanted := channel.asked()) is not None:
                number, offset = wanted
                if number >= len(self.parcel.files):
                    raise ChannelError("It asks for what is no part of the checkpoint.")
                file = self.parcel.files[number]
                channel.end(number, self.source.read(file, offset, channel.send))
        except (OSError, ChannelError) as error:
            detail = error.strerror if isinstance(error, OSError) else str(error)
            failures.append(LocalNetworkError(f"The receiving host is gone: {detail}"))
        except FluxmeshError as error:
            failures.append(error)
        except Exception:
            log.exception("a connection of a push failed")
            failures.append(FluxmeshError("Sending failed; see `fluxmesh logs`."))
        finally:
            channel.sock.close()


def _shut(sock: socket.socket) -> None:
    """Ends whatever a thread waits for at a socket."""
    with contextlib.suppress(OSError):  # it is over already
        sock.shutdown(socket.SHUT_RDWR)
