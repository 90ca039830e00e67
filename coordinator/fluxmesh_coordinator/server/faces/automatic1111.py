"""The face of AUTOMATIC1111's web UI: `/sdapi/v1/…`, which most programs with pictures can talk to.

Fields are those of its API models (modules/api/models.py of stable-diffusion-webui). Its clients
send what Stable Diffusion takes and FLUX does not, a negative prompt and a sampler above all,
without having been asked: what this model has no use for changes nothing here, and `info` says so.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.server.catalogue import ServedModel
from fluxmesh_coordinator.server.faces.automatic1111_reply import (
    SAMPLER,
    info,
    memory_here,
    progress,
    unfinished,
)
from fluxmesh_coordinator.server.faces.bodies import TRUE, Body, read_body
from fluxmesh_coordinator.server.faces.extras import extras
from fluxmesh_coordinator.server.faces.waiting import client_of, pictures_of, rounded
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.service import PaintingService
from fluxmesh_coordinator.server.statuses import MeshStatuses

STRENGTH = 0.75  # of image-to-image there, where a client says nothing
# What its clients send for Stable Diffusion, and what changes nothing here though they ask for it.
WITHOUT_EFFECT = ("alwayson_scripts", "enable_hr", "refiner_checkpoint", "restore_faces",
                  "script_name", "styles", "subseed_strength", "tiling")  # fmt: skip
# What its clients ask for before they show anything: there is one schedule, and no upscaler; nor is
# there anything of what only Stable Diffusion has, or of extensions.
LISTS: dict[str, Any] = {
    "samplers": [{"name": SAMPLER, "aliases": ["euler"], "options": {}}],
    "schedulers": [{"name": "simple", "label": "Simple", "aliases": None, "default_rho": -1.0,
                    "need_inner_model": False}],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None,
                   "scale": 1.0}],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "cmd-flags": {},  # those of its program
    **dict.fromkeys(("extensions", "face-restorers", "hypernetworks", "latent-upscale-modes",
                     "prompt-styles", "realesrgan-models", "script-info", "sd-modules", "sd-vae"),
                    []),
}  # fmt: skip
# Lists that are looked up at every request, or empty.
ALWAYS_FRESH = ("embeddings", "loras", "vae")
LORA = re.compile(r"<lora:([^:<>]{1,200})(?::(-?[\d.]{1,12}))?(?::[^<>]{0,100})?>")


def routes(service: PaintingService, statuses: MeshStatuses) -> list[Route]:
    """This face's."""

    async def options(_request: Request) -> Response:
        model = await run_in_threadpool(service.resolver.usual_model)
        return JSONResponse(
            {"sd_model_checkpoint": model.name, "sd_checkpoint_hash": "", "samples_format": "png"}
        )

    async def set_options(request: Request) -> Response:
        name = (await read_body(request)).text("sd_model_checkpoint")
        if name:
            service.resolver.chosen = await run_in_threadpool(service.catalogue.model, _plain(name))
        return JSONResponse(None)

    async def sd_models(_request: Request) -> Response:
        models = await run_in_threadpool(service.catalogue.models)
        loaded = await statuses.are_loaded(models.values())
        return JSONResponse(
            [_model(model) | {"loaded": loaded[model.name]} for model in models.values()]
        )

    async def listed(request: Request) -> Response:
        return JSONResponse(LISTS[request.url.path.rpartition("/")[2]])

    async def refresh(request: Request) -> Response:
        if request.url.path.endswith("-checkpoints"):
            service.catalogue.forget()
        return JSONResponse(None)

    async def memory(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(memory_here))

    async def loras(_request: Request) -> Response:
        names = await run_in_threadpool(service.catalogue.adapters)
        return JSONResponse(
            [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]
        )

    async def txt2img(request: Request) -> Response:
        body = await read_body(request)
        asked, ignored = await _asked(body, service)
        return await _answer(request, service, body, asked, ignored)

    async def img2img(request: Request) -> Response:
        body = await read_body(request)
        asked, ignored = await _asked(body, service)
        images = await body.pictures("init_images")
        if not images:
            raise UsageError.about("image", "is missing", "send the picture to change")
        strength = body.number("denoising_strength")
        is_inverted = body.flag("inpainting_mask_invert")
        asked = replace(
            asked,
            image=images[0],
            references=tuple(images[1:]),
            mask=await asyncio.to_thread(_mask, await body.picture("mask"), is_inverted),
            strength=STRENGTH if strength is None else strength,
        )
        return await _answer(request, service, body, asked, ignored)

    async def how_far(request: Request) -> Response:
        skips = request.query_params.get("skip_current_image", "false").lower() in TRUE
        return JSONResponse(progress(service, client_of(request), with_picture=not skips))

    async def interrupt(request: Request) -> Response:
        """As there, what is painted ends and what waits goes on; where nothing of this client is
        painted, what waits ends, for there whoever interrupts is always being painted for.
        """
        client = client_of(request)
        waiting = [row.job for row in service.rows() if row.job.client == client]
        for job in service.running(client) or waiting:
            service.cancel(job)
        return JSONResponse({})

    async def skip(request: Request) -> Response:
        """A picture ends with its job where it is the last of it: a job's pictures are painted side
        by side, and none ends alone."""
        jobs = service.running(client_of(request))
        at_last = [job for job in jobs if job.n_images - len(job.pictures) <= 1]
        if jobs and not at_last:
            left = jobs[0].n_images - len(jobs[0].pictures)
            raise ProblemError(
                409,
                f"The job has {left} pictures to paint, and none of them ends alone; interrupt "
                "ends it, and it is answered with those that are finished.",
                "not_alone",
            )
        for job in at_last:
            service.cancel(job)
        return JSONResponse(None)

    return [
        Route("/sdapi/v1/options", options, methods=["GET"]),
        Route("/sdapi/v1/options", set_options, methods=["POST"]),
        Route("/sdapi/v1/sd-models", sd_models, methods=["GET"]),
        *(Route(f"/sdapi/v1/{name}", listed, methods=["GET"]) for name in LISTS),
        Route("/sdapi/v1/loras", loras, methods=["GET"]),
        Route("/sdapi/v1/txt2img", txt2img, methods=["POST"]),
        Route("/sdapi/v1/img2img", img2img, methods=["POST"]),
        Route("/sdapi/v1/progress", how_far, methods=["GET"]),
        Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
        Route("/sdapi/v1/skip", skip, methods=["POST"]),
        Route("/sdapi/v1/memory", memory, methods=["GET"]),
        *(
            Route(f"/sdapi/v1/refresh-{name}", refresh, methods=["POST"])
            for name in ("checkpoints", *ALWAYS_FRESH)
        ),
    ]


def _plain(title: str) -> str:
    """A model's name, of the title that it had in the list."""
    return title.partition(" [")[0].removesuffix(".safetensors")


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "title": model.name,
        "model_name": model.name,
        "hash": None,
        "sha256": None,
        "filename": model.name,
        "config": None,
    }


async def _asked(body: Body, service: PaintingService) -> tuple[PaintRequest, list[str]]:
    """The request, and what of it has no effect. Raises `UsageError`, `ProblemError`."""
    prompt, adapters = without_loras(body.text("prompt"))
    settings = body.fields.get("override_settings")
    name = settings.get("sd_model_checkpoint", "") if isinstance(settings, dict) else ""
    model: ServedModel | None = None
    if isinstance(name, str) and name:
        model = await run_in_threadpool(service.catalogue.model, _plain(name))
    usual = await run_in_threadpool(service.resolver.usual_model) if model is None else model
    checkpoint = usual.checkpoint
    of = checkpoint.architecture
    seed = body.whole("seed")
    negative, scale = body.text("negative_prompt"), body.number("cfg_scale")
    guidance = body.number("distilled_cfg_scale")
    takes_guidance = of.takes_guidance or of.guidance_is_cfg
    if guidance is None and takes_guidance:
        guidance = scale
    ignored = [name for name in WITHOUT_EFFECT if body.fields.get(name)]
    # A distilled model would be asked twice a step for it, which nobody meant who sends it always.
    if negative.strip() and not of.guidance_is_cfg:
        ignored.append("negative_prompt")
        negative = ""
    if scale is not None and not takes_guidance:
        ignored.append("cfg_scale")
    width, height = rounded(body.whole("width")), rounded(body.whole("height"))
    if width is not None or height is not None:  # the side that is not said is the model's own
        width, height = width or checkpoint.defaults.width, height or checkpoint.defaults.height
    asked = PaintRequest(
        prompt=prompt,
        model=model,
        width=width,
        height=height,
        n_images=_count(body, "batch_size") * _count(body, "n_iter"),
        steps=body.whole("steps"),
        guidance=guidance,
        seed=None if seed is None or seed < 0 else seed,
        negative_prompt=negative,
        adapters=adapters,
        previews=True,  # who asks for progress wants to see it, and a preview costs a millisecond
        **await extras(body),
    )
    return asked, ignored


def _count(body: Body, name: str) -> int:
    """1 where it is not said. Raises `UsageError`."""
    count = body.whole(name)
    return 1 if count is None else count


def _mask(data: bytes | None, is_inverted: bool) -> bytes | None:
    """A mask as it is read there, as one that is white where it is painted.

    What is opaque is painted where its alpha channel varies, the other way round than everywhere
    else (`create_binary_mask` in modules/processing.py); else what is white. Raises `UsageError`.
    """
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            is_varied = picture.has_transparency_data
            alpha = picture.convert("RGBA").getchannel("A") if is_varied else None
            is_plain = alpha is None or alpha.getextrema() == (255, 255)
            if is_plain and not is_inverted:
                return data
            mask = picture.convert("L") if is_plain or alpha is None else alpha
    except (OSError, SyntaxError, ValueError):
        raise UsageError.about("mask", "can't be read as a picture", "send a PNG") from None
    out = io.BytesIO()
    (ImageOps.invert(mask) if is_inverted else mask).save(out, "PNG")
    return out.getvalue()


def without_loras(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A prompt without its `<lora:NAME:0.8>`, and these. Raises `UsageError`."""
    adapters = []
    for match in LORA.finditer(prompt):
        try:
            adapters.append((match[1], float(match[2] or 1.0)))
        except ValueError:
            raise UsageError.about("prompt", f"has a strength {match[2]} of an adapter") from None
    return " ".join(LORA.sub(" ", prompt).split()) if adapters else prompt, tuple(adapters)


async def _answer(
    request: Request,
    service: PaintingService,
    body: Body,
    asked: PaintRequest,
    ignored: list[str],
) -> Response:
    """What is asked for; of a job that was interrupted, what was there by then.

    As there, whoever interrupts is answered with 200: with the pictures that were finished, or the
    one that was begun, or none. Its clients take an error for a server that is broken.
    """
    job = await service.submit(asked, client_of(request))
    try:
        await pictures_of(request, service, job)
    except ProblemError:
        if job.stage != "cancelled":
            raise

    def reply() -> Response:  # of many pictures it takes a while
        images = [(k, service.pictures.read(name)) for k, name in sorted(job.pictures.items())]
        images = images or unfinished(job)
        said = info(job, asked, body, ignored, [image for image, _ in images])
        encoded = [base64.b64encode(data).decode() for _, data in images]
        return JSONResponse({"images": encoded, "parameters": {}, "info": json.dumps(said)})

    return await run_in_threadpool(reply)
