"""fluxmesh's own face: `/api/…`, which the page stands on. `openapi.py` describes it.

A job is sent, and followed by its events for as long as somebody likes: they are numbered, so that
who was cut off goes on where they stopped. It ends when it is done, or deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.errors import UsageError
from fluxmesh.planning.plan import plan as find_plan
from fluxmesh.version import __version__
from fluxmesh_coordinator.commands.generate import ReadyPrompt
from fluxmesh_coordinator.server.faces.api_fields import check_fields
from fluxmesh_coordinator.server.faces.bodies import Body, is_number, read_body
from fluxmesh_coordinator.server.faces.event_stream import EventResponse, written
from fluxmesh_coordinator.server.faces.extras import extras
from fluxmesh_coordinator.server.faces.waiting import client_of
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService
from fluxmesh_coordinator.server.statuses import MeshStatuses

PAGE = 50  # pictures that are listed at once
MAX_PAGE = 500
# A picture never changes under its name.
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def routes(service: PaintingService, statuses: MeshStatuses) -> list[Route]:
    """This face's."""

    async def models(_request: Request) -> Response:
        known = await run_in_threadpool(service.catalogue.models)
        loaded = await statuses.are_loaded(known.values())
        default = await run_in_threadpool(service.resolver.usual_model)
        listed = [{**model.described(), "loaded": loaded[model.name]} for model in known.values()]
        return JSONResponse({"default": default.name, "models": listed})

    async def adapters(_request: Request) -> Response:
        files = await run_in_threadpool(service.catalogue.adapters)
        listed = [{"name": name, "bytes": path.stat().st_size} for name, path in files.items()]
        return JSONResponse({"adapters": listed})

    async def status(request: Request) -> Response:
        return JSONResponse(
            {
                **await statuses.hosts_and_links(),
                "queue": _queue(service, client_of(request)),
                "version": __version__,
            }
        )

    async def submit(request: Request) -> Response:
        body = await read_body(request)
        asked = await _asked(body, service)
        id, key = body.text("id"), request.headers.get("idempotency-key", "")
        try:
            job = await service.submit(asked, client_of(request), id or key)
        except ProblemError as error:
            if not id and error.setting == "id":
                raise error.saying(str(error).replace("`id`", "`Idempotency-Key`")) from None
            raise
        place = service.places().get(job.id)
        return JSONResponse(
            {
                "id": job.id,
                "place": place.number if place else 0,
                "seconds_left": round(place.seconds_left, 2) if place else 0.0,
                "seed": job.seed,
            },
            status_code=202,
        )

    async def events(request: Request) -> Response:
        job = service.job(request.path_params["id"])
        return EventResponse(_events(job, _resume(request)), nullcontext())

    async def cancel(request: Request) -> Response:
        service.cancel(service.job(request.path_params["id"]))
        return Response(status_code=204)

    async def plan(request: Request) -> Response:
        body = await read_body(request)
        asked = await _asked(body, service)
        _, ready = await service.resolve(asked, client_of(request))
        return JSONResponse(await run_in_threadpool(_plan, service, ready, asked.placement))

    async def pictures(request: Request) -> Response:
        limit = request.query_params.get("limit", str(PAGE))
        if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_PAGE:
            raise UsageError.about("limit", "is no number", f"it must be 1 to {MAX_PAGE}")
        before = request.query_params.get("before", "")
        listing, after = await run_in_threadpool(service.pictures.newest, int(limit), before)
        listed = [
            {
                **asdict(picture),
                "url": f"/api/pictures/{picture.name}",
                "thumbnail_url": f"/api/pictures/{picture.name}/thumbnail",
            }
            for picture in listing
        ]
        return JSONResponse({"pictures": listed, "next": after or None})

    async def picture(request: Request) -> Response:
        # Whole, for it may be removed while it is sent.
        data = await run_in_threadpool(service.pictures.read, request.path_params["name"])
        return Response(data, media_type="image/png", headers=FOR_EVER)

    async def thumbnail(request: Request) -> Response:
        data = await run_in_threadpool(service.pictures.thumbnail, request.path_params["name"])
        return Response(data, media_type="image/jpeg", headers=FOR_EVER)

    async def remove(request: Request) -> Response:
        await run_in_threadpool(service.pictures.remove, request.path_params["name"])
        return Response(status_code=204)

    return [
        Route("/api/models", models, methods=["GET"]),
        Route("/api/adapters", adapters, methods=["GET"]),
        Route("/api/status", status, methods=["GET"]),
        Route("/api/jobs", submit, methods=["POST"]),
        Route("/api/jobs/{id}/events", events, methods=["GET"]),
        Route("/api/jobs/{id}", cancel, methods=["DELETE"]),
        Route("/api/plan", plan, methods=["POST"]),
        Route("/api/pictures", pictures, methods=["GET"]),
        Route("/api/pictures/{name}", picture, methods=["GET"]),
        Route("/api/pictures/{name}", remove, methods=["DELETE"]),
        Route("/api/pictures/{name}/thumbnail", thumbnail, methods=["GET"]),
    ]


async def _asked(body: Body, service: PaintingService) -> PaintRequest:
    """Raises `UsageError`, `ProblemError`."""
    check_fields(body)
    name = body.text("model")
    model = await run_in_threadpool(service.catalogue.model, name) if name else None
    n_images = body.whole("n_images")
    placement: Any = body.text("placement") or None
    return PaintRequest(
        prompt=body.text("prompt"),
        model=model,
        width=body.whole("width"),
        height=body.whole("height"),
        steps=body.whole("steps"),
        guidance=body.number("guidance"),
        seed=body.seed(),
        n_images=1 if n_images is None else n_images,
        image=await body.picture("image"),
        mask=await body.picture("mask"),
        strength=body.number("strength"),
        references=tuple(await body.pictures("references")),
        reference_strengths=tuple(map(_strength, body.items("reference_strengths"))),
        negative_prompt=body.text("negative_prompt"),
        cfg=body.number("cfg"),
        adapters=tuple(map(_adapter, body.items("adapters"))),
        placement=placement,
        previews=body.flag("previews"),
        **await extras(body),
    )


def _strength(entry: Any) -> float:
    """Raises `UsageError`."""
    if not is_number(entry):
        raise UsageError.about("reference_strengths", "can't be read", "send [1.0, 0.8]")
    return float(entry)


def _adapter(entry: Any) -> tuple[str, float]:
    """Raises `UsageError`."""
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        strength = entry.get("strength", 1.0)
        if is_number(strength):
            return entry["name"], float(strength)
    raise UsageError.about("adapters", "can't be read", 'send [{"name": "robot", "strength": 0.8}]')


def _resume(request: Request) -> int:
    """The number of the first event that a client has not seen."""
    seen = request.headers.get("last-event-id", "")
    return int(seen) + 1 if seen.isascii() and seen.isdecimal() and len(seen) < 16 else 0


async def _events(job: ServedJob, first: int) -> AsyncIterator[str]:
    async for event in job.events.follow(first):
        yield written(event.data, kind=event.kind, number=event.number)


def _queue(service: PaintingService, client: str) -> list[dict[str, Any]]:
    return [
        {
            "id": row.job.id,
            "state": row.job.stage,
            "place": row.place,
            "seconds_left": round(row.seconds_left, 2),
            "mine": row.job.client == client,
            "n_images": row.job.n_images,
            "model": row.job.model,
            "progress": round(row.job.progress, 4),
        }
        for row in service.rows()
    ]


def _plan(
    service: PaintingService, ready: ReadyPrompt, placement: Placement | None
) -> dict[str, Any]:
    with service.lane.painters.looking() as painter:
        if painter is None:
            raise ProblemError(503, "The mesh is not there yet; ask again.", "no_host")
        view = painter.mesh.view
    resolved = ready.resolved
    plan = find_plan(resolved.request, view, resolved.model.sizes, placement=placement)
    return {
        "chosen": plan.winner.name if plan.winner else None,
        "reason": plan.reason,
        "rows": [
            {
                "placement": option.name,
                "hosts": list(option.ranks),
                "seconds": None if option.problem else round(option.seconds, 3),
                "fits": not option.problem,
                "reason": option.problem,
            }
            for option in plan.options
        ],
    }
