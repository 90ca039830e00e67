"""A line a request, which holds nothing of what was asked for: no prompt, no query, no key."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxmesh_coordinator.server.metrics import Metrics

log = logging.getLogger("fluxmesh.serve")
SHOWN = 120  # characters of a path


class RequestLogMiddleware:
    """Counts and logs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, received, sent = time.monotonic(), 0, 0, 0

        async def hear() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, hear, tell)
        except Exception:
            status = status or 500  # it is answered further out
            raise
        finally:
            self.metrics.add("fluxmesh_requests_total", status=str(status or 499))
            self.metrics.add("fluxmesh_received_bytes_total", received)
            self.metrics.add("fluxmesh_sent_bytes_total", sent)
            address = scope["client"][0] if scope.get("client") else "-"
            path = scope["path"][:SHOWN].encode("ascii", "backslashreplace").decode()
            path = "".join(letter if letter.isprintable() else "?" for letter in path)
            log.info(
                "%s %s %s %d %.0f ms %d B in %d B out",
                address, scope["method"], path, status or 499,
                (time.monotonic() - begun) * 1e3, received, sent,
            )  # fmt: skip
