"""What is typed at `fluxmesh interactive`: a line is a prompt, or a setting if it begins with /.

A mistake or a failed picture is told, and the conversation goes on. Ctrl-C stops the picture that
is being painted; at the prompt it drops what was typed, and the second one in a row ends the
conversation, as Ctrl-D does.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.spelling import did_you_mean
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import Home
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, PicturePath
from fluxmesh_coordinator.cli.parameters.types import Adapter, ImageSize, Margins, ScaledPicture
from fluxmesh_coordinator.commands.generate import Painter, Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings, draw_seed
from fluxmesh_coordinator.console.generate_report import GenerateTerminalReporter
from fluxmesh_coordinator.console.line_editor import LineEditor, path_choices

PROMPT = "fluxmesh> "
HELP = """\
Type a prompt to paint it. A line that begins with / changes a setting until it is changed again:
  /model schnell   the checkpoint                  /size 128x192  height and width in pixels
  /steps 8         denoising steps                 /seed 7        where the noise comes from
  /n 4             images a prompt                 /guidance 3.5  for models that take it
  /cache 0.1       approximate and faster; 0 is off
  /adapter dog.safetensors:0.8                     one LoRA or several
  /image photo.png begin from this picture         /strength 0.6  how much of it is painted over
  /mask mask.png   paint where this is white       /outpaint 0,0,64,0  left, top, right, bottom
  /reference a.png b.png@0.8   pictures that prompts speak of; last: the picture painted last
  /control map.png edges or depth to follow        /control-from photo.png  follow its edges
  /negative blur   what to be without              /cfg 4         how strongly
  again, but at night          paints "at night" of the picture painted last
With no value, a setting goes back to what it is by itself (a seed is drawn for each prompt).
  /settings        what they are now
  /quit            the end (Ctrl-D, or Ctrl-C twice)
Tab completes, the arrows bring back what was typed before, also in earlier sessions."""
PATH_COMMANDS = ("/image", "/mask", "/control", "/control-from", "/adapter")
AGAIN_BUT = re.compile(r"again,?\s+but\s+(?P<change>.+)", re.IGNORECASE | re.DOTALL)
LAST = "last"  # instead of a path: the picture that was painted last
AGAIN = "Ctrl-C again, Ctrl-D or /quit ends."


class PicturePathType(click.ParamType):
    """A picture that can be read."""

    name = "PATH"

    def __init__(self, field: str) -> None:
        """`field` is the setting's, which an error names."""
        self.field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from fluxmesh.images import read_picture

        path = os.path.expanduser(str(value))
        read_picture(path, self.field)
        return path


class References(click.ParamType):
    """Pictures that can be read, or `last`, each with its strength; a path with spaces stands in
    quotes."""

    name = "PATH[@STRENGTH] ..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, float], ...]:
        read, references = PicturePathType("reference").convert, []
        for word in _words(self, value, param, ctx):
            path, strength = ScaledPicture().convert(word, param, ctx)
            references.append((path if path == LAST else read(path, param, ctx), strength))
        return tuple(references)


def _words(
    kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None
) -> list[str]:
    try:
        return shlex.split(str(value))
    except ValueError:
        kind.fail(f"{value!r} has a quote that is not closed.", param, ctx)


class Adapters(click.ParamType):
    """LoRA files, each with its strength; a path with spaces stands in quotes."""

    name = "PATH[:SCALE] ..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, float], ...]:
        words = _words(self, value, param, ctx)
        adapters = tuple(Adapter().convert(os.path.expanduser(w), param, ctx) for w in words)
        for path, _scale in adapters:
            if not os.path.exists(path):
                near = did_you_mean(path, path_choices(os.path.join(os.path.dirname(path), "")))
                self.fail(f"{path} does not exist{near or '; check the path.'}", param, ctx)
        return adapters


class KnownModel(click.ParamType):
    """A model that is here, or that the Hub may have."""

    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from fluxmesh.weights import hub

        name = str(value)
        hub.check_name(name)
        return name


# What is typed -> the field of `GenerateSettings`, and how its value is read.
SETTINGS: dict[str, tuple[str, click.ParamType]] = {
    "model": ("model", KnownModel()),
    "size": ("image_size", ImageSize()),
    "steps": ("steps", click.INT),
    "seed": ("seed", click.INT),
    "n": ("n_images", click.INT),
    "guidance": ("guidance", click.FLOAT),
    "cache": ("cache", click.FLOAT),
    "adapter": ("adapter", Adapters()),
    "image": ("image", PicturePathType("image")),
    "strength": ("strength", click.FLOAT),
    "mask": ("mask", PicturePathType("mask")),
    "outpaint": ("outpaint", Margins()),
    "reference": ("reference", References()),
    "control": ("control", PicturePathType("control")),
    "control-from": ("control_from", PicturePathType("control_from")),
    "negative": ("negative_prompt", click.STRING),
    "cfg": ("cfg", click.FLOAT),
}
# What a request calls otherwise than these settings do.
OF_REQUEST = {
    "references": "reference",
    "reference_strengths": "reference",
    "negative": "negative",
}
COMMANDS = (*SETTINGS, "settings", "help", "quit")
OF_IMAGE = ("strength", "mask", "outpaint")  # fields that mean nothing without a picture


class Conversation:
    """Reads lines until they end, and paints them."""

    def __init__(
        self,
        settings: GenerateSettings,
        target: PicturePath,
        reporter: GenerateTerminalReporter,
        spread: Spread | None = None,
        read: Callable[[], str] | None = None,
    ) -> None:
        """`read` gives the next line, and raises `EOFError` after the last; None: stdin."""
        self.settings = settings
        self.target = target
        self.reporter = reporter
        self.painter = Painter(reporter, keep_warm=True, spread=spread)
        self.read = read or _reader()
        self.last: Path | None = None  # the file that was written last
        self.last_images = 0  # that are in it

    def run(self) -> None:
        """Until /quit or the end of the input."""
        with self.painter:
            self._talk()

    def _talk(self) -> None:
        self.reporter.note("A prompt a line; /help tells more, /quit ends.")
        was_interrupted = False
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.reporter.note("" if was_interrupted else f"\n{AGAIN}")
                if was_interrupted:
                    return
                interrupts.handled()
                was_interrupted = True
                continue
            was_interrupted = False
            if line in ("/quit", "/exit"):
                return
            try:
                self.answer(line)
            except FluxmeshError as error:
                self.reporter.note(f"Error: {_as_typed(str(error))}")
            except KeyboardInterrupt:
                interrupts.handled()
                self.reporter.note("Cancelled.")
            finally:
                self.reporter.rest()

    def answer(self, line: str) -> None:
        """Paints a prompt, or changes a setting; raises `FluxmeshError`."""
        if line.startswith("/"):
            self._command(*line[1:].split(None, 1))
        elif line:
            asked, line = self._again(line)
            settings = self._with_last(asked)
            seed = draw_seed() if settings.seed is None else settings.seed
            settings.request(line, seed)  # raises what is wrong before anything is loaded
            every = int(self.reporter.shows_previews)
            ready = self.painter.resolve(settings, line, seed, preview_every=every)
            files = PictureFiles(self.target, n_images=settings.n_images)
            for sentence in settings.without_effect():
                self.reporter.note(_as_typed(sentence))
            for path in self.painter.paint(ready, files):
                self.last, self.last_images = path, settings.n_images
            self.reporter.finished()

    def _again(self, line: str) -> tuple[GenerateSettings, str]:
        """The settings for a prompt, and its words: "again, but at night" is "at night", said of
        the picture that was painted last, beside the references that are set."""
        again = AGAIN_BUT.fullmatch(line)
        if again is None or self.last is None:
            return self.settings, line
        asked, given = self.settings, self.settings.reference
        if LAST not in (path for path, _ in given):
            asked = replace(asked, reference=((LAST, 1.0), *given))
        return self._as_many_as_are_read(self._with_last(asked)), again["change"]

    def _as_many_as_are_read(self, settings: GenerateSettings) -> GenerateSettings:
        """The settings with no more references than their model reads, of which the picture that
        was painted last is one; those that are left out for it are told."""
        given = settings.reference
        name, most = self.painter.reads(settings) if len(given) > 1 else ("", 0)
        if not 0 < most < len(given):
            return settings
        others = [k for k, (path, _) in enumerate(given) if path != str(self.last)]
        left = others[most - 1 :]
        pictures = "one reference, here" if most == 1 else f"{most} references, here also"
        self.reporter.note(
            f"{name} reads {pictures} the picture that was painted last; left out for this prompt: "
            f"{', '.join(str(given[k][0]) for k in left)}."
        )
        kept = (each for k, each in enumerate(given) if k not in left)
        return replace(settings, reference=tuple(kept))

    def _with_last(self, settings: GenerateSettings) -> GenerateSettings:
        """The settings with the file that `last` means. Raises `UsageError` where there is none."""
        if LAST not in (path for path, _ in settings.reference):
            return settings
        if self.last is None:
            raise UsageError("/reference last: nothing was painted yet; name a picture, or paint.")
        if self.last_images > 1:
            raise UsageError(
                f"/reference last: {self.last} is a grid of {self.last_images} pictures; paint one "
                "with /n 1, or name a picture."
            )
        last = str(self.last)
        return replace(
            settings,
            reference=tuple((last if p == LAST else p, s) for p, s in settings.reference),
        )

    def _command(self, name: str = "", text: str = "") -> None:
        if name == "help":
            self.reporter.note(HELP)
        elif name == "settings":
            for typed, (field, _) in SETTINGS.items():
                self.reporter.note(f"  /{typed:<12} {_shown(getattr(self.settings, field))}")
        elif name in SETTINGS:
            values = _read(*SETTINGS[name], text.strip())
            if name == "image" and not text:
                values |= dict.fromkeys(OF_IMAGE)
            changed = replace(self.settings, **values)
            changed.request("", changed.seed or 0)  # raises before a bad value is kept
            self.settings = changed
        else:
            end = did_you_mean(f"/{name}", [f"/{known}" for known in COMMANDS])
            raise UsageError(f"/{name} is not known{end or '; /help tells what is.'}")


def choices(line: str) -> list[str]:
    """What the last word of a line that is being typed may become."""
    command, space, value = line.partition(" ")
    if not command.startswith("/"):
        return []
    if not space:
        return [f"/{name}" for name in COMMANDS if f"/{name}".startswith(command)]
    begun = value.rpartition(" ")[2]
    if command == "/model":
        from fluxmesh.weights import hub

        names = [name for name in hub.names_here() if name.startswith(begun)]
        return names or path_choices(begun)
    if command == "/reference":
        return [*([LAST] if LAST.startswith(begun) else []), *path_choices(begun)]
    return path_choices(begun) if command in PATH_COMMANDS else []


def _as_typed(sentence: str) -> str:
    """A sentence of the library with what is typed here for settings: /steps, not an option."""
    for typed, (field, _) in SETTINGS.items():
        sentence = sentence.replace(f"`{field}`", f"/{typed}")
    for field, typed in OF_REQUEST.items():
        sentence = sentence.replace(f"`{field}`", f"/{typed}")
    return sentence


def _shown(value: Any) -> str:
    match value:
        case None | ():
            return "by itself"
        case (int(height), int(width)):
            return f"{height}x{width}"
        case (int(), *_):
            return ",".join(map(str, value))
        case (str(), *_):
            return " ".join(map(str, value))
        case ((_, _), *_):
            shown = (str(path) if scale == 1 else f"{path}@{scale:g}" for path, scale in value)
            return " ".join(shown)
    return str(value)


def _read(field: str, kind: click.ParamType, text: str) -> dict[str, Any]:
    """A setting by name, from what was typed; nothing typed is its default."""
    if not text:
        return {field: getattr(GenerateSettings(), field)}
    try:
        return {field: kind.convert(text, None, None)}
    except click.UsageError as error:
        raise UsageError(error.message) from error


def _reader() -> Callable[[], str]:
    """Reads lines from a terminal (with history and editing where Python has them) or a pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what isn't UTF-8 the request refuses
    if not sys.stdin.isatty():
        return _next_line
    return LineEditor(PROMPT, _history(), choices).read


def _history() -> Path | None:
    try:
        return Home.default().history
    except FluxmeshError:  # a home that can't be written to: nothing is remembered
        return None


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
