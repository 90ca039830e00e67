"""Measures a link: how fast this host sends to another at the addresses that a ring would use.

One agent opens a port for a token that only the two know of, the other sends. Plain sockets in a
thread, since that is what a ring uses too, and no event loop is as fast as a thunderbolt cable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import struct
import time
from collections.abc import Iterator

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, LocalNetworkError, UsageError
from fluxmesh.wire.messages import LinkRate
from fluxmesh.wire.transport import local_network, ports
from fluxmesh_agent.threads import in_thread

log = logging.getLogger(__name__)

PINGS = 8
BLOCK = 1 << 20
LIMIT = 1 << 30  # bytes of one probe
_HEAD = struct.Struct(">QB")  # bytes that follow, length of the token


def listen(ip: str, token: bytes, deadlines: Deadlines = DEADLINES) -> int:
    """Opens a port at `ip` for one probe that knows `token`, and returns it.

    Raises `UsageError` where `ip` is not an address of this machine.
    """
    try:
        server = ports.bound(ip)
        with _closed_on_error(server):
            server.listen(4)
    except (OSError, ValueError) as error:
        raise _no_address(ip, error) from None
    server.settimeout(deadlines.link_open)
    port: int = server.getsockname()[1]
    task = asyncio.create_task(in_thread(lambda: _serve(server, token, deadlines.link_open)))
    _running.add(task)
    task.add_done_callback(_running.discard)
    return port


_running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


async def probe(
    ip: str, port: int, token: bytes, nbytes: int, deadlines: Deadlines = DEADLINES
) -> LinkRate:
    """What a link carries. Raises `FluxmeshError` where nobody listens, or stops listening.

    That is a `LocalNetworkError` where macOS may have forbidden the connection.
    """
    if not 0 < nbytes <= LIMIT:
        raise UsageError(f"A probe sends 1 to {LIMIT} bytes, not {nbytes}.")
    try:
        return await in_thread(lambda: _probe(ip, port, token, nbytes, deadlines))
    except OSError as error:
        kind = LocalNetworkError if local_network.is_kept_out(error) else FluxmeshError
        reason = local_network.reason(error)
        raise kind(f"The link to {ip} can't be measured: {reason}.") from None


def free_ports(ip: str, count: int) -> tuple[int, ...]:
    """Ports of `ip` that nobody uses now. Raises `UsageError` where `ip` is not of this machine."""
    taken: list[socket.socket] = []
    try:
        for _ in range(count):
            taken.append(ports.bound(ip))
        return tuple(server.getsockname()[1] for server in taken)
    except (OSError, ValueError) as error:
        raise _no_address(ip, error) from None
    finally:
        for server in taken:
            server.close()


def _no_address(ip: str, error: OSError | ValueError) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) else "an IP address is needed"
    return UsageError(f"{ip!r} is not an address of this host: {reason}.")


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except OSError:
        sock.close()
        raise


def _serve(server: socket.socket, token: bytes, seconds: float) -> None:
    """Takes probes until one knows the token, or time is up."""
    end = time.monotonic() + seconds
    with server:
        while time.monotonic() < end:
            try:
                peer, address = server.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(seconds)
                try:
                    if _take(peer, token):
                        return
                    log.warning("refused a probe of a link from %s", address[0])
                except OSError as error:
                    log.warning("a probe of a link from %s broke off: %s", address[0], error)


def _take(peer: socket.socket, token: bytes) -> bool:
    nbytes, length = _HEAD.unpack(_read(peer, _HEAD.size))
    if not hmac.compare_digest(_read(peer, length), token) or nbytes > LIMIT:
        return False
    for _ in range(PINGS):
        peer.sendall(_read(peer, 1))
    block = bytearray(BLOCK)
    while nbytes:
        got = peer.recv_into(block, min(nbytes, BLOCK))
        if not got:
            raise ConnectionResetError("the other side has gone")
        nbytes -= got
    peer.sendall(b"\0")
    return True


def _probe(ip: str, port: int, token: bytes, nbytes: int, deadlines: Deadlines) -> LinkRate:
    with socket.create_connection((ip, port), timeout=deadlines.link_connect) as peer:
        peer.settimeout(deadlines.link_open)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(_HEAD.pack(nbytes, len(token)) + token)
        trips = []
        for _ in range(PINGS):
            start = time.perf_counter()
            peer.sendall(b"\0")
            _read(peer, 1)
            trips.append(time.perf_counter() - start)
        latency = min(trips) / 2
        block = memoryview(bytes(BLOCK))
        start = time.perf_counter()
        left = nbytes
        while left:
            peer.sendall(block[: min(left, BLOCK)])
            left -= min(left, BLOCK)
        _read(peer, 1)
        seconds = time.perf_counter() - start - latency
    return LinkRate(nbytes / max(seconds, 1e-9), latency)


def _read(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the other side has gone")
        data += more
    return data
