"""Who is let in: the answers to ZeroMQ's authentication requests (ZAP, its RFC 27).

ZeroMQ asks for each handshake and waits for the answer. It fails closed: a socket with a ZAP domain
that is enforced lets nobody in while no gate answers, and the gate says yes to one thing alone, a
CURVE key that is in the allowlist at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import zmq
import zmq.asyncio
from zmq.utils import z85

from fluxmesh.storage.keys import Allowlist

log = logging.getLogger(__name__)

DOMAIN = b"fluxmesh"
_STALE = 1.0  # seconds after which the allowlist is read again for those who are in already
_LINES = 30  # about strangers, a minute: nobody fills the disk from outside


class Gate:
    """Answers for all sockets of one context. Open it before any of them binds."""

    def __init__(self, context: zmq.asyncio.Context, allowlist: Allowlist) -> None:
        self._allowlist = allowlist
        self._users: dict[str, str] = {}
        self._read_at = -_STALE
        self._minute = 0
        self._lines = 0
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._task = asyncio.create_task(self._answer())

    def name(self, key: str) -> str | None:
        """The user's name, None if the key is not, or no longer, in the allowlist."""
        now = time.monotonic()
        if now - self._read_at >= _STALE:
            self._users, self._read_at = self._allowlist.users(), now
        return self._users.get(key)

    def tell(self, text: str) -> None:
        """A log line about a stranger, unless there were too many this minute."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            if self._lines > _LINES:
                log.warning("%d more refused in that minute", self._lines - _LINES)
            self._minute, self._lines = minute, 0
        self._lines += 1
        if self._lines <= _LINES:
            log.warning("%s", text)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._socket.close()

    async def _answer(self) -> None:
        while True:
            request = await self._socket.recv_multipart()
            try:
                verdict = self._verdict(request)
            except Exception:  # the gate must go on answering, and what it can't check is a no
                log.exception("a handshake could not be checked, and is refused")
                verdict = _refused(request)
            await self._socket.send_multipart(verdict)

    def _verdict(self, request: list[bytes]) -> list[bytes]:
        """[version, request id, status, text, user id, metadata] for a request of the same RFC."""
        refused = _refused(request)
        if len(request) != 7 or request[0] != b"1.0" or request[2] != DOMAIN:
            self.tell("refused a handshake that is none of this agent's")
            return refused
        address, mechanism, credential = request[3], request[5], request[6]
        origin = address.decode(errors="replace")
        if mechanism != b"CURVE" or len(credential) != 32:
            self.tell(f"refused {origin}: it proves no CURVE key")
            return refused
        key = z85.encode(credential).decode()
        self._read_at = -_STALE  # a handshake is rare and reads the files as they are now
        if self.name(key) is None:
            self.tell(f"refused {origin}: the key {key} is not in the allowlist")
            return refused
        return [b"1.0", request[1], b"200", b"OK", key.encode(), b""]


def _refused(request: list[bytes]) -> list[bytes]:
    ticket = request[1] if len(request) > 1 else b""
    return [b"1.0", ticket, b"400", b"not in the allowlist", b"", b""]
