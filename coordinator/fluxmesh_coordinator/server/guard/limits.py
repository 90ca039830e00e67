"""How much and how slowly a client may send: bodies are counted and timed while they come in.

The headers of a request, and who takes nothing of an answer, are timed by `connections.py`; what a
body holds is looked at by the faces.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxmesh_coordinator.server.problems import ProblemError, answer


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Bytes and seconds."""

    body_bytes: int = 64 << 20
    all_bytes: int = 512 << 20  # of all bodies that are held at once
    address_bytes: int = 384 << 20  # of those that come from one address
    free_bytes: int = 64 << 10  # of each body, which the others' size never forbids
    retry_seconds: int = 5  # after which room is likely: a body is held until its answer is sent
    piece_seconds: float = 15.0  # between two pieces of a body
    body_seconds: float = 180.0  # for the whole of it


class BodyBudget:
    """What all bodies together hold: each is bounded, and hundreds may come at once.

    Bytes are charged as they come and not as they are announced, so that nobody keeps others out
    by announcing much and sending little.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._held: Counter[str] = Counter()  # bytes, by address

    @property
    def held(self) -> int:
        """Bytes."""
        return self._held.total()

    def check(self, address: str, nbytes: int) -> None:
        """Raises `ProblemError` where so many more do not fit."""
        limits = self.limits
        if self._held[address] + nbytes > limits.address_bytes:
            raise ProblemError(
                429, "Your address sends too much at once; send this again when less is under way.",
                "too_much_at_once", retry_after=limits.retry_seconds,
            )  # fmt: skip
        if self.held + nbytes > limits.all_bytes:
            raise ProblemError(
                503, "Too many pictures are sent to this server at once; send this again later.",
                "too_much_at_once", retry_after=limits.retry_seconds,
            )  # fmt: skip

    def hold(self, address: str, nbytes: int) -> None:
        """Raises `ProblemError`, and holds nothing then."""
        self.check(address, nbytes)
        self._held[address] += nbytes

    def release(self, address: str, nbytes: int) -> None:
        """What was held is let go of."""
        self._held[address] -= nbytes
        if self._held[address] <= 0:
            del self._held[address]


class LimitsMiddleware:
    """Cuts off who sends too much, or too slowly."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app, self.limits = app, limits
        self.budget = BodyBudget(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        try:
            self._check_length(Headers(scope=scope), address)
        except ProblemError as error:
            await answer(error, scope["path"])(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        begun = loop.time()
        total, held, is_whole, has_begun = 0, 0, False, False

        async def counted() -> Message:
            nonlocal total, held, is_whole
            if is_whole:
                return await receive()
            left = begun + self.limits.body_seconds - loop.time()
            try:
                async with asyncio.timeout(max(0.0, min(left, self.limits.piece_seconds))):
                    message = await receive()
            except TimeoutError:
                raise ProblemError(408, "The body came too slowly.", "too_slow") from None
            total += len(message.get("body", b""))
            is_whole = message["type"] != "http.request" or not message.get("more_body", False)
            if total > self.limits.body_bytes:
                raise self._too_large()
            more = max(0, total - self.limits.free_bytes) - held
            if more:
                self.budget.hold(address, more)
                held += more
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except ProblemError as error:
            if has_begun:
                raise
            await answer(error, scope["path"])(scope, receive, send)
        finally:
            self.budget.release(address, held)

    def _check_length(self, headers: Headers, address: str) -> None:
        """Raises `ProblemError` for a body that says itself that it will not fit."""
        text = headers.get("content-length", "0")
        length = int(text[:18]) if text.isascii() and text.isdecimal() else 0
        if length > self.limits.body_bytes:
            raise self._too_large()
        if length > self.limits.free_bytes:
            self.budget.check(address, length - self.limits.free_bytes)

    def _too_large(self) -> ProblemError:
        return ProblemError(
            413, f"The body is larger than {self.limits.body_bytes >> 20} MiB; send less.", "body"
        )
