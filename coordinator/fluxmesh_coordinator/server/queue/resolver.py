"""From what a client asks to what a mesh takes: model, files and defaults looked up, in threads.

It asks `commands/generate.py` as the command line does, for the mesh that is up, and opens none.
Below `service.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from fluxmesh.errors import FluxmeshError
from fluxmesh.sampling.takes import check_takes
from fluxmesh_coordinator.commands.generate import ReadyPrompt
from fluxmesh_coordinator.commands.settings import draw_seed
from fluxmesh_coordinator.server.catalogue import Catalogue, ServedModel
from fluxmesh_coordinator.server.paint_request import PaintRequest, check_area
from fluxmesh_coordinator.server.problems import problem_of
from fluxmesh_coordinator.server.queue.lane import CurrentPainter

LOOKING = 2  # requests whose models and pictures are looked at at once


class RequestResolver:
    """Resolves requests, a few at once: their pictures are unpacked here."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.chosen: ServedModel | None = None  # that a client switched to
        self._painters = CurrentPainter()
        # Always the same ones: what unpacking a large picture leaves behind in a thread's part of
        # the heap is used again by the next, and not left once more in every thread there is.
        self._threads = ThreadPoolExecutor(LOOKING, thread_name_prefix="resolver")

    @property
    def default(self) -> ServedModel | None:
        """What paints where a request names nothing; None: what the mesh holds. Blocks.

        Raises as `Catalogue.model`, `Catalogue.given`.
        """
        if self.chosen is not None:
            return self.catalogue.model(self.chosen.name)  # as its files are now
        return self.catalogue.given

    def usual_model(self) -> ServedModel:
        """The same, also where the mesh decides, or its files are gone: `resolve` tells. Blocks."""
        with contextlib.suppress(FluxmeshError):
            if (default := self.default) is not None:
                return default
        held = self._held()
        known = None if held is None else self.catalogue.find(held)
        return known or self.catalogue.default

    def editor_instead(self) -> ServedModel | None:
        """What edits a picture in the place of a usual model that edits none; None where that one
        was chosen, or no other does. Blocks."""
        if self._held() is not None or self.chosen is not None or self.catalogue.is_given:
            return None
        return self.catalogue.editor

    def _held(self) -> str | None:
        """The model that the mesh was brought up with, if one is up."""
        record = self._painters.get().record
        return record.weights.model if record and record.weights else None

    async def resolve(self, asked: PaintRequest) -> tuple[str, ReadyPrompt]:
        """The model's name as clients say it, and the request as a mesh takes it.

        Raises `ProblemError` with what is wrong, without a path of this machine in it.
        """
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._resolve, asked)
        except FluxmeshError as error:
            said = self.catalogue.without_paths(str(error))
            raise problem_of(error).saying(said) from error

    def close(self) -> None:
        """Blocks until nothing is looked at any more."""
        self._threads.shutdown(cancel_futures=True)
        self._painters.drop()

    def _resolve(self, asked: PaintRequest) -> tuple[str, ReadyPrompt]:
        model = asked.model or self.default
        if model is None and self._held() is None:
            model = self.catalogue.default  # the same for every request, whatever the first one was
            if asked.references and "references" not in model.takes:
                model = self.editor_instead() or model
        if asked.references and model is not None:  # else what reads them might be fetched
            check_takes(("references",), (), model.name, model.reading)
        asked = replace(asked, model=model)
        settings = asked.settings(self.catalogue)
        seed = draw_seed() if asked.seed is None else asked.seed
        with self._painters.holding() as painter:
            ready = painter.resolve(settings, asked.prompt, seed, preview_every=int(asked.previews))
        request = ready.resolved.request
        check_area(request.height, request.width)
        names = dict(zip(settings.adapter, asked.adapters, strict=True))
        recipe = replace(
            ready.recipe,
            adapters=tuple(
                (names[path, scale][0], scale, sha256)
                for path, scale, sha256 in ready.recipe.adapters
            ),
        )  # no path of this machine leaves it
        name = model.name if model else ready.resolved.model.name
        return name, replace(ready, recipe=recipe)
