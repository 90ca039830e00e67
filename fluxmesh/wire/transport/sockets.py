"""ZeroMQ's options and events, as both ends of the real transport use them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from fluxmesh.deadlines import DEADLINES
from fluxmesh.wire import limits

HIGH_WATER = 256  # messages in line to one peer

GOODBYE = b""  # one empty frame: the other side closes; no message of the codec looks like it

REFUSALS = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake broke off",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not speak CURVE with this agent's key",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its key is not in the allowlist",
}
EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True)
class SocketEvent:
    """What the monitor of a socket told; `value` is a file descriptor, an error or a status."""

    kind: int
    value: int


def guard(sock: zmq.asyncio.Socket, host: str) -> None:
    """The options of every socket: limits, heartbeats, an end to waiting."""
    milliseconds = {
        zmq.LINGER: DEADLINES.linger,
        zmq.HEARTBEAT_IVL: DEADLINES.heartbeat,  # a ping after so much silence
        zmq.HEARTBEAT_TIMEOUT: DEADLINES.silence - DEADLINES.heartbeat,
        zmq.HEARTBEAT_TTL: DEADLINES.silence,
        zmq.HANDSHAKE_IVL: DEADLINES.handshake,
    }
    for option, seconds in milliseconds.items():
        sock.setsockopt(option, int(1000 * seconds))
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER)
    sock.setsockopt(zmq.RCVHWM, HIGH_WATER)
    # CURVE wraps a frame in some more bytes.
    sock.setsockopt(zmq.MAXMSGSIZE, limits.MAX_FRAME + 1024)
    sock.setsockopt(zmq.IPV6, int(":" in host))


def watch(sock: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    """A socket that tells the events of another one."""
    return sock.get_monitor_socket(EVENTS)


def close_watched(sock: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
    """Closes both; what was sent last still leaves. Twice is harmless."""
    if not sock.closed:
        sock.disable_monitor()
        monitor.close(linger=0)
        sock.close()


async def next_event(monitor: zmq.asyncio.Socket) -> SocketEvent:
    return _event(await monitor.recv_multipart())


async def events_now(monitor: zmq.asyncio.Socket) -> list[SocketEvent]:
    """Those that are there, without waiting."""
    events: list[SocketEvent] = []
    while True:
        try:
            events.append(_event(await monitor.recv_multipart(flags=zmq.NOBLOCK)))
        except zmq.Again:
            return events


def _event(frames: list[bytes]) -> SocketEvent:
    parsed = parse_monitor_message(frames)
    return SocketEvent(int(parsed["event"]), int(parsed["value"]))


def peer_of(descriptor: int) -> str:
    """ "host:port" at the other end of a TCP connection, if it is not gone already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as twin:
            name = twin.getpeername()
    except OSError:
        return "a stranger who is gone already"
    return f"{name[0]}:{name[1]}"


def split(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join(host: str, port: int) -> str:
    """The reverse of `split`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
