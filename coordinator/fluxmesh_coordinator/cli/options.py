"""The options that say how to paint, shared by `generate` and `interactive`.

Their values become `Settings` (`fluxmesh_coordinator.commands.settings`), where the defaults stand
too: an option that the user did not give says nothing here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

Command = TypeVar("Command", bound=Callable[..., Any])
ADAPTER_SCALE = 1.0
MULTIPLE = 16  # of pixels that each side of an image has


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


class Adapter(click.ParamType):
    """PATH or PATH:SCALE; a file that exists wins over a scale."""

    name = "PATH[:SCALE]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        path, colon, scale = value.rpartition(":")
        if not colon or os.path.exists(value):
            return value, ADAPTER_SCALE
        try:
            number = float(scale)
        except ValueError:
            return value, ADAPTER_SCALE
        if not path or not math.isfinite(number):
            self.fail(f"{value!r} is not PATH or PATH:SCALE, such as dog.safetensors:0.8.")
        return path, number


class Margins(click.ParamType):
    """L,T,R,B in pixels."""

    name = "L,T,R,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        from fluxmesh.images import parse_margins

        return value if isinstance(value, tuple) else parse_margins(value)


def chosen(context: click.Context) -> dict[str, Any]:
    """The parameters that the user gave, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def settings_options(command: Command) -> Command:
    """Adds an option for every field of `Settings` to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def spread_options(command: Command) -> Command:
    """Adds the options that say how work is spread over a mesh: the fields of `Spread`."""
    for option in reversed(_SPREAD):
        command = option(command)
    return command


_SPREAD = [
    click.option(
        "--placement",
        type=click.Choice(["data", "sequence", "tensor"]),
        help="How hosts share the work.  [whichever is fastest]",
    ),
    click.option("--force-shard", is_flag=True, help="All hosts of a ring work on each image."),
    click.option(
        "--wait", type=click.FloatRange(min=0), metavar="SECONDS",
        help="How long hosts that are lost may take to return.",
    ),
]  # fmt: skip
_FILE = click.Path(exists=True, dir_okay=False)
_OPTIONS = [
    click.option(
        "-m", "--model", metavar="MODEL", help="tiny, schnell, dev, krea-dev, a Hub repo or a path."
    ),
    click.option("-n", "--n-images", type=int, help="How many images; image k has seed + k.  [1]"),
    click.option("--image-size", type=ImageSize(), help="In pixels.  [the model's own]"),
    click.option("--steps", type=int, help="Denoising steps.  [the model's own]"),
    click.option("--guidance", type=float, help="Guidance, for models that take it.  [4.0]"),
    click.option("--seed", type=int, help="Where the noise comes from.  [drawn, and told]"),
    click.option("--n-rows", type=click.IntRange(min=1), help="Rows of the grid."),
    click.option("--image", type=_FILE, metavar="PATH", help="Begin from this picture."),
    click.option(
        "--strength", type=float, help="Share of the steps that --image goes through, 0 to 1."
    ),
    click.option("--mask", type=_FILE, metavar="PATH", help="Paint where this picture is white."),
    click.option("--outpaint", type=Margins(), help="Paint a border around --image, in pixels."),
    click.option(
        "--adapter", type=Adapter(), multiple=True, help="A LoRA, and its strength.  [1.0]"
    ),
    click.option("--fuse-adapter", is_flag=True, help="Merge adapters into the weights: faster."),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="Of weights.  [bfloat16]",
    ),
    click.option("-q", "--quantize", is_flag=True, help="Quantize the weights: less memory."),
    click.option(
        "--bits",
        type=click.Choice(["3", "4", "5", "6", "8"]),
        callback=lambda _ctx, _param, value: None if value is None else int(value),
        help="Of a quantized weight; implies --quantize.  [4]",
    ),
    click.option(
        "--no-t5-padding", is_flag=True, help="Don't pad the prompt: faster, another picture."
    ),
    click.option("--decoding-batch-size", type=int, help="Images decoded at once.  [1]"),
    click.option("--preload-models", is_flag=True, help="Load every component first."),
    click.option("--low-memory", is_flag=True, help="Give memory back as early as can be."),
    click.option(
        "--cache",
        type=float,
        metavar="THRESHOLD",
        help="Approximate, faster: reuse a step where the next one changes less.  [0, off]",
    ),
]
