"""Bytes that nobody should send to a server, as they go over the wire: kinds of attack by name.

Each kind is a function of a `random.Random`, so that a number tells an attack. All of them have
something wrong, and are to be refused with 4xx or cut off; those in `HARMLESS` may be answered.
`hostile_bodies.py` has what is well formed HTTP around a body that is hostile, `hostile.py` what
hypothesis draws; `tools/hostile_requests.py` sends thousands of all of them.
"""

from __future__ import annotations

import json
import re
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from tests.hostile import PATHS

OWN = "127.0.0.1"
POSTS = (
    "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
    "/api/jobs", "/api/plan",
)  # fmt: skip
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
LARGEST_ANSWER = 1 << 20  # bytes that are read of one


@dataclass(frozen=True)
class WireAttack:
    """What a client does on one connection."""

    kind: str
    pieces: tuple[bytes, ...]
    end: Literal["read", "half close", "reset"] = "read"  # what it does once all is sent

    @property
    def is_harmless(self) -> bool:
        """Whether it may be answered as any other."""
        return self.kind in HARMLESS


def head(path: str, *lines: str, method: str = "POST", host: str = OWN) -> bytes:
    """The head of a request, whatever its lines hold."""
    text = "\r\n".join((f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""))
    return text.encode("utf-8", "surrogatepass")


def request(
    path: str, body: bytes, *lines: str, kind: str = "application/json", **more: str
) -> bytes:
    """A whole request that says rightly how long it is."""
    about = (f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", *lines)
    return head(path, *about, **more) + body


def as_json(fields: Any) -> bytes:
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def lengths(dice: Random) -> WireAttack:
    """A length that is none, or another than the body's."""
    body = b'{"prompt": ""}'
    said = dice.choice(
        ("-1", "+14", "0x0e", "14, 15", "1e3", "", "٣", "9" * 30, str(10**12), "14 15", "14\tx",
         "9999", "3", "67108865")
    )  # fmt: skip
    lines = [f"Content-Length: {said}"] + dice.choice(([], ["Content-Length: 14"]))
    return WireAttack("lengths", (head(dice.choice(POSTS), *lines) + body,), "half close")


def chunks(dice: Random) -> WireAttack:
    """Chunks with sizes, extensions and ends that are wrong."""
    coding = dice.choice(
        ("chunked", "chunked, chunked", "xchunked", "chunked, identity", " chunked ", "gzip")
    )
    both = dice.choice(([], ["Content-Length: 5"]))
    text = dice.choice(
        (
            b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}X\r\n0\r\n\r\n",
            b"ffffffffffffffff\r\n{}", b"2;" + b"a=b;" * 40_000 + b"\r\n{}\r\n0\r\n\r\n",
            b"2\r\n{}\r\n", b"2\n{}\n0\n\n", b"2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
            b"0" * 100_000 + b"2\r\n{}\r\n0\r\n\r\n", b" 2\r\n{}\r\n0\r\n\r\n",
            b"2\r\n{}\r\n0\r\nbad\r\n\r\n",
        )
    )  # fmt: skip
    lines = [f"Transfer-Encoding: {coding}", "Content-Type: application/json", *both]
    return WireAttack("chunks", (head(dice.choice(POSTS), *lines), text), "half close")


def smuggled(dice: Random) -> WireAttack:
    """A request in the body of another, behind a length that two readers read in two ways."""
    inner = head("/api/pictures/a.png", method="DELETE")
    how = dice.choice(
        (["Content-Length: 4", "Transfer-Encoding: chunked"], ["Transfer-Encoding : chunked"],
         ["Content-Length: 4", "Content-Length: 90"], ["Transfer-Encoding:\x0bchunked"],
         ["X: y\nTransfer-Encoding: chunked"])
    )  # fmt: skip
    lines = ["Content-Type: application/json", *how]
    data = head("/api/jobs", *lines) + b"0\r\n\r\n" + inner
    return WireAttack("smuggled", (data,), "half close")


def heads(dice: Random) -> WireAttack:
    """Heads that are too long, too many, or no HTTP."""
    data = dice.choice(
        (
            head("/healthz", "X: " + "a" * 400_000, method="GET"),
            head("/healthz", *(f"X-{k}: b" for k in range(20_000)), method="GET"),
            head("/" + "a" * 400_000, method="GET"),
            b"GET /healthz HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nno colon\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n folded: a\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX\x00Y: a\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\x00b\r\n\r\n",
            b"GET /healthz\r\n\r\n",
            b"GET  /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(500),
            b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
            b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            b"TRACE / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            head("/api/jobs", method="A" * 5000),
            head("/api/jobs", method="PATCH"),
            head("/api/jobs", method="post"),
            b"\r\n" * 50_000,
            dice.randbytes(dice.randrange(1, 3000)),
        )
    )  # fmt: skip
    return WireAttack("heads", (data,), "half close")


def upgrades(dice: Random) -> WireAttack:
    """A WebSocket, HTTP/2 in clear text, and what is to be expected."""
    lines = dice.choice(
        (
            ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Origin: https://evil.example"),
            ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
            ("Expect: 100-continue", "Content-Length: 99999999999"),
            ("Expect: 999-nothing", "Content-Type: application/json", "Content-Length: 2"),
        )
    )  # fmt: skip
    path = dice.choice(("/api/jobs", "/v1/images/generations", "/no/such/socket"))
    return WireAttack("upgrades", (head(path, *lines), b"{}"), "half close")


def strangers(dice: Random) -> WireAttack:
    """A page from elsewhere, and names that are bound to this machine by another's name server."""
    host = dice.choice(
        ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "evil@127.0.0.1",
        "127.0.0.1:x",
         "[::1", "", "127.0.0.1 evil", "0x7f000001", "127.1", "²７.0.0.1", "a" * 3000)
    )  # fmt: skip
    origin = dice.choice(
        ("Origin: https://evil.example", "Origin: null", "Origin: http://127.0.0.1:1",
        "Sec-Fetch-Site: cross-site",
         "Origin: http://127.0.0.1.evil.example", "Sec-Fetch-Site: same-site")
    )  # fmt: skip
    body = as_json({"prompt": "a dog", "steps": 1, "width": 64, "height": 64})
    if dice.random() < 0.5:
        return WireAttack("strangers", (request(dice.choice(POSTS), body, host=host),))
    kind = dice.choice(("text/plain", "application/json", "multipart/form-data; boundary=b"))
    return WireAttack("strangers", (request(dice.choice(POSTS), body, origin, kind=kind),))


def pipelined(dice: Random) -> WireAttack:
    """Many requests at once, whose answers nobody waits for."""
    asked = [head(dice.choice(PATHS), method="GET") for _ in range(dice.randrange(2, 40))]
    return WireAttack("pipelined", (b"".join(asked),), dice.choice(("half close", "reset")))


def cut(dice: Random) -> WireAttack:
    """A good request whose client goes away, or stops speaking, in the middle."""
    whole = request(dice.choice(POSTS), as_json({"prompt": "a dog", "steps": 0}))
    at = dice.randrange(1, len(whole))
    return WireAttack("cut", (whole[:at],), dice.choice(("half close", "reset")))


def trickled(dice: Random) -> WireAttack:
    """A wrong request in very many pieces."""
    whole = request(dice.choice(POSTS), as_json({"prompt": "", "steps": 0}))
    size = dice.choice((1, 2, 7))
    pieces = tuple(whole[k : k + size] for k in range(0, len(whole), size))
    return WireAttack("trickled", pieces)


WIRE_KINDS: tuple[Callable[[Random], WireAttack], ...] = (
    lengths, chunks, smuggled, heads, upgrades, strangers, pipelined, cut, trickled,
)  # fmt: skip
HARMLESS = {"pipelined"}
PAUSE = 0.3  # seconds for an answer, before a client says that it has no more to say


def send(address: tuple[str, int], attack: WireAttack, seconds: float = 30.0) -> list[int]:
    """The statuses of the answers, in their order; none: the connection was cut off.

    Raises `TimeoutError` where the server does neither for so long.
    """
    answer = b""
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            for piece in attack.pieces:
                connection.sendall(piece)
            if attack.end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return []
            if attack.end == "half close":
                if select.select([connection], [], [], PAUSE)[0]:
                    answer = connection.recv(65_536)
                connection.shutdown(socket.SHUT_WR)
            while len(answer) < LARGEST_ANSWER and (data := connection.recv(65_536)):
                answer += data
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise  # else it was cut off; what was answered before may be here
    return [int(status) for status in STATUS.findall(answer)]
