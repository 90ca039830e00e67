"""What `/api` takes and gives, as OpenAPI 3.1, and a page that shows it.

The page is made here from the same description, and loads nothing but a style sheet of this server.
"""

from __future__ import annotations

from typing import Any

from fluxmesh.request import BITS, DTYPES, MAX_CACHE, MAX_REFERENCES, MAX_STRENGTH
from fluxmesh.version import __version__
from fluxmesh_coordinator.server.paint_request import (
    MAX_AREA,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_STEPS,
)

Schema = dict[str, Any]


def _object(required: str = "", /, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": required.split()} if required else {})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _text(about: str = "", **more: Any) -> Schema:
    return {"type": "string", **({"description": about} if about else {}), **more}


def _whole(about: str = "", **more: Any) -> Schema:
    return {"type": "integer", **({"description": about} if about else {}), **more}


def _number(about: str = "", **more: Any) -> Schema:
    return {"type": "number", **({"description": about} if about else {}), **more}


FLAG: Schema = {"type": "boolean"}
WHOLE_BITS: Schema = {"type": "integer", "enum": list(BITS)}
PICTURE = _text("PNG, JPEG, WebP … in base64, or a file of a form", format="byte")
ADAPTER = _object("name", name=_text(), strength=_number(default=1.0))
RECIPE = _object(
    prompt=_text(),
    model=_text(),
    seed=_whole(),
    width=_whole(),
    height=_whole(),
    steps=_whole(),
    guidance=_number(),
    adapters=_list(ADAPTER),
    placement=_text(),
    from_picture=FLAG,
    strength={"type": ["number", "null"]},
    references=_whole("how many it was shown"),
    control=FLAG,
    negative_prompt=_text(),
    cfg={"type": ["number", "null"]},
    bits={"type": ["integer", "null"]},
    text_bits={"type": ["integer", "null"]},
    dtype=_text(),
    cache=_number(),
    t5_padding=FLAG,
    fuse_adapters=FLAG,
    version=_text(),
)
JOB = _object(
    "prompt",
    prompt=_text(maxLength=MAX_PROMPT),
    model=_text("a name of /api/models; else the server's own"),
    width=_whole(f"a multiple of 16; width x height is at most {MAX_AREA}", multipleOf=16),
    height=_whole(multipleOf=16),
    steps=_whole(minimum=1, maximum=MAX_STEPS),
    guidance=_number(minimum=0, maximum=100),
    seed=_whole("image k is the one that seed + k gives alone; -1: one is drawn", minimum=-1),
    n_images=_whole(default=1, minimum=1, maximum=MAX_IMAGES),
    image=PICTURE | {"description": "what is changed"},
    mask=PICTURE | {"description": "white, or transparent, is painted anew"},
    outpaint=_list(_whole(minimum=0))
    | {"description": "pixels that are painted around the image: left, top, right, bottom"},
    strength=_number("how much of the image is painted anew", exclusiveMinimum=0, maximum=1),
    references=_list(PICTURE) | {"maxItems": MAX_REFERENCES},
    reference_strengths=_list(_number(minimum=0, maximum=MAX_STRENGTH))
    | {"maxItems": MAX_REFERENCES},
    control=PICTURE | {"description": "a map of edges or depth that is followed"},
    control_from=PICTURE
    | {"description": "a picture whose edges are such a map, for models that follow edges"},
    negative_prompt=_text(),
    cfg=_number(),
    adapters=_list(ADAPTER),
    fuse_adapters=FLAG | {"description": "merge adapters into the weights: faster"},
    dtype=_text("of weights that are not quantized", enum=list(DTYPES)),
    bits=WHOLE_BITS | {"description": "of a quantized weight; else as the mesh holds it"},
    text_bits=WHOLE_BITS | {"description": "of a text encoder's weight; else as bits says"},
    t5_padding=FLAG | {"description": "false: faster, another picture", "default": True},
    cache=_number(
        "approximate, faster: how little a step must change to be reused; 0: off",
        minimum=0,
        maximum=MAX_CACHE,
    ),
    placement=_text(enum=["data", "sequence", "tensor"]),
    previews=FLAG | {"description": "tell `preview` events"},
    id=_text(
        "chosen by the client: a repeat is the same job", pattern="^[A-Za-z0-9][\\w.-]{7,63}$"
    ),
)
HOST = _object(
    rank=_whole(),
    name=_text(),
    chip=_text(),
    state=_text(),
    model={"type": ["string", "null"]},
    models=_list(_text("in memory, the one used last first")),
    memory_bytes=_whole(),
    memory_used_bytes=_whole(),
    reason=_text(),
)
QUEUED = _object(
    id=_text(),
    state=_text(enum=["queued", "running"]),
    place=_whole("1 is next, 0 is being painted"),
    seconds_left=_number("until its last picture; 0: nobody knows"),
    mine=FLAG,
    n_images=_whole(),
    model=_text(),
    progress=_number(minimum=0, maximum=1),
)
SAVED = _object(
    name=_text(),
    url=_text(),
    thumbnail_url=_text(),
    width=_whole(),
    height=_whole(),
    created=_text(format="date-time"),
    recipe=RECIPE,
)
ERROR = _object(error=_object(message=_text(), setting={"type": ["string", "null"]}, code=_text()))
EVENTS = (
    "Server-sent events, in numbered order (Last-Event-ID goes on): queued {place, seconds_left}; "
    "planned {placement, hosts, seconds, notice?}; model {name, text, done_bytes?, total_bytes?}; "
    "step {image, step, steps, seconds_left}; preview {image, step, data, width, height}, a JPEG "
    "in base64; picture {image, name, url, seed, width, height}; note {text}; host {name, text}; "
    "and at the end done {pictures}, error {message, setting, code} or cancelled {}."
)
NAME = {"name": "name", "in": "path", "required": True, "schema": _text()}
ID = {"name": "id", "in": "path", "required": True, "schema": _text()}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _answers(code: int, about: str, content: Schema | None = None) -> Schema:
    good = {"description": about, **({"content": content} if content else {})}
    bad = {"description": "What went wrong, and what to do.", "content": _json(ERROR)}
    return {str(code): good, "default": bad}


def _asks(summary: str, answers: Schema, **more: Any) -> Schema:
    return {"summary": summary, "responses": answers, **more}


def _job_body() -> Schema:
    content = _json(JOB) | {"multipart/form-data": {"schema": JOB}}
    return {"required": True, "content": content}


def document() -> dict[str, Any]:
    """The description."""
    model = _object(
        name=_text(),
        family=_text(),
        size_bytes=_whole(),
        licence={"type": ["string", "null"]},
        embedded={**FLAG, "description": "Whether it comes with fluxmesh, to try it out."},
        loaded=FLAG,
        steps=_whole(),
        guidance={"type": ["number", "null"]},
        size=_object(width=_whole(), height=_whole()),
        takes=_list(_text()),
        max_references=_whole(),
    )
    link: dict[str, Schema] = {"from": _whole(), "to": _whole(), "bytes_per_second": _number()}
    row = _object(
        placement=_text(), hosts=_list(_whole()), seconds={"type": ["number", "null"]}, fits=FLAG,
        reason=_text(),
    )  # fmt: skip
    limit = {"name": "limit", "in": "query", "schema": _whole(default=50, maximum=500)}
    before = {"name": "before", "in": "query", "schema": _text("the `next` of the page before")}
    png: Schema = {"image/png": {"schema": {}}}
    paths = {
        "/api/models": {
            "get": _asks("What can paint.", _answers(200, "Models.", _json(_object(
                default=_text(), models=_list(model)))))
        },
        "/api/adapters": {
            "get": _asks("LoRA files that a job may name.", _answers(200, "Adapters.", _json(
                _object(adapters=_list(_object(name=_text(), bytes=_whole()))))))
        },
        "/api/status": {
            "get": _asks("Hosts, links and the line.", _answers(200, "Now.", _json(_object(
                hosts=_list(HOST), links=_list(_object(**link)), notes=_list(_text()),
                queue=_list(QUEUED), version=_text()))))
        },
        "/api/jobs": {
            "post": _asks("Send a job.", _answers(202, "It is in line.", _json(_object(
                id=_text(), place=_whole(), seconds_left=_number(), seed=_whole()))),
                requestBody=_job_body())
        },
        "/api/jobs/{id}/events": {
            "get": _asks("Follow a job.", _answers(200, EVENTS, {"text/event-stream": {
                "schema": _text()}}), parameters=[ID])
        },
        "/api/jobs/{id}": {
            "delete": _asks("Cancel a job at its next step.", _answers(204, "It ends."),
                parameters=[ID])
        },
        "/api/plan": {
            "post": _asks("How a job would be done, and every other way.", _answers(200, "Ways.",
                _json(_object(chosen={"type": ["string", "null"]}, reason=_text(),
                    rows=_list(row)))), requestBody=_job_body())
        },
        "/api/pictures": {
            "get": _asks("Finished pictures, newest first.", _answers(200, "A page.", _json(
                _object(pictures=_list(SAVED), next={"type": ["string", "null"]}))),
                parameters=[limit, before])
        },
        "/api/pictures/{name}": {
            "get": _asks("A picture, with its recipe inside.", _answers(200, "The file.", png),
                parameters=[NAME]),
            "delete": _asks("Remove a picture.", _answers(204, "It is gone."), parameters=[NAME]),
        },
        "/api/pictures/{name}/thumbnail": {
            "get": _asks("A small JPEG of it.", _answers(200, "The file.", {
                "image/jpeg": {"schema": {}}}), parameters=[NAME])
        },
        "/api/session": {
            "post": _asks("Give the key, get a cookie.", _answers(200, "Whether there is a key.",
                _json(_object(needs_key=FLAG))), security=[],
                requestBody={"required": True, "content": _json(_object("key", key=_text()))})
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fluxmesh",
            "version": __version__,
            "description": "Pictures on a mesh. /v1/images (OpenAI) and /sdapi/v1 "
            "(AUTOMATIC1111) are described by their makers.",
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            }
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": paths,
    }
