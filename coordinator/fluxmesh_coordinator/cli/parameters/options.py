"""The options that say how to paint, shared by `generate` and `interactive`.

Their values become `Settings` (`fluxmesh_coordinator.commands.settings`), where the defaults stand
too: an option that the user did not give says nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from fluxmesh.errors import FluxmeshError
from fluxmesh_coordinator.cli.completion import complete_adapters, complete_models
from fluxmesh_coordinator.cli.parameters.types import (
    FILE,
    Adapter,
    ImageSize,
    Margins,
    ReferencePicture,
)
from fluxmesh_coordinator.console.option_names import option_of

if TYPE_CHECKING:
    from fluxmesh_coordinator.artifacts.recipe import Recipe
    from fluxmesh_coordinator.commands.settings import GenerateSettings

Command = TypeVar("Command", bound=Callable[..., Any])
WEIGHTS = {"model", "dtype", "bits", "text_bits"}  # options that say which weights are held


class ConfigurableCommand(click.Command):
    """A command whose errors say where a wrong value stands, if not on the command line.

    Environment and config.toml are the context's object (`defaults.py`).
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FluxmeshError as error:
            default = _default_at_fault(ctx, error)
            if default is not None:
                said = str(error).replace(f"`{error.setting}`", default.setting.title)
                error.args = (f"{default.source}: {said}",)
            raise


def _default_at_fault(ctx: click.Context, error: FluxmeshError) -> Any:
    """The default that an error is about; None where it is about something else."""
    if ctx.obj is None or ctx.params.get("from_"):  # a recipe stands above them
        return None
    option = option_of(error.setting)
    for name, default in ctx.obj.of(str(ctx.info_name)).items():
        is_taken = ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
        if is_taken and option in default.setting.option.opts:
            return default
    return None


def chosen(context: click.Context) -> dict[str, Any]:
    """The parameters that the user gave, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def painting_settings(context: click.Context, earlier: Recipe | None = None) -> GenerateSettings:
    """How to paint: the command line, above environment and config.toml, above the defaults.

    To make an `earlier` picture again, its recipe stands in for all but the command line. What a
    mesh was brought up with stands above config.toml: it is warm, and `up` was told so later.
    """
    from fluxmesh_coordinator.commands.settings import GenerateSettings

    values = chosen(context)
    on_command_line = {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if earlier is not None:
        recorded = GenerateSettings.of_recipe(earlier)
        return recorded.with_chosen(put_aside_by(on_command_line) | on_command_line)
    of_file = context.obj.of_file if context.obj is not None else frozenset()
    configured = (WEIGHTS & values.keys() & of_file) - on_command_line.keys()
    if configured and ("model" not in values or "model" in configured) and _mesh_has_weights():
        values = {name: value for name, value in values.items() if name not in configured}
    values |= put_aside_by(on_command_line) | on_command_line
    return GenerateSettings().with_chosen(values)


def put_aside_by(on_command_line: Mapping[str, Any]) -> dict[str, None]:
    """What a picture's recipe or config.toml says otherwise than these, by other names."""
    aside: set[str] = set()
    if on_command_line.get("quantize") is False:
        aside |= {"bits", "text_bits"}
    maps = {"control", "control_from"}  # each gives the map that is followed
    if maps & on_command_line.keys():
        aside |= maps
    return dict.fromkeys(aside)


def _mesh_has_weights() -> bool:
    from fluxmesh_coordinator.agents import mesh_file

    record = mesh_file.load()
    return record is not None and record.weights is not None


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


def display_options(command: Command) -> Command:
    """Adds the options that say what becomes of a saved picture: the fields of `Display`."""
    for option in reversed(_DISPLAY):
        command = option(command)
    return command


_DISPLAY = [
    click.option(
        "--open/--no-open", "opens", help="Open each picture in this machine's viewer.  [off]"
    ),
    click.option(
        "--show/--no-show",
        "shows",
        help="Show each picture in the terminal: iTerm2, kitty, WezTerm, Ghostty.  [off]",
    ),
    click.option(
        "--preview/--no-preview",
        "previews",
        help="Show it there while it is painted, small and after each step.  [off]",
    ),
]
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


def model_option(default: str) -> Callable[[Command], Command]:
    """--model; `default` tells what is taken without it."""
    return click.option(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=complete_models,
        help=f"A name of `models list`, a Hub repo, a path.  [{default}]",
    )


_OPTIONS = [
    model_option("the best that is here and fits"),
    click.option("-n", "--n-images", type=int, help="How many images; image k has seed + k.  [1]"),
    click.option(
        "--image-size", type=ImageSize(), help="Height and width in pixels.  [the model's own]"
    ),
    click.option("--steps", type=int, help="Denoising steps.  [the model's own]"),
    click.option("--guidance", type=float, help="Guidance, for models that take it.  [4.0]"),
    click.option("--seed", type=int, help="Seed of the noise.  [random, and told]"),
    click.option("--n-rows", type=click.IntRange(min=1), help="Rows of the grid.  [1]"),
    click.option("--image", type=FILE, metavar="PATH", help="Begin from this picture."),
    click.option(
        "--strength",
        type=float,
        help="Share of the steps that --image goes through.  [0.6; 1 with --mask, --outpaint]",
    ),
    click.option(
        "--mask",
        type=FILE,
        metavar="PATH",
        help="Paint where this picture is white, or transparent.",
    ),
    click.option("--outpaint", type=Margins(), help="Paint a border around --image, in pixels."),
    click.option(
        "--reference",
        type=ReferencePicture(),
        multiple=True,
        help="A picture that the prompt speaks of, and how much it counts; several are taken too.",
    ),
    click.option(
        "--redux",
        metavar="NAME",
        help="The FLUX.1 Redux by which dev and schnell read it: a folder, a file.  [redux]",
    ),
    click.option("--control", type=FILE, metavar="PATH", help="A map of edges or depth to follow."),
    click.option(
        "--control-from",
        type=FILE,
        metavar="PATH",
        help="Follow the edges that OpenCV finds in this picture: for Canny.",
    ),
    click.option("--negative-prompt", metavar="TEXT", help="What the picture must not show."),
    click.option(
        "--cfg", type=float, help="Strength of --negative-prompt: two calls a step.  [the model's]"
    ),
    click.option(
        "--adapter",
        type=Adapter(),
        multiple=True,
        shell_complete=complete_adapters,
        help="A LoRA (file, folder or Hub id), and its strength.  [1.0]",
    ),
    click.option("--fuse-adapter", is_flag=True, help="Merge adapters into the weights: faster."),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="Number type of the weights.  [bfloat16]",
    ),
    click.option(
        "-q", "--quantize/--no-quantize", default=None, help="Quantize the weights: less memory."
    ),
    click.option(
        "--bits",
        type=click.Choice(["3", "4", "5", "6", "8"]),
        callback=lambda _ctx, _param, value: None if value is None else int(value),
        help="Bits of a quantized weight; implies --quantize.  [4 with --quantize]",
    ),
    click.option(
        "--text-bits",
        type=click.Choice(["3", "4", "5", "6", "8"]),
        callback=lambda _ctx, _param, value: None if value is None else int(value),
        help="Bits of a text encoder's weight.  [as --bits]",
    ),
    click.option(
        "--no-t5-padding", is_flag=True, help="Don't pad the prompt: faster, another picture."
    ),
    click.option("--decoding-batch-size", type=int, help="Images decoded at once.  [1]"),
    click.option("--preload-models", is_flag=True, help="Load every component first."),
    click.option(
        "--low-memory/--no-low-memory",
        default=None,
        help="Give memory back as early as can be.  [off]",
    ),
    click.option(
        "--no-metadata", is_flag=True, help="Write no prompt, nor anything else, into the PNG."
    ),
    click.option(
        "--cache",
        type=float,
        metavar="THRESHOLD",
        help="Approximate, faster: reuse a step where the next one changes less.  [0, off]",
    ),
]
