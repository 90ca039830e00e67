"""The application: every face's routes behind the guards, in the order in which a request passes.

log → who may ask → how much and how slowly → a face → the painting service
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from fluxmesh.errors import FluxmeshError
from fluxmesh.version import __version__
from fluxmesh_coordinator.server import metrics
from fluxmesh_coordinator.server.faces import api, automatic1111, openai, openapi_page
from fluxmesh_coordinator.server.guard.access import HEADERS, Access, AccessMiddleware
from fluxmesh_coordinator.server.guard.limits import BodyLimits, LimitsMiddleware
from fluxmesh_coordinator.server.guard.request_log import RequestLogMiddleware
from fluxmesh_coordinator.server.problems import ProblemError, answer, problem_of
from fluxmesh_coordinator.server.queue.service import PaintingService
from fluxmesh_coordinator.server.statuses import MeshStatuses

PAGE = Path(__file__).resolve().parent / "page"
FACES = ("/v1/", "/sdapi/", "/api/")


def application(
    service: PaintingService, access: Access, limits: BodyLimits | None = None
) -> Starlette:
    """The whole server, for uvicorn or a test."""
    statuses = MeshStatuses(service)

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ending" if service.is_draining else "ok"})

    async def counted(_request: Request) -> Response:
        text = service.metrics.text(await _gauges(service, statuses))
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    app = Starlette(
        routes=[
            Route("/healthz", healthz, methods=["GET"]),
            Route("/metrics", counted, methods=["GET"]),
            *openai.routes(service, statuses, access),
            *automatic1111.routes(service, statuses),
            *api.routes(service, statuses),
            *openapi_page.routes(),
        ],
        middleware=[
            Middleware(RequestLogMiddleware, metrics=service.metrics),
            Middleware(AccessMiddleware, access=access),
            Middleware(LimitsMiddleware, limits=limits or BodyLimits()),
        ],
        exception_handlers={
            FluxmeshError: _refused,
            ClientDisconnect: _gone,
            HTTPException: _unknown,
            Exception: _broken,
        },
    )
    app.router.default = _page()  # not a route: that would take a known path in a wrong method
    app.router.redirect_slashes = False
    return app


class _PageFiles(StaticFiles):
    """Files that a browser asks for again each time, and is told that they are the same.

    Without that it takes them for fresh for a while, and runs those of the fluxmesh before.
    """

    def file_response(self, *args: Any, **fields: Any) -> Response:
        response = super().file_response(*args, **fields)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _page() -> ASGIApp:
    """The page's files, for what no face knows."""
    files = _PageFiles(directory=PAGE, html=True)

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(FACES):
            raise HTTPException(404)
        await files(scope, receive, send)

    return page


async def _gauges(
    service: PaintingService, statuses: MeshStatuses
) -> dict[str, list[tuple[dict[str, str], float]]]:
    hosts: dict[str, int] = {}
    for host in (await statuses.hosts_and_links())["hosts"]:
        hosts[host["state"]] = hosts.get(host["state"], 0) + 1
    rows = service.rows()
    stages = {stage: sum(r.job.stage == stage for r in rows) for stage in ("queued", "running")}
    return {
        "fluxmesh_jobs": [({"stage": stage}, count) for stage, count in stages.items()],
        "fluxmesh_hosts": [({"state": state}, count) for state, count in hosts.items()],
    }


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, FluxmeshError)
    return answer(problem_of(error), request.url.path)


def _gone(request: Request, _error: Exception) -> Response:
    """In the middle of its body; nobody reads this, but the log counts it as what it is."""
    return answer(ProblemError(499, "The client has gone.", "cancelled"), request.url.path)


def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "There is nothing here.", 405: "That can't be done here."}
    said = text.get(error.status_code, "The request can't be read.")
    response = answer(ProblemError(error.status_code, said, "http"), request.url.path)
    response.headers.update(error.headers or {})  # which methods there are
    return response


def _broken(request: Request, _error: Exception) -> Response:
    """starlette raises the error once more, for the log.

    It answers further out than any guard stands, so what every answer has is added here.
    """
    said = f"Something went wrong inside the server (fluxmesh {__version__}); its log says what."
    response = answer(ProblemError(500, said, "failed"), request.url.path)
    response.headers.update({name.decode(): value.decode() for name, value in HEADERS})
    return response
