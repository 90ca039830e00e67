"""Who may ask: every request's `Host`, `Origin` and key are checked before anything reads it.

A server on this machine can be reached from every web page that its user opens. A page elsewhere
may rebind its own name to 127.0.0.1 (`Host` then names that page), and may post forms and text to
any address without asking first (`Origin` and `Sec-Fetch-Site` then tell). Neither is stopped by
listening on loopback alone. Fetch metadata: https://www.w3.org/TR/fetch-metadata/.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxmesh.deadlines import DEADLINES
from fluxmesh_coordinator.server.guard import signatures
from fluxmesh_coordinator.server.problems import ProblemError, answer

COOKIE = "fluxmesh_session"
SAFE = {"GET", "HEAD", "OPTIONS"}  # methods that change nothing
OWN = {"same-origin", "none"}  # what `Sec-Fetch-Site` says of our page, and of a typed address
MAX_SESSION = 4096  # bytes of the body that opens a session

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; "
     b"object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)  # fmt: skip

# The page of a chat may show a picture whose address it was given.
SHOWN_ANYWHERE = (b"cross-origin-resource-policy", b"cross-origin")


@dataclass(frozen=True)
class Access:
    """The rules of one server."""

    key: str | None = None  # None: whoever reaches the address may ask
    names: frozenset[str] = frozenset()  # by which it may be called, beside addresses

    @classmethod
    def of(cls, key: str | None, names: Iterable[str] = ()) -> Access:
        """With this machine's own names, and `localhost`."""
        own = socket.gethostname().lower()
        short = own.partition(".")[0]
        known = {"localhost", own, short, f"{short}.local", *(name.lower() for name in names)}
        return cls(key, frozenset(known))

    @property
    def session(self) -> str:
        """What the page's cookie holds in place of the key."""
        assert self.key is not None
        return hmac.new(self.key.encode(), b"fluxmesh session", hashlib.sha256).hexdigest()

    def check_host(self, headers: Headers) -> None:
        """Raises `ProblemError` unless the request was meant for this server.

        An address is always right: only a name can be rebound to another one.
        """
        hosts = headers.getlist("host")
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (is_address(name) or name in self.names):
            raise ProblemError(
                421,
                "This server does not go by that name; ask for its address, or start it with the "
                "name.",
                "wrong_host",
            )

    def check_origin(self, method: str, scheme: str, headers: Headers) -> None:
        """Raises `ProblemError` for a change that a page from elsewhere asks for."""
        if method in SAFE:
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        host = headers.get("host", "").lower()
        # Behind a proxy that speaks TLS the scheme is another one; the name is the same.
        own = {f"{scheme}://{host}", f"https://{host}"}
        is_foreign = origin is not None and origin.lower() not in own
        if is_foreign or (site is not None and site not in OWN):
            raise ProblemError(403, "A page from elsewhere may change nothing here.", "cross_site")

    def check_key(self, headers: Headers) -> None:
        """Raises `ProblemError` unless the key, or the cookie that was got for it, is there."""
        if self.key is None:
            return
        given = credentials(headers)
        cookie = _cookie(headers)
        if not (_same(given, self.key) | _same(cookie, self.session)):
            raise ProblemError(
                401, "This server wants its key: send Authorization: Bearer KEY.", "wrong_key"
            )

    def address_of(self, picture: str) -> str:
        """The path of a picture, as a client can fetch it that sends no key."""
        path = f"/api/pictures/{picture}"
        return path if self.key is None else signatures.signed(path, self.key, time.time())

    def is_signed(self, scope: Scope) -> bool:
        """Whether a request is for a picture whose address was given to somebody."""
        if self.key is None:
            return False
        query = scope.get("query_string", b"").decode("ascii", "replace")
        return signatures.is_signed(scope["method"], scope["path"], query, self.key, time.time())


def host_name(host: str) -> str | None:
    """The name or address in a `Host`, without the port; None: it is malformed."""
    name, port = host, ""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None
        port = rest[1:]
    elif ":" in host:
        name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdecimal()):
        return None
    return name.lower().removesuffix(".") or None


def is_address(name: str) -> bool:
    """Whether it is an IP address, and no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether nobody outside of this machine can reach it."""
    if address == "localhost":
        return True
    return is_address(address) and ipaddress.ip_address(address).is_loopback


def credentials(headers: Headers) -> str:
    """The key that a request brings: Bearer, or the password of Basic; "" where there is none."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _cookie(headers: Headers) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


class AccessMiddleware:
    """Checks, answers `POST /api/session`, and adds the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        headers, path = Headers(scope=scope), scope["path"]
        is_signed = self.access.is_signed(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [*message["headers"], *([SHOWN_ANYWHERE] if is_signed else [])]
                names = {name.lower() for name, _ in given}
                more = [pair for pair in HEADERS if pair[0] not in names]
                message = {**message, "headers": [*given, *more]}
            await send(message)

        try:
            self.access.check_host(headers)
            self.access.check_origin(scope["method"], scope["scheme"], headers)
            if path == "/api/session" and scope["method"] == "POST":
                async with asyncio.timeout(DEADLINES.session_body):
                    await self._open_session(scope, receive, guarded)
                return
            if not (is_open(path) or is_signed):
                self.access.check_key(headers)
        except TimeoutError:
            problem = ProblemError(408, "The body came too slowly.", "too_slow")
            await answer(problem, path)(scope, receive, guarded)
            return
        except ProblemError as error:
            await answer(error, path)(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    async def _open_session(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import JSONResponse

        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
            if len(body) > MAX_SESSION:
                raise ProblemError(413, "That is no key.", "body")
        try:
            fields = json.loads(body)
            key = fields.get("key") if isinstance(fields, dict) else None
        except (ValueError, RecursionError):
            key = None
        if self.access.key is None:
            await JSONResponse({"needs_key": False})(scope, receive, send)
            return
        if not isinstance(key, str) or not _same(key, self.access.key):
            raise ProblemError(401, "That is not the key of this server.", "wrong_key")
        response = JSONResponse({"needs_key": True})
        forwarded = Headers(scope=scope).get("x-forwarded-proto", "")
        response.set_cookie(
            COOKIE,
            self.access.session,
            max_age=30 * 86400,
            httponly=True,
            samesite="strict",
            secure=scope["scheme"] == "https" or forwarded == "https",
        )
        await response(scope, receive, send)


def is_open(path: str) -> bool:
    """What is told to whoever has no key: that the server lives, and the page that asks for it."""
    return path == "/healthz" or not path.startswith(("/api", "/v1", "/sdapi", "/metrics"))
