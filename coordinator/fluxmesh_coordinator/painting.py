"""A prompt becomes files: what `generate` and `interactive` have in common.

`Painter` finds the checkpoint, builds the request, drives the runner and hands its events to
`paint`, which reports them and writes the pictures. Nothing is imported that computes until the
first picture is asked for.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.events import Event, Picture, Step
from fluxmesh.request import GenerateRequest, SourceImage
from fluxmesh_coordinator.output import PictureFiles, StepFiles, encode_png, grid
from fluxmesh_coordinator.recipe import Recipe, SourceFiles, differences
from fluxmesh_coordinator.reporting import Reporter
from fluxmesh_coordinator.settings import Settings

EMBEDDED = "tiny"
# Image-to-image without a size scales a picture down to this many times the model's own area.
SOURCE_AREA = 2.25


@dataclass(frozen=True)
class Painting:
    """Where one prompt's pictures go, and what is written into them."""

    recipe: Recipe  # of all images of the request
    files: PictureFiles
    prompt: int = 0  # the prompt's number in this call, from 0
    steps: StepFiles | None = None  # where each step's picture goes


def paint(
    events: Generator[Event, None, None], painting: Painting, reporter: Reporter
) -> list[Path]:
    """Follows `events` to their end; returns the files, each written as soon as it is complete.

    When it is interrupted, the generator is closed and the raw images that were complete stay;
    nothing else is left.
    """
    recipe = painting.recipe
    saved: list[Path] = []
    pictures: list[np.ndarray] = []
    with closing(events):
        for event in events:
            reporter.event(event)
            if isinstance(event, Step) and event.preview is not None and painting.steps:
                text = recipe.of_image(recipe.seed + event.image).to_json(step=event.step)
                data = encode_png(event.preview, text)
                painting.steps.save(painting.prompt, event.image, event.step, event.steps, data)
            elif isinstance(event, Picture) and painting.files.save_raw:
                data = encode_png(event.pixels, recipe.of_image(event.seed).to_json())
                saved.append(painting.files.save(painting.prompt, event.image, data))
                reporter.saved(saved[-1], [event.seed])
            elif isinstance(event, Picture):
                pictures.append(event.pixels)
    if pictures:
        whole = recipe if len(pictures) > 1 else recipe.of_image(recipe.seed)
        data = encode_png(grid(pictures, recipe.n_rows), whole.to_json())
        saved.append(painting.files.save(painting.prompt, None, data))
        reporter.saved(saved[-1], [recipe.seed + k for k in range(len(pictures))])
    return saved


class Painter:
    """Paints prompt after prompt in this process, and keeps what it has loaded."""

    def __init__(self, reporter: Reporter, *, keep_warm: bool) -> None:
        """`keep_warm`: more prompts are expected, so weights stay where memory allows."""
        self.reporter = reporter
        self.keep_warm = keep_warm
        self._runner: Any = None
        self._hinted = False
        self._checkpoints: dict[str | None, Any] = {}

    def checkpoint(self, settings: Settings) -> Any:
        """The settings' checkpoint, downloaded if it has to be; the default one where unnamed."""
        from fluxmesh.flux import hub

        # By what was asked: the default stays what it was, whatever is fetched meanwhile.
        if settings.model not in self._checkpoints:
            name = settings.model or hub.default_model()
            self._checkpoints[settings.model] = hub.resolve(
                name, progress=partial(self.reporter.downloading, name)
            )
        return self._checkpoints[settings.model]

    def introduce(self, settings: Settings, seed: int) -> None:
        """Says which model paints, at which size and from which seed; and how to get FLUX."""
        checkpoint = self.checkpoint(settings)
        request = settings.request("", seed, defaults=checkpoint.defaults)
        size = "" if settings.image else f"{request.height}x{request.width}, "
        self.reporter.note(
            f"Painting with {checkpoint.name} ({size}{request.steps} steps, seed {seed})."
        )
        if settings.model is None and checkpoint.name == EMBEDDED and not self._hinted:
            self._hinted = True
            self.reporter.note(
                f"{EMBEDDED} is the small checkpoint inside fluxmesh; for FLUX itself, run "
                "`fluxmesh models pull schnell`, or name one with --model."
            )

    def source(
        self, settings: Settings, checkpoint: Any
    ) -> tuple[SourceImage | None, SourceFiles | None]:
        """What `--image`, `--mask` and `--outpaint` name, as arrays and as a record of files."""
        if settings.image is None:
            return None, None
        from fluxmesh.canvas import load_source

        height, width = settings.image_size or (None, None)
        defaults = checkpoint.defaults
        # Where parts stay as they are, they stay at their size too, unless the user gave one.
        keeps = settings.mask is not None or settings.outpaint is not None
        area = None if keeps else int(SOURCE_AREA * defaults.height * defaults.width)
        source = load_source(
            settings.image,
            mask=settings.mask,
            outpaint=settings.outpaint,
            strength=settings.strength,
            height=height,
            width=width,
            max_area=area,
        )
        painted = "x".join(map(str, source.pixels.shape[:2]))
        self.reporter.note(f"{settings.image} becomes {painted} pixels.")
        files = SourceFiles.of(
            settings.image,
            source.strength,
            settings.mask,
            settings.outpaint,
            sized=settings.image_size is not None,
        )
        return source, files

    def paint(
        self,
        settings: Settings,
        prompt: str,
        seed: int,
        files: PictureFiles,
        *,
        number: int = 0,
        steps: StepFiles | None = None,
        told: Recipe | None = None,
    ) -> list[Path]:
        """Paints `prompt` (number `number` of this call), and returns the files.

        `told` is the recipe of the picture that is made again: doubts about it are noted.
        """
        checkpoint = self.checkpoint(settings)
        source, source_files = self.source(settings, checkpoint)
        request = settings.request(
            prompt,
            seed,
            model=checkpoint.name,
            defaults=checkpoint.defaults,
            stepwise=steps is not None,
            source=source,
        )
        recipe = Recipe.of(request, checkpoint.revision, source_files, settings.n_rows)
        for doubt in differences(told, recipe) if told else []:
            self.reporter.note(doubt)
        self.reporter.started(request, {"name": checkpoint.name, "revision": checkpoint.revision})
        events = self._start(request)
        return paint(events, Painting(recipe, files, number, steps), self.reporter)

    def _start(self, request: GenerateRequest) -> Generator[Event, None, None]:
        from fluxmesh.flux import precision

        precision.prepare(request.dtype)
        if self._runner is None:
            from fluxmesh.flux.runner import Runner

            self._runner = Runner(keep_warm=self.keep_warm, on_loading=self.reporter.event)
        events: Generator[Event, None, None] = self._runner.run(request)
        return events
