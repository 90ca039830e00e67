"""What takes long is done beside the event loop, and what does not is done at once.

A thread costs a tenth of a millisecond, and several where the processors are busy: each time the
system has to wake it, and then the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
SMALL = 64 << 10  # bytes that are read, hashed or written in about a millisecond


async def of_size(nbytes: int, work: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """What `work` on so many bytes returns, or raises; the server hears others meanwhile."""
    if nbytes <= SMALL:
        return work(*arguments, **named)
    return await asyncio.to_thread(work, *arguments, **named)
