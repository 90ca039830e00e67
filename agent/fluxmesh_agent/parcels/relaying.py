"""Sends on what comes in, while it does: a chain of hosts has a checkpoint hardly later than one.

A `FileSource` as that of the disk (`sending.py`), for files that `receiving.py` is about. The hash
that ends a file is passed on only once it was right here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from io import FileIO

from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.messages.parcel import ParcelFile
from fluxmesh_agent.parcels.channel import BLOCK, SIGN_OF_LIFE, Metronome
from fluxmesh_agent.parcels.receiving import Arrival, ParcelReceiver
from fluxmesh_agent.parcels.sending import Put


class RelaySource:
    """Files as they come in here, for the next host."""

    def __init__(self, receiver: ParcelReceiver) -> None:
        self._receiver = receiver

    def read(self, file: ParcelFile, offset: int, put: Put) -> bytes:
        """As `FileSource` says; waits for what has not come yet."""
        arrival = self._receiver.arrivals[file.path]
        tries = arrival.tries
        buffer = memoryview(bytearray(BLOCK))
        with contextlib.ExitStack() as stack:
            source: FileIO | None = None
            while True:
                size, digest = self._wait(arrival, tries, offset)
                if source is None and (size > offset or digest is not None):
                    source = stack.enter_context(self._open(file))
                    source.seek(offset)
                if source is not None and size > offset:
                    count = source.readinto(buffer[: min(BLOCK, size - offset)])
                    put(buffer[:count])
                    offset += count
                elif source is not None and digest is not None:
                    return digest or _hash(source, lambda: put(buffer[:0]))
                else:
                    put(buffer[:0])

    def _wait(self, arrival: Arrival, tries: int, offset: int) -> tuple[int, bytes | None]:
        """(bytes that are here, hash if that is all), after a second if nothing has come."""
        receiver = self._receiver
        with receiver.news:
            if arrival.size <= offset and arrival.digest is None and receiver.failure is None:
                receiver.news.wait(SIGN_OF_LIFE)
            if arrival.digest is None and receiver.failure is not None:
                raise FluxmeshError(f"It does not come in here any more: {receiver.failure}")
            if arrival.tries != tries:
                raise FluxmeshError(f"{arrival.file.path} came in damaged, and begins anew.")
            return arrival.size, arrival.digest

    def _open(self, file: ParcelFile) -> FileIO:
        """Wherever it lies now: it moves on when it is whole, and when all of them are."""
        for path in self._receiver.landing.places(file):
            with contextlib.suppress(FileNotFoundError):
                return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))
        raise FluxmeshError(f"{file.path} is not here any more.")


def _hash(source: FileIO, beat: Callable[[], None]) -> bytes:
    """Of a whole file that an earlier push has brought; `beat` is called while it takes."""
    digest, metronome = hashlib.sha256(), Metronome(beat)
    buffer = memoryview(bytearray(BLOCK))
    source.seek(0)
    while count := source.readinto(buffer):
        digest.update(buffer[:count])
        metronome.tick()
    return digest.digest()
