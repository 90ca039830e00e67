"""Server-sent events: how they are written, and comments that keep a quiet connection alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

QUIET = 15.0  # seconds without an event, after which a comment goes out
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def written(data: dict[str, Any], *, kind: str = "", number: int | None = None) -> str:
    """One event as it travels."""
    head = "" if number is None else f"id: {number}\n"
    head += f"event: {kind}\n" if kind else ""
    return f"{head}data: {json.dumps(data)}\n\n"


async def kept_alive(events: AsyncIterator[str], quiet: float = QUIET) -> AsyncIterator[str]:
    """The same, with a comment whenever nothing came for a while."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=quiet)
            if not done:
                yield ": still here\n\n"
                continue
            text = coming.result()
            if text is None:
                return
            yield text
            coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


class EventResponse(StreamingResponse):
    """Events as a response; `held` is entered before anything else, and left when the client goes.

    Not by `events` themselves: a client that is gone already has none of them begun.
    """

    def __init__(self, events: AsyncIterator[str], held: AbstractContextManager[None]) -> None:
        super().__init__(kept_alive(events), media_type="text/event-stream", headers=HEADERS)
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)
