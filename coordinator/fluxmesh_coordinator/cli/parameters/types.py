"""Values as users type them, and what a command gets for them: paths, sizes, adapters, margins."""

from __future__ import annotations

import os
from typing import Any

import click

MULTIPLE = 16  # of pixels that each side of an image has


class UserPath(click.Path):
    """`click.Path`, with `~` and `~name` replaced; of a user unknown here, the path as it is.

    A shell leaves them alone in quotes, after `=` (`--output=~/dog.png`) and in files.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


FILE = UserPath(exists=True, dir_okay=False)


class Resolution(click.ParamType):
    """HEIGHTxWIDTH in pixels, or one number for a square."""

    name = "HEIGHTxWIDTH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = value.lower().replace("×", "x").split("x")
        if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, such as 512x768.", param, ctx)
        return int(parts[0]), int(parts[-1])


class ImageSize(Resolution):
    """A resolution, each side rounded up to 16s."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        asked = super().convert(value, param, ctx)
        if isinstance(value, tuple):
            return asked
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in asked)
        if (height, width) != asked:
            click.echo(
                f"--image-size {value} became {height}x{width}: sides are multiples of 16.",
                err=True,
            )
        return height, width


class Resolutions(Resolution):
    """HEIGHTxWIDTH[,HEIGHTxWIDTH...], each in multiples of 16."""

    name = "SIZE[,SIZE...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        sizes = tuple(super(Resolutions, self).convert(v, param, ctx) for v in value.split(","))
        for size in sizes:
            if not all(size) or any(side % MULTIPLE for side in size):
                self.fail(f"{size[0]}x{size[1]}: sides are multiples of {MULTIPLE}.", param, ctx)
        return tuple(dict.fromkeys(sizes))


class Scaled(click.ParamType):
    """NAME, NAME@SCALE or NAME:SCALE; a file that exists wins over a scale."""

    example: str

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        from fluxmesh.adapters.find import split_scale

        if isinstance(value, tuple):
            return value
        try:
            return split_scale(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}, such as {self.example}.", param, ctx)


class Adapter(Scaled):
    """An adapter's file or name, and its scale."""

    name, example = "NAME[@SCALE]", "dog.safetensors@0.8"


class ScaledPicture(Scaled):
    """A picture's path, and its strength."""

    name, example = "PATH[@STRENGTH]", "mug.png@0.8"


class ReferencePicture(ScaledPicture):
    """The same of a picture that is there."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        path, strength = super().convert(value, param, ctx)
        return FILE.convert(path, param, ctx), strength


class Margins(click.ParamType):
    """L,T,R,B in pixels."""

    name = "L,T,R,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        from fluxmesh.images import parse_margins

        return value if isinstance(value, tuple) else parse_margins(value)
