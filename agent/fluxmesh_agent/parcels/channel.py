"""One TCP connection over which the files of a checkpoint go: who is there, and how bytes are cut.

Not over ZeroMQ: CURVE encrypts about 0.5 GB/s on one core, a thunderbolt cable carries 2 to 4, and
weights are no secret. What must hold is who may send, and that what arrives is what was sent. Both
ends have a token that the coordinator gave each of them over CURVE, fresh for each checkpoint and
receiver. Each proves to the other that it has it, and the token never travels. The hash that ends a
file is signed with it; bytes that anyone changed on the way don't have that hash.

    receiver  ◄── nonce ──►  sender      then proofs, HMAC-SHA256 of both nonces under the token
    receiver  ── file, offset ──►        WAIT: it is busy; BYE: that is all
              ◄── length, bytes …        length 0: busy; END, then hash and signature
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from hashlib import sha256

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError

BLOCK = 4 << 20  # bytes
PROOF = 32  # bytes, also of a nonce and a hash
SIGN_OF_LIFE = 1.0  # seconds between two of a side that is busy otherwise
WAIT, BYE = 0xFFFFFFFF, 0xFFFFFFFE  # instead of a file
END = 0xFFFFFFFF  # instead of a length

_ASK = struct.Struct(">IQ")
_LENGTH = struct.Struct(">I")


class ChannelError(FluxmeshError):
    """The other side is gone, or is not who it should be."""


class ParcelChannel:
    """A connection whose two ends have proved that they know the token."""

    def __init__(self, sock: socket.socket, key: bytes) -> None:
        self.sock, self._key = sock, key
        sock.settimeout(DEADLINES.parcel)

    @classmethod
    def prove(
        cls, sock: socket.socket, token: bytes, seconds: float, *, sends: bool
    ) -> ParcelChannel:
        """Raises `ChannelError` where the other side does not know the token, `OSError`."""
        sock.settimeout(seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own = secrets.token_bytes(PROOF)
        sock.sendall(own)
        other = _read(sock, PROOF)
        nonces = own + other if sends else other + own

        def proof(of: bytes) -> bytes:
            return hmac.digest(token, of + nonces, sha256)

        mine, theirs = (b"sender", b"receiver") if sends else (b"receiver", b"sender")
        if sends:  # it dialled, so it is the first to show that it knows
            sock.sendall(proof(mine))
        if not hmac.compare_digest(_read(sock, PROOF), proof(theirs)):
            raise ChannelError("It does not know the token.")
        if not sends:
            sock.sendall(proof(mine))
        return cls(sock, proof(b"key"))

    # The receiver's side

    def ask(self, file: int, offset: int) -> None:
        self.sock.sendall(_ASK.pack(file, offset))

    def length(self) -> int:
        """How many bytes come next; 0 is a sign of life. Raises `ChannelError`."""
        (length,) = _LENGTH.unpack(_read(self.sock, _LENGTH.size))
        if length != END and length > BLOCK:
            raise ChannelError("It sends more at once than was agreed.")
        return int(length)

    def fill(self, view: memoryview) -> None:
        """Raises `ChannelError` where the other side goes before all of it has come."""
        while view:
            count = self.sock.recv_into(view)
            if not count:
                raise ChannelError("The connection was closed.")
            view = view[count:]

    def hash(self, file: int) -> bytes:
        """The hash that ends a file. Raises `ChannelError` where its signature is wrong."""
        digest, signature = _read(self.sock, PROOF), _read(self.sock, PROOF)
        if not hmac.compare_digest(signature, self._sign(file, digest)):
            raise ChannelError("Its hash is not signed.")
        return digest

    # The sender's side

    def asked(self) -> tuple[int, int] | None:
        """(file, offset) that are wanted next; None when all has been sent."""
        while True:
            file, offset = _ASK.unpack(_read(self.sock, _ASK.size))
            if file == BYE:
                return None
            if file != WAIT:
                return file, offset

    def send(self, block: memoryview) -> None:
        """A block, or an empty one as a sign of life."""
        self.sock.sendall(_LENGTH.pack(block.nbytes))
        if block:
            self.sock.sendall(block)

    def end(self, file: int, digest: bytes) -> None:
        self.sock.sendall(_LENGTH.pack(END) + digest + self._sign(file, digest))

    def _sign(self, file: int, digest: bytes) -> bytes:
        return hmac.digest(self._key, _LENGTH.pack(file) + digest, sha256)


class Metronome:
    """Calls `beat` at most once a second, however often it is asked to."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat, self._last = beat, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._last >= SIGN_OF_LIFE:
            self._last = now
            self._beat()


def _read(sock: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise ChannelError("The connection was closed.")
        view = view[got:]
    return bytes(data)
