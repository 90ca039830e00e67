"""What is typed at `fluxmesh interactive`: a line is a prompt, or a setting if it begins with /.

A mistake or a failed picture is told, and the conversation goes on; Ctrl-C stops the picture that
is being painted, and at the empty prompt it ends the conversation.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import click

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh_coordinator.artifacts.pictures import PictureFiles, PicturePath
from fluxmesh_coordinator.cli.options import ImageSize
from fluxmesh_coordinator.commands.generate import Painter, Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings, draw_seed
from fluxmesh_coordinator.console.generate_report import GenerateTerminalReporter

PROMPT = "fluxmesh> "
HELP = """\
Type a prompt to paint it. A line that begins with / changes a setting until it is changed again:
  /size 128x192    height and width in pixels      /steps 8       denoising steps
  /seed 7          where the noise comes from      /n 4           images a prompt
  /model schnell   the checkpoint                  /guidance 3.5  for models that take it
  /cache 0.1       approximate and faster; 0 is off
With no value, a setting goes back to what it is by itself (a seed is drawn for each prompt).
  /settings        what they are now
  /quit            the end (Ctrl-D too)"""
# What is typed -> the field of `GenerateSettings`, and how its value is read.
SETTINGS: dict[str, tuple[str, click.ParamType]] = {
    "size": ("image_size", ImageSize()),
    "steps": ("steps", click.INT),
    "seed": ("seed", click.INT),
    "n": ("n_images", click.INT),
    "model": ("model", click.STRING),
    "guidance": ("guidance", click.FLOAT),
    "cache": ("cache", click.FLOAT),
}


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

    def run(self) -> None:
        """Until /quit or the end of the input."""
        with self.painter:
            self._talk()

    def _talk(self) -> None:
        self.reporter.note("A prompt a line; /help tells more, /quit ends.")
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self.answer(line)
            except FluxmeshError as error:
                self.reporter.note(f"Error: {error}")
            except KeyboardInterrupt:
                self.reporter.note("Cancelled.")
            finally:
                self.reporter.rest()

    def answer(self, line: str) -> None:
        """Paints a prompt, or changes a setting; raises `FluxmeshError`."""
        if line.startswith("/"):
            self._command(*line[1:].split(None, 1))
        elif line:
            settings = self.settings
            seed = draw_seed() if settings.seed is None else settings.seed
            settings.request(line, seed)  # raises what is wrong before anything is loaded
            ready = self.painter.resolve(settings, line, seed)
            files = PictureFiles(self.target, n_images=settings.n_images)
            self.painter.paint(ready, files)
            self.reporter.finished()

    def _command(self, name: str = "", text: str = "") -> None:
        if name == "help":
            self.reporter.note(HELP)
        elif name == "settings":
            for typed, (field, _) in SETTINGS.items():
                self.reporter.note(f"  /{typed:<9} {_shown(getattr(self.settings, field))}")
        elif name in SETTINGS:
            changed = replace(self.settings, **_read(*SETTINGS[name], text.strip()))
            changed.request("", changed.seed or 0)  # raises before a bad value is kept
            self.settings = changed
        else:
            raise UsageError(f"/{name} is not known; /help tells what is.")


def _shown(value: Any) -> str:
    if value is None:
        return "by itself"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    with suppress(ImportError):  # a Python built without it: lines can be typed all the same
        importlib.import_module("readline")
    return lambda: input(PROMPT)


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
