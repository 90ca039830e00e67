"""The face of OpenAI's Images: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`.

Fields and events are those of OpenAI's reference (https://platform.openai.com/docs/api-reference/
images), as openai-python types them; what it lets a client ask for and a local server has no use
for (quality, style, moderation …) is taken in and changes nothing. Programs that have names of
OpenAI's models written into them get the model that is loaded.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.server.faces.bodies import Body, is_number, read_body
from fluxmesh_coordinator.server.faces.event_stream import EventResponse, written
from fluxmesh_coordinator.server.faces.extras import extras
from fluxmesh_coordinator.server.faces.openai_reply import ReplyFormat
from fluxmesh_coordinator.server.faces.waiting import (
    Interest,
    client_of,
    pictures_of,
    raise_failure,
    rounded,
)
from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.picture_folder import NoSuchPictureError
from fluxmesh_coordinator.server.problems import ProblemError, body_of, problem_of
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService
from fluxmesh_coordinator.server.statuses import MeshStatuses

Number = TypeVar("Number", int, float)

MAX_N = 10
# Nothing is metered: a local picture costs nothing.
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def routes(service: PaintingService, statuses: MeshStatuses, access: Access) -> list[Route]:
    """This face's."""

    async def known_models() -> list[dict[str, Any]]:
        known = await run_in_threadpool(service.catalogue.models)
        loaded = await statuses.are_loaded(known.values())  # a field of ours
        entry = {"object": "model", "created": 0, "owned_by": "fluxmesh"}
        return [{"id": name, **entry, "loaded": loaded[name]} for name in known]

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await known_models()})

    async def model(request: Request) -> Response:
        for entry in await known_models():
            if entry["id"] == request.path_params["name"]:
                return JSONResponse(entry)
        raise ProblemError(404, "There is no model of that name.", "model_not_found")

    async def generations(request: Request) -> Response:
        body = await read_body(request)
        asked = await _asked(body, service)
        return await _answer(
            request, service, access, body, asked, ReplyFormat.of(body, "image_generation")
        )

    async def edits(request: Request) -> Response:
        body = await read_body(request)
        asked = await _asked(body, service)
        images = await body.pictures("image")
        if not images:
            raise UsageError.about("image", "is missing", "send the picture to edit")
        mask = await body.picture("mask")
        usual = await run_in_threadpool(service.resolver.usual_model)
        if asked.model is None and not usual.edits and (mask is None or len(images) > 1):
            editor = await run_in_threadpool(service.resolver.editor_instead)
            asked = replace(asked, model=editor)
        is_shown = mask is None and (asked.model or usual).edits
        return await _answer(
            request, service, access, body, replace(asked, **_edited(images, mask, is_shown)),
            ReplyFormat.of(body, "image_edit"),
        )  # fmt: skip

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/edits", edits, methods=["POST"]),
    ]


async def _asked(body: Body, service: PaintingService) -> PaintRequest:
    """Raises `UsageError`."""
    width, height = _size(body.text("size"))
    n = body.whole("n")
    n = 1 if n is None else n
    if not 1 <= n <= MAX_N:
        raise UsageError.about("n_images", f"is {n}", f"it must be 1 to {MAX_N}")
    name = body.text("model")
    stream = body.flag("stream")
    placement: Any = body.text("placement") or None
    return PaintRequest(
        prompt=body.text("prompt"),
        model=await run_in_threadpool(service.catalogue.find, name) if name else None,
        width=rounded(width),
        height=rounded(height),
        n_images=n,
        steps=_first(body.whole("steps"), body.whole("num_inference_steps")),
        guidance=_first(body.number("guidance"), body.number("guidance_scale")),
        seed=body.seed(),
        strength=body.number("strength"),
        negative_prompt=body.text("negative_prompt"),
        cfg=body.number("cfg"),
        adapters=tuple(map(_lora, body.items("loras"))),
        placement=placement,
        previews=stream and (body.whole("partial_images") or 0) > 0,
        **await extras(body),
    )


def _edited(images: list[bytes], mask: bytes | None, is_shown: bool) -> dict[str, Any]:
    """The pictures of an edit: all `is_shown` to a model that edits, or the first painted over."""
    if is_shown:
        return {"references": tuple(images)}
    return {"image": images[0], "mask": mask, "references": tuple(images[1:])}


def _first(*values: Number | None) -> Number | None:
    return next((value for value in values if value is not None), None)


def _size(text: str) -> tuple[int | None, int | None]:
    """Width and height of `size`. Raises `UsageError`."""
    if text in ("", "auto"):
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UsageError.about("size", "can't be read", "write WIDTHxHEIGHT, or auto")
    return int(match[1]), int(match[2])


def _lora(entry: Any) -> tuple[str, float]:
    """An adapter of the list `loras`: its name, or an object with name and strength."""
    if isinstance(entry, str):
        return entry, 1.0
    if isinstance(entry, dict):
        name = entry.get("name") or entry.get("path")
        strength: Any = entry.get("strength", entry.get("scale", 1.0))
        if isinstance(name, str) and is_number(strength):
            return name, float(strength)
    raise UsageError.about("loras", "can't be read", 'send [{"name": "robot", "strength": 0.8}]')


async def _answer(
    request: Request,
    service: PaintingService,
    access: Access,
    body: Body,
    asked: PaintRequest,
    form: ReplyFormat,
) -> Response:
    client = client_of(request, body.text("user"))
    job = await service.submit(asked, client, request.headers.get("idempotency-key", ""))
    if body.flag("stream"):
        return EventResponse(_events(service, job, form), Interest(service, job))
    names = await pictures_of(request, service, job)
    base = str(request.base_url).rstrip("/")

    def reply() -> Response:
        data = [
            {"url": f"{base}{access.address_of(name)}"}
            if form.as_url
            else {"b64_json": _encoded(service, name, form)}
            for name in names
        ]
        fields = {"created": int(time.time()), "data": data, "usage": USAGE, **form.about(job)}
        return JSONResponse(fields)

    return await run_in_threadpool(reply)  # of many pictures it takes a while


async def _events(
    service: PaintingService, job: ServedJob, form: ReplyFormat
) -> AsyncIterator[str]:
    """The stream of a job: pictures on their way, as many as were asked for, then the whole ones.

    Who reads it hears in comments what else is told, such as a model that is read into memory.
    """
    sent: dict[int, int] = {}  # by image: how many partial pictures
    missing: NoSuchPictureError | None = None
    async for event in job.events.follow():
        data, about = event.data, {"created_at": int(time.time()), **form.about(job)}
        if event.kind == "preview" and form.is_due(sent.get(data["image"], 0), data, job):
            number = sent[data["image"]] = sent.get(data["image"], 0) + 1
            about |= {"type": f"{form.kind}.partial_image", "partial_image_index": number - 1}
            yield await _written(about, partial(form.enlarged, data["data"], job))
        elif event.kind == "picture":
            about |= {"type": f"{form.kind}.completed", "usage": USAGE}
            try:
                yield await _written(about, partial(_encoded, service, data["name"], form))
            except NoSuchPictureError as error:  # somebody has removed it meanwhile
                missing = error
        elif event.kind in ("model", "note", "host"):
            yield f": {' '.join(data['text'].split())}\n\n"
    try:
        raise_failure(job)
        if missing is not None:
            raise missing
    except (ProblemError, NoSuchPictureError) as error:
        fields = body_of(problem_of(error), "/v1/")
        yield written({"type": "error", **fields}, kind="error")


async def _written(about: dict[str, Any], picture: Callable[[], str]) -> str:
    """An event with its picture, in a thread: it is megabytes of text."""

    def text() -> str:
        return written({**about, "b64_json": picture()}, kind=about["type"])

    return await run_in_threadpool(text)


def _encoded(service: PaintingService, name: str, form: ReplyFormat) -> str:
    return form.encoded(service.pictures.read(name))
