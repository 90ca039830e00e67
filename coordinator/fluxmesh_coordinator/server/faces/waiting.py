"""Who asks, and how a connection waits for its job: what the faces have in common."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AbstractContextManager

from starlette.requests import Request

from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService

CLIENT = "x-fluxmesh-client"  # a header: which of several behind one address it is
SIDE = 16  # pixels: sides are multiples of it


def client_of(request: Request, user: str = "") -> str:
    """Whose turn a request takes: an address, and who speaks from there, if that is told."""
    address = request.client.host if request.client else ""
    name = user or request.headers.get(CLIENT, "") or request.cookies.get("fluxmesh_client", "")
    return f"{address} {hashlib.sha256(name.encode(errors='replace')).hexdigest()[:16]}"


async def pictures_of(request: Request, service: PaintingService, job: ServedJob) -> list[str]:
    """The names of a job's pictures, once all are there; a client that goes cancels it.

    Raises `ProblemError` where it failed, or was cancelled.
    """
    gone = asyncio.create_task(_disconnected(request))
    over = asyncio.create_task(job.events.over())
    try:
        with Interest(service, job):
            await asyncio.wait({gone, over}, return_when=asyncio.FIRST_COMPLETED)
            if not over.done():
                raise ProblemError(499, "The client has gone.", "cancelled")
    finally:
        gone.cancel()
        over.cancel()
    raise_failure(job)
    return job.names


class Interest(AbstractContextManager[None]):
    """A connection that waits for a job: when the last of them goes, the job is cancelled."""

    def __init__(self, service: PaintingService, job: ServedJob) -> None:
        self.service, self.job = service, job

    def __enter__(self) -> None:
        self.job.waiting += 1

    def __exit__(self, *_error: object) -> None:
        self.job.waiting -= 1
        if self.job.waiting == 0 and not self.job.events.is_over:
            self.service.cancel(self.job)


def raise_failure(job: ServedJob) -> None:
    """Raises why a job that is over has no pictures, if it has none."""
    if job.failure is not None:
        raise job.failure
    if job.stage == "cancelled":
        raise ProblemError(499, "The job was cancelled.", "cancelled")


def rounded(side: int | None) -> int | None:
    """A side as the model can paint it: clients of other servers send any number."""
    return None if side is None else max(SIDE, round(side / SIDE) * SIDE)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
