"""A server for tests: the real application, its line and its folder, on a lane without a mesh; and
what its clients send and read."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from fluxmesh.errors import FluxmeshError
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.runtime.resolved import Resolved
from fluxmesh_coordinator.server.app import application
from fluxmesh_coordinator.server.catalogue import Catalogue
from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.guard.limits import BodyLimits
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.fair_queue import QueueBounds
from fluxmesh_coordinator.server.queue.journal import JobRecord, Journal
from fluxmesh_coordinator.server.queue.lane import Lane, Tell, preview
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from fluxmesh_coordinator.server.queue.service import PaintingService

ADDRESS = "http://127.0.0.1:8420"
JSON = {"content-type": "application/json"}


def record(id: str, n_images: int = 1) -> JobRecord:
    """Of a job, for a journal that has nothing to do with a server."""
    return JobRecord(
        id=id, fingerprint="", model="tiny", seed=7, n_images=n_images, height=128, width=128,
        steps=4, accepted=2e9,
    )  # fmt: skip


class SimulatedLane(Lane):
    """Paints grey pictures, as fast as it may: while `may_go` is cleared it waits in a step."""

    def __init__(self, pictures: PictureFolder) -> None:
        super().__init__(pictures)
        self.may_go = threading.Event()
        self.may_go.set()
        self.painted: list[ServedJob] = []  # in the order in which they began
        self.fails: FluxmeshError | None = None
        self.seconds = 0.001  # a step
        self.hurries = threading.Event()  # once it is set, no step takes so long

    def open(self) -> None:
        """There is no mesh."""

    def close(self) -> None:
        self.may_go.set()
        super().close()

    def statuses(self) -> None:
        return None

    def paint(self, job: ServedJob, tell: Tell) -> None:
        assert job.ready is not None
        self.painted.append(job)
        if self.fails is not None:
            raise self.fails
        tell("planned", {"placement": "data", "hosts": [0], "seconds": 0.1})
        for image in [k for first, part in job.parts() for k in _images(first, part)]:
            pixels = np.full((job.height, job.width, 3), 40 * image, np.uint8)
            for step in range(1, job.steps + 1):
                while not self.may_go.wait(0.01):
                    if job.is_cancelled:
                        return
                if job.is_cancelled:
                    return
                self.hurries.wait(self.seconds)
                tell("step", {"image": image, "step": step, "steps": job.steps})
                if job.previews:
                    tell("preview", preview(image, step, pixels))
            recipe = job.ready.recipe.of_image(job.seed + image)
            data = encode_png(pixels, recipe.to_json())
            name = self.pictures.commit(job.id, job.accepted, image, data)
            tell("picture", job.picture_told(image, name))


def _images(first: int, part: Resolved) -> range:
    return range(first, first + part.request.n_images)


class Serving:
    """A server and a client of it; `lane` is what paints."""

    def __init__(
        self, folder: Path, bounds: QueueBounds | None = None, *, model: str | None = "tiny"
    ) -> None:
        self.folder = folder
        self.adapters = folder / "adapters"
        self.adapters.mkdir(exist_ok=True)
        self.pictures = PictureFolder(folder / "pictures")
        self.lane = SimulatedLane(self.pictures)
        self.service = PaintingService(
            Catalogue(model, self.adapters),
            self.pictures,
            Journal(folder / "journal"),
            bounds=bounds,
            lanes=[self.lane],
        )

    def app(self, access: Access, limits: BodyLimits | None = None) -> Starlette:
        """The application, whose line lives as long as it does."""

        @asynccontextmanager
        async def life(_app: Any) -> AsyncIterator[None]:
            await self.service.open()
            try:
                yield
            finally:
                await self.service.close()

        inner = application(self.service, access, limits)
        return Starlette(routes=[Mount("/", inner)], lifespan=life)

    def app_alone(self) -> Starlette:
        """The application, for who opens and closes the line."""
        return application(self.service, Access.of(None))

    @contextmanager
    def client(
        self, access: Access | None = None, limits: BodyLimits | None = None, **more: Any
    ) -> Iterator[TestClient]:
        """As a program on this machine asks."""
        app = self.app(access or Access.of(None), limits)
        with TestClient(app, base_url=ADDRESS, **more) as client:
            yield client


def png(width: int = 128, height: int = 128, alpha: bool = False) -> bytes:
    pixels = np.full((height, width, 4), 255, np.uint8)
    pixels[: height // 2, :, 3] = 0
    out = io.BytesIO()
    Image.fromarray(pixels if alpha else pixels[:, :, :3]).save(out, "PNG")
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def sse(body: str) -> list[dict[str, str]]:
    """Server-sent events: a field by its name, an event a dictionary; comments left out."""
    events = []
    for block in body.split("\n\n"):
        lines = [line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")]
        if lines:
            events.append({line[0]: line[1] for line in lines})
    return events


def wait_until_running(serving: Serving) -> None:
    limit = time.monotonic() + 60
    while not serving.lane.painted:
        assert time.monotonic() < limit
        time.sleep(0.005)


def in_thread(send: Callable[[], Any]) -> Callable[[], Any]:
    """Sends a request beside others; what it returns waits for the answer."""
    return ThreadPoolExecutor(1).submit(send).result


def serving_thread(client: TestClient, path: str, fields: dict[str, Any]) -> Any:
    """As `in_thread`, JSON to a path."""
    return in_thread(lambda: client.post(path, json=fields))
