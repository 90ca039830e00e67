"""A prompt becomes files: what `generate` and `interactive` have in common.

`Painter.resolve` looks at mesh, model and files, once, and fills in what the user left open;
`Painter.paint` gives the result to the mesh and hands its events to `paint`, which reports them and
writes the pictures. No host is asked anything before the first picture, unless neither user nor
mesh names a model.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.errors import UsageError
from fluxmesh.events import Encoded, Event, Picture, Planned, Step
from fluxmesh.request import MAX_REFERENCES, FilledRequest, GenerateRequest, SourceImage
from fluxmesh.spelling import nearest
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, StepFiles, encode_png, grid
from fluxmesh_coordinator.artifacts.recipe import (
    ConditionFiles,
    NamedFile,
    Recipe,
    SourceFiles,
    differences,
)
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.generate_report import Reporter

if TYPE_CHECKING:
    from fluxmesh.models.base import ModelDefaults
    from fluxmesh_coordinator.agents.mesh_file import MeshRecord
    from fluxmesh_coordinator.runtime.default_model import DefaultModel
    from fluxmesh_coordinator.runtime.lent_hosts import LentHosts
    from fluxmesh_coordinator.runtime.mesh import Mesh
    from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel

EMBEDDED = "tiny"
LIKE_A_SLIP = 0.8  # likeness of two words, from which on one may be meant by the other
# Image-to-image without a size scales a picture down to this many times the model's own area.
SOURCE_AREA = 2.25
# Where parts of a picture stay as they are (a mask, margins), it stays at its own size up to the
# largest that FLUX.1 was made for, two megapixels; a photo of twelve would take hours, and what is
# painted at such a size is no good. `image_size` says otherwise.
KEPT_AREA = 2 << 20


@dataclass(frozen=True)
class Painting:
    """Where one prompt's pictures go, and what is written into them."""

    ready: ReadyPrompt
    files: PictureFiles
    prompt: int = 0  # the prompt's number in this call, from 0
    steps: StepFiles | None = None  # where each step's picture goes

    def png(self, pixels: np.ndarray, recipe: Recipe, **more: int) -> bytes:
        """A file of these pixels; `more` is added to what its recipe says."""
        return encode_png(pixels, recipe.to_json(**more) if self.ready.has_metadata else None)


def paint(
    events: Generator[Event, None, None], painting: Painting, reporter: Reporter
) -> list[Path]:
    """Follows `events` to their end; returns the files, each written as soon as it is complete.

    When it is interrupted, the generator is closed and the raw images that were complete stay;
    nothing else is left.
    """
    recipe = painting.ready.recipe  # of all images of the request
    saved: list[Path] = []
    pictures: dict[int, Picture] = {}  # by image: hosts finish them in any order
    planned = recipe.placement
    with closing(events):
        for event in events:
            reporter.event(event)
            if isinstance(event, Planned):
                planned = event.placement
            elif isinstance(event, Encoded):
                recipe = painting.ready.recipe_read(event)
            elif isinstance(event, Step) and event.preview is not None and painting.steps:
                made = replace(recipe.of_image(recipe.seed + event.image), placement=planned)
                data = painting.png(event.preview, made, step=event.step)
                painting.steps.save(painting.prompt, event.image, event.step, event.steps, data)
            elif isinstance(event, Picture) and painting.files.save_raw:
                made = replace(recipe.of_image(event.seed), placement=event.placement)
                data = painting.png(event.pixels, made)
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
        saved.append(painting.files.save(painting.prompt, None, painting.png(sheet, whole)))
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
    has_metadata: bool = True  # whether the pictures tell it

    def recipe_read(self, encoded: Encoded) -> Recipe:
        """The recipe, once it is known which files the hosts have read."""
        return replace(self.recipe, revision=self.resolved.model.revision_read(encoded))

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
        self._beginning = threading.Lock()  # a server asks from several threads
        self._record: MeshRecord | None = None  # of the mesh that is up
        self._has_looked = False  # for one
        self._told_words: set[str] = set()  # that the embedded checkpoint does not know
        self._models: dict[str, ResolvedModel] = {}
        self._defaults: dict[Any, DefaultModel] = {}  # by what requests give beside a prompt
        self._default: DefaultModel | None = None  # the latest of them

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

    def model(
        self, asked: str | None, request: GenerateRequest, *, paints_into: bool = False
    ) -> ResolvedModel:
        """The model of that name; None: what the mesh has loaded, or the best for the request.

        `paints_into` as `default_model` has it. It is downloaded if it has to be, unless hosts of a
        mesh have it; its licence is told first.
        """
        from fluxmesh_coordinator.runtime.resolved import ResolvedModel

        loaded = self.record.weights.model if self.record and self.record.weights else None
        name = loaded if asked is None else asked
        if name is None:
            return ResolvedModel.of(self._standing_in(request, paints_into=paints_into).checkpoint)
        known = self._models.get(name)
        if known is None or known.is_changed:  # a server outlives a model's files
            self._models[name] = ResolvedModel.for_mesh(
                name, self.record, self.reporter.downloading, self.reporter.note
            )
        return self._models[name]

    def reads(self, settings: GenerateSettings) -> tuple[str, int]:
        """The model for these settings' references, and how many it reads: 0 where it reads none by
        itself, nor with what is here.

        Where none is named, one that reads fewer goes before an embedded one. Raises as `model`
        does.
        """
        from fluxmesh.sampling.takes import read_here
        from fluxmesh.weights.embedded.checkpoints import embedded_names

        def model_for(count: int) -> ResolvedModel:
            some = replace(settings, reference=settings.reference[:count])
            blank = [np.zeros((128, 128, 3), np.uint8)] * len(some.reference)
            asked = some.request("", 0, model=settings.model or "", references=blank)
            return self.model(settings.model, asked, paints_into=_paints_into(settings))

        model = model_for(min(len(settings.reference), MAX_REFERENCES))
        if settings.model is None and model.name in embedded_names():
            model = model_for(1)
        reading = read_here(model.sizes.architecture, settings.redux or "")
        return model.name, reading.most_references if "references" in reading.takes else 0

    def _standing_in(self, request: GenerateRequest, *, paints_into: bool) -> DefaultModel:
        """What is taken where neither user nor mesh names a model.

        For all requests that give the same beside a prompt it stays what it was, whatever is
        fetched meanwhile.
        """
        from fluxmesh_coordinator.runtime.default_model import default_model, view_of_mesh

        kind = (request.conditions, len(request.references), request.adapters, paints_into)
        known = self._defaults.get(kind)
        if known is None or known.checkpoint.stamps.changed is not None:
            is_elsewhere = self.record is not None and not self.record.is_this_machine
            view_of = view_of_mesh(self.mesh) if is_elsewhere else None
            self._defaults[kind] = default_model(request, view_of, paints_into=paints_into)
        self._default = self._defaults[kind]
        return self._default

    def resolve(
        self,
        settings: GenerateSettings,
        prompt: str,
        seed: int,
        *,
        stepwise: bool = False,
        preview_every: int = 0,
    ) -> ReadyPrompt:
        """Finds mesh, model and files of a prompt, each once, and fills in what is left open.

        Says which model paints, at which size and from which seed; and how to get FLUX.
        """
        from fluxmesh.sampling.takes import check_published
        from fluxmesh_coordinator.runtime.resolved import Resolved

        references, control, conditions = read_conditions(settings)

        def asked(settings: GenerateSettings, source: SourceImage | None = None) -> GenerateRequest:
            return settings.request(
                prompt,
                seed,
                model=settings.model or "",
                stepwise=stepwise,
                preview_every=preview_every,
                source=source,
                references=references,
                control=control,
            )

        check_published(asked(settings))  # before a model is fetched that is of no use
        model = self.model(settings.model, asked(settings), paints_into=_paints_into(settings))
        settings = settings.as_loaded(self.record.weights if self.record else None)
        source, files = self._source(settings, model.sizes.defaults)
        resolved = Resolved.of(
            asked(settings, source), model, self.reporter.downloading, self.reporter.note
        ).complete()
        self._tell_fitted(settings, references, resolved.request)
        self._introduce(resolved, is_default=settings.model is None)
        for note in resolved.notes:
            self.reporter.note(note)
        if settings.no_t5_padding and model.sizes.architecture.always_pads:
            self.reporter.note(
                f"`t5_padding` has no effect: {model.name} reads every prompt padded."
            )
        filled = resolved.request
        calls = resolved.model.sizes.architecture.calls(filled.guidance, filled.cfg)
        if settings.negative_prompt and calls < 2:
            self.reporter.note(
                "`negative_prompt` has no effect: only a `cfg` above 1 moves away from it."
            )
        recipe = Recipe.of(resolved, files, settings.n_rows, conditions)
        return ReadyPrompt(resolved, recipe, not settings.no_metadata)

    def _introduce(self, resolved: Resolved, *, is_default: bool) -> None:
        request, name = resolved.request, resolved.model.name
        bits = f"{request.bits} bits, " if request.bits else ""
        if request.text_bits not in (None, request.bits):
            bits += f"text encoder {request.text_bits} bits, "
        cache = f", approximate: `cache` {request.cache:g}" if request.cache else ""
        steps = f"{request.steps} steps"
        if request.cfg > 1:
            steps += f" of two calls each, `cfg` {request.cfg:g}"
        self.reporter.note(
            f"Painting with {name} ({_size(request)}, {bits}{steps}, seed {request.seed}{cache})."
        )
        if is_default and self._default is not None:
            self.reporter.hint(f"default {self._default.name}", self._default.sentence)

    def _tell_unknown(self, prompt: str, model: str) -> None:
        """Words that an embedded checkpoint can't read, each once, with one that it can."""
        from fluxmesh.weights.embedded.checkpoints import embedded_names, folder_of
        from fluxmesh.weights.embedded.words import THINGS, known_words, unknown_words

        if model not in embedded_names():
            return
        words = unknown_words(prompt, folder_of(model))
        new = [word for word in words if word not in self._told_words]
        self._told_words.update(new)
        if new:
            known = list(known_words())
            near = {word: nearest(word, known, LIKE_A_SLIP) for word in new}
            said = [f'"{word}"' + (f" ({near[word]}?)" if near[word] else "") for word in new]
            text = " ".join(new)
            editor = next(
                (n for n in embedded_names() if not unknown_words(text, folder_of(n))), ""
            )
            if editor:
                self.reporter.note(
                    f"{model} does not know {', '.join(said)}. {editor} does, which edits the "
                    f"picture that `reference` names: `fluxmesh models show {editor}` tells how "
                    "to ask."
                )
                return
            self.reporter.note(
                f"{model} does not know {', '.join(said)}: it paints "
                f"{len(THINGS)} everyday things, which `fluxmesh models show "
                f"{model}` lists."
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
        area = int(SOURCE_AREA * defaults.height * defaults.width)
        area = max(area, KEPT_AREA) if keeps else area
        source = load_source(
            settings.image,
            mask=settings.mask,
            outpaint=settings.outpaint,
            strength=settings.strength,
            height=height,
            width=width,
            max_area=area,
            tell=self.reporter.note,
        )
        if keeps and settings.image_size is None:
            self._tell_scaled(settings, source)
        files = SourceFiles.of(
            settings.image,
            source.strength,
            settings.mask,
            settings.outpaint,
            sized=settings.image_size is not None,
        )
        return source, files

    def _tell_fitted(
        self, settings: GenerateSettings, pictures: Sequence[np.ndarray], request: FilledRequest
    ) -> None:
        """The references that the model reads at another size than they have."""
        for (file, _), picture, fitted in zip(
            settings.reference, pictures, request.references, strict=True
        ):
            sizes = [f"{each.shape[0]}x{each.shape[1]}" for each in (fitted, picture)]
            if sizes[0] != sizes[1]:
                name = "The reference" if isinstance(file, bytes) else file
                self.reporter.note(f"{name} is read at {sizes[0]} pixels; it has {sizes[1]}.")

    def _tell_scaled(self, settings: GenerateSettings, source: SourceImage) -> None:
        """That a picture of which parts stay is painted smaller than it is, and how it is not."""
        from fluxmesh.images import canvas_size

        assert settings.image is not None
        height, width = canvas_size(settings.image, settings.outpaint)
        if height * width > KEPT_AREA and source.pixels.shape[0] < height:
            self.reporter.note(
                f"A picture of {height}x{width} would take long: it is painted at "
                f"{source.pixels.shape[0]}x{source.pixels.shape[1]}; `image_size` says otherwise."
            )

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
        if not request.adapters:  # an adapter brings words of its own
            self._tell_unknown(request.prompt, model.name)
        for doubt in differences(earlier, recipe) if earlier else []:
            self.reporter.note(doubt)
        self.reporter.started(request, {"name": model.name, "revision": model.revision})
        events = self.start(ready.resolved)
        return paint(events, Painting(ready, files, number, steps), self.reporter)

    @property
    def mesh(self) -> Mesh:
        """The mesh that is up, or one of this machine, which begins now and ends with us."""
        with self._beginning:
            if self._mesh is None:
                from fluxmesh_coordinator.runtime.mesh import Mesh

                self._mesh = Mesh.of_user(self.record)
            return self._mesh

    def start(
        self,
        resolved: Resolved,
        spread: Spread | None = None,
        lent: LentHosts | None = None,
    ) -> Generator[Event, None, None]:
        """Has a request painted; `spread` is this one's, where it is not the painter's own.

        `lent` as of `Mesh.paint`.
        """
        from fluxmesh.engine import tf32

        tf32.prepare(resolved.request.dtype)  # before an agent of our own inherits it
        spread = spread or self.spread
        return self.mesh.paint(
            resolved,
            spread.placement,
            spread.force_shard,
            spread.wait,
            keep_warm=self.keep_warm,
            lent=lent,
        )


def read_conditions(
    settings: GenerateSettings,
) -> tuple[list[np.ndarray], np.ndarray | None, ConditionFiles]:
    """The pixels of references and control picture, and the record of their files.

    Of `control_from` the edges are found here. Raises `UsageError` for a file that is no picture,
    and for a map that a published model does not take, or does not follow edges.
    """
    if not settings.reference and settings.control is None and settings.control_from is None:
        return [], None, ConditionFiles()
    from fluxmesh.images import read_picture

    control, source = settings.control, settings.control_from
    if control is not None and source is not None:
        raise UsageError("`control` and `control_from` both give a map; choose one.")
    references = [read_picture(file, "reference") for file, _ in settings.reference]
    pixels = None if control is None else read_picture(control, "control")
    if source is not None:
        from fluxmesh.images.edges import edges_of
        from fluxmesh.sampling.takes import check_published

        picture = read_picture(source, "control_from")
        name = settings.model or ""
        asked = settings.request("", 0, model=name, references=references, control=picture)
        check_published(asked)  # before OpenCV is asked for, which may have to be fetched
        pixels = edges_of(picture)
    return (
        references,
        pixels,
        ConditionFiles(
            tuple(NamedFile.of(file) for file, _ in settings.reference),
            None if control is None else NamedFile.of(control),
            None if source is None else NamedFile.of(source),
        ),
    )


def _paints_into(settings: GenerateSettings) -> bool:
    """Whether a part of a picture is painted."""
    has_mask = settings.mask is not None or settings.outpaint is not None
    return settings.image is not None and has_mask


def _size(request: FilledRequest) -> str:
    return f"{request.height}x{request.width}"
