"""A prompt becomes files: what `generate` and `interactive` have in common.

`Painter` finds the checkpoint, builds the request, gives it to the mesh and hands its events to
`paint`, which reports them and writes the pictures. No mesh is looked for until the first picture
is asked for.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.events import Event, Picture, Planned, Step
from fluxmesh.request import GenerateRequest, SourceImage
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, StepFiles, encode_png, grid
from fluxmesh_coordinator.artifacts.recipe import Recipe, SourceFiles, differences
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.generate_report import Reporter

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
    pictures: dict[int, Picture] = {}  # by image: hosts finish them in any order
    planned = recipe.placement
    with closing(events):
        for event in events:
            reporter.event(event)
            if isinstance(event, Planned):
                planned = event.placement
            elif isinstance(event, Step) and event.preview is not None and painting.steps:
                made = replace(recipe.of_image(recipe.seed + event.image), placement=planned)
                data = encode_png(event.preview, made.to_json(step=event.step))
                painting.steps.save(painting.prompt, event.image, event.step, event.steps, data)
            elif isinstance(event, Picture) and painting.files.save_raw:
                made = replace(recipe.of_image(event.seed), placement=event.placement)
                data = encode_png(event.pixels, made.to_json())
                saved.append(painting.files.save(painting.prompt, event.image, data))
                reporter.saved(saved[-1], [event.seed])
            elif isinstance(event, Picture):
                pictures[event.image] = event
    if pictures:
        shown = [pictures[k] for k in sorted(pictures)]
        placements = {picture.placement for picture in shown}
        whole = recipe if len(shown) > 1 else recipe.of_image(recipe.seed)
        whole = replace(whole, placement=placements.pop() if len(placements) == 1 else "mixed")
        sheet = grid([picture.pixels for picture in shown], recipe.n_rows)
        saved.append(painting.files.save(painting.prompt, None, encode_png(sheet, whole.to_json())))
        reporter.saved(saved[-1], [picture.seed for picture in shown])
    return saved


@dataclass(frozen=True)
class Spread:
    """How the user wants work spread over the mesh."""

    placement: Placement | None = None  # None: whichever is fastest
    force_shard: bool = False  # all hosts of a ring work on each image
    wait: float | None = None  # seconds that hosts may take to return


@dataclass(frozen=True)
class Elsewhere:
    """A checkpoint that only hosts of the mesh have."""

    name: str
    defaults: Any  # fluxmesh.weights.checkpoint.ModelDefaults
    revision: str = ""


class Painter:
    """Paints prompt after prompt, on the mesh that is up or one of its own; a context manager."""

    def __init__(
        self, reporter: Reporter, *, keep_warm: bool, spread: Spread | None = None
    ) -> None:
        """`keep_warm`: more prompts are expected, so weights stay where memory allows."""
        self.reporter = reporter
        self.keep_warm = keep_warm
        self.spread = spread or Spread()
        self._mesh: Any = None
        self._hinted = False
        self._checkpoints: dict[str | None, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._mesh is not None:
            self._mesh.close()

    def checkpoint(self, settings: GenerateSettings) -> Any:
        """Name, revision and defaults of the settings' model, or of the default one.

        It is downloaded if it has to be, unless hosts of a mesh have it: what this machine then
        lacks has no revision that it could know.
        """
        # By what was asked: the default stays what it was, whatever is fetched meanwhile.
        if settings.model not in self._checkpoints:
            self._checkpoints[settings.model] = self._find(settings.model)
        return self._checkpoints[settings.model]

    def _find(self, model: str | None) -> Any:
        from fluxmesh.weights import hub

        up = mesh_file.load()
        loaded = up.weights.model if up and up.weights else None
        name = model or loaded or hub.default_model()
        if up is not None and not up.is_this_machine:
            from fluxmesh_coordinator.deploy import what_if

            name, sizes, is_here = what_if.sizes_of(name)
            if not is_here:
                return Elsewhere(name, sizes.defaults)
        return hub.resolve(name, progress=partial(self.reporter.downloading, name))

    def introduce(self, settings: GenerateSettings, seed: int) -> None:
        """Says which model paints, at which size and from which seed; and how to get FLUX."""
        checkpoint = self.checkpoint(settings)
        request = _as_loaded(settings).request("", seed, defaults=checkpoint.defaults)
        size = "" if settings.image else f"{request.height}x{request.width}, "
        bits = f"{request.bits} bits, " if request.bits else ""
        cache = f", approximate: --cache {request.cache:g}" if request.cache else ""
        steps = f"{request.steps} steps"
        self.reporter.note(
            f"Painting with {checkpoint.name} ({size}{bits}{steps}, seed {seed}{cache})."
        )
        if settings.model is None and checkpoint.name == EMBEDDED and not self._hinted:
            self._hinted = True
            self.reporter.note(
                f"{EMBEDDED} is the small checkpoint inside fluxmesh; for FLUX itself, run "
                "`fluxmesh models pull schnell`, or name one with --model."
            )

    def source(
        self, settings: GenerateSettings, checkpoint: Any
    ) -> tuple[SourceImage | None, SourceFiles | None]:
        """What `--image`, `--mask` and `--outpaint` name, as arrays and as a record of files."""
        if settings.image is None:
            return None, None
        from fluxmesh.images import load_source

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
        settings: GenerateSettings,
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
        request = _as_loaded(settings).request(
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
        from fluxmesh.engine import tf32

        tf32.prepare(request.dtype)  # before an agent of our own inherits it
        if self._mesh is None:
            from fluxmesh_coordinator.runtime.mesh import Mesh

            self._mesh = Mesh.connect()
        events: Generator[Event, None, None] = self._mesh.generate(
            request,
            self.spread.placement,
            self.spread.force_shard,
            self.spread.wait,
            keep_warm=self.keep_warm,
        )
        return events


def _as_loaded(settings: GenerateSettings) -> GenerateSettings:
    up = mesh_file.load()
    return settings.as_loaded(up.weights if up else None)
