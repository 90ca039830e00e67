"""What clients of AUTOMATIC1111 read: of a job `info` with its pictures, and how far it is; memory.

Below `automatic1111.py`. Fields are those of its modules/processing.py and modules/api/models.py.
"""

from __future__ import annotations

import base64
import io
import time
from typing import Any

from PIL import Image

from fluxmesh.machine import memory
from fluxmesh_coordinator.server.faces.bodies import Body
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService

SAMPLER = "Euler"


def info(
    job: ServedJob, asked: PaintRequest, body: Body, ignored: list[str], images: list[int]
) -> dict[str, Any]:
    """Of the `images` that are answered; of an interrupted job these are fewer, or none."""
    seeds = [job.seed + image for image in images]
    texts = [
        f"{asked.prompt}\nSteps: {job.steps}, Sampler: {SAMPLER}, Seed: {seed}, "
        f"Size: {job.width}x{job.height}, Model: {job.model}"
        for seed in seeds
    ]
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "seed": next(iter(seeds), job.seed),
        "all_seeds": seeds,
        "width": job.width,
        "height": job.height,
        "sampler_name": SAMPLER,
        "cfg_scale": asked.guidance,
        "steps": job.steps,
        "batch_size": body.whole("batch_size") or 1,
        "denoising_strength": asked.strength,
        "sd_model_name": job.model,
        "infotexts": texts,
        "index_of_first_image": 0,
        "job_timestamp": _timestamp(job),
        "without_effect": ignored,
    }


def unfinished(job: ServedJob) -> list[tuple[int, bytes]]:
    """The image that was seen last of a job that was cancelled, and its PNG at the size asked for.

    What a step showed is small; clients lay a picture where they have room for one of its size.
    """
    seen = job.last_preview
    if seen is None:
        return []
    out = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(seen["data"]))) as picture:
        picture.resize((job.width, job.height), Image.Resampling.BICUBIC).save(out, "PNG")
    return [(seen["image"], out.getvalue())]


def progress(service: PaintingService, client: str, *, with_picture: bool) -> dict[str, Any]:
    """Of the client's own job, or of whichever runs."""
    jobs = service.running(client) or service.running()
    state: dict[str, Any] = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": len(service.rows()),
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    if not jobs:
        return {
            "progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None,
            "textinfo": None,
        }  # fmt: skip
    job = jobs[0]
    seen = job.events.latest("preview") if with_picture else None
    step = job.events.latest("step")
    state |= {"job": job.id, "job_timestamp": _timestamp(job), "sampling_steps": job.steps}
    state["sampling_step"] = step.data["step"] if step else 0
    return {
        "progress": round(job.progress, 4),
        "eta_relative": round(job.seconds_left(time.monotonic()), 2),
        "state": state,
        "current_image": seen.data["data"] if seen else None,
        "textinfo": None,
    }


def memory_here() -> dict[str, Any]:
    """Of the machine that the server is on, in bytes; blocks."""
    total, free = memory.total_bytes(), memory.free_bytes()
    said = "fluxmesh tells of the memory of each host at /api/status."
    return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": {"error": said}}


def _timestamp(job: ServedJob) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.accepted))
