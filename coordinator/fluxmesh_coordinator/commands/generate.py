"""A prompt becomes files: what `generate` and `interactive` have in common.

`Painter.resolve` looks at mesh, model and files, once, and fills in what the user left open;
`Painter.paint` gives the result to the mesh and hands its events to `paint`, which reports them and
writes the pictures. No host is asked anything before the first picture.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.events import Event, Picture, Planned, Step
from fluxmesh.request import FilledRequest, SourceImage
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, StepFiles, encode_png, grid
from fluxmesh_coordinator.artifacts.recipe import Recipe, SourceFiles, differences
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.generate_report import Reporter

if TYPE_CHECKING:
    from fluxmesh.weights.checkpoint import ModelDefaults
    from fluxmesh_coordinator.agents.mesh_file import MeshRecord
    from fluxmesh_coordinator.runtime.mesh import Mesh
    from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel

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
class ReadyPrompt:
    """A prompt that is ready for the mesh, and the recipe that its pictures will tell."""

    resolved: Resolved
    recipe: Recipe

    def with_prompt(self, prompt: str) -> Self:
        """Another prompt, painted in the same way."""
        resolved = self.resolved.with_prompt(prompt)
        return replace(self, resolved=resolved, recipe=replace(self.recipe, prompt=prompt))


class Painter:
    """Paints prompt after prompt, on the mesh that is up or one of its own; a context manager."""

    def __init__(
        self, reporter: Reporter, *, keep_warm: bool, spread: Spread | None = None
    ) -> None:
        """`keep_warm`: more prompts are expected, so weights stay where memory allows."""
        self.reporter = reporter
        self.keep_warm = keep_warm
        self.spread = spread or Spread()
        self._mesh: Mesh | None = None
        self._record: MeshRecord | None = None  # of the mesh that is up
        self._has_looked = False  # for one
        self._hinted = False
        self._models: dict[str | None, ResolvedModel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._mesh is not None:
            self._mesh.close()

    @property
    def record(self) -> MeshRecord | None:
        """The mesh that was up when it was first asked for; None: there was none."""
        if not self._has_looked:
            self._record = mesh_file.load()
            self._has_looked = True
        return self._record

    def model(self, asked: str | None) -> ResolvedModel:
        """The model of that name; None: what the mesh has loaded, or the default one.

        It is downloaded if it has to be, unless hosts of a mesh have it.
        """
        # By what was asked: the default stays what it was, whatever is fetched meanwhile.
        if asked not in self._models:
            from fluxmesh.weights import hub
            from fluxmesh_coordinator.runtime.resolved import ResolvedModel

            loaded = self.record.weights.model if self.record and self.record.weights else None
            name = asked or loaded
            if name is None:
                self._models[asked] = ResolvedModel.of(hub.default_checkpoint())
            else:
                self._models[asked] = ResolvedModel.for_mesh(
                    name, self.record, self.reporter.downloading
                )
        return self._models[asked]

    def resolve(
        self, settings: GenerateSettings, prompt: str, seed: int, *, stepwise: bool = False
    ) -> ReadyPrompt:
        """Finds mesh, model and files of a prompt, each once, and fills in what is left open.

        Says which model paints, at which size and from which seed; and how to get FLUX.
        """
        from fluxmesh_coordinator.runtime.resolved import Resolved

        model = self.model(settings.model)
        settings = settings.as_loaded(self.record.weights if self.record else None)
        source, files = self._source(settings, model.sizes.defaults)
        asked = settings.request(prompt, seed, stepwise=stepwise, source=source)
        resolved = Resolved.of(asked, model)
        self._introduce(resolved, is_default=settings.model is None)
        if source is not None:
            name = "The picture" if isinstance(settings.image, bytes) else settings.image
            self.reporter.note(f"{name} becomes {_size(resolved.request)} pixels.")
        return ReadyPrompt(resolved, Recipe.of(resolved, files, settings.n_rows))

    def _introduce(self, resolved: Resolved, *, is_default: bool) -> None:
        request, name = resolved.request, resolved.model.name
        size = "" if request.source is not None else f"{_size(request)}, "
        bits = f"{request.bits} bits, " if request.bits else ""
        cache = f", approximate: --cache {request.cache:g}" if request.cache else ""
        steps = f"{request.steps} steps"
        self.reporter.note(
            f"Painting with {name} ({size}{bits}{steps}, seed {request.seed}{cache})."
        )
        if is_default and name == EMBEDDED and not self._hinted:
            self._hinted = True
            self.reporter.note(
                f"{EMBEDDED} is the small checkpoint inside fluxmesh; for FLUX itself, run "
                "`fluxmesh models pull schnell`, or name one with --model."
            )

    def _source(
        self, settings: GenerateSettings, defaults: ModelDefaults
    ) -> tuple[SourceImage | None, SourceFiles | None]:
        """What `--image`, `--mask` and `--outpaint` name, as arrays and as a record of files."""
        if settings.image is None:
            return None, None
        from fluxmesh.images import load_source

        height, width = settings.image_size or (None, None)
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
        ready: ReadyPrompt,
        files: PictureFiles,
        *,
        number: int = 0,
        steps: StepFiles | None = None,
        earlier: Recipe | None = None,
    ) -> list[Path]:
        """Paints a prompt (number `number` of this call), and returns the files.

        `earlier` is the recipe of the picture that is made again: doubts about it are noted.
        """
        request, model, recipe = ready.resolved.request, ready.resolved.model, ready.recipe
        for doubt in differences(earlier, recipe) if earlier else []:
            self.reporter.note(doubt)
        self.reporter.started(request, {"name": model.name, "revision": model.revision})
        events = self._start(ready.resolved)
        return paint(events, Painting(recipe, files, number, steps), self.reporter)

    def _start(self, resolved: Resolved) -> Generator[Event, None, None]:
        from fluxmesh.engine import tf32

        tf32.prepare(resolved.request.dtype)  # before an agent of our own inherits it
        if self._mesh is None:
            from fluxmesh_coordinator.runtime.mesh import Mesh

            self._mesh = Mesh.of_user(self.record)
        return self._mesh.paint(
            resolved,
            self.spread.placement,
            self.spread.force_shard,
            self.spread.wait,
            keep_warm=self.keep_warm,
        )


def _size(request: FilledRequest) -> str:
    return f"{request.height}x{request.width}"
