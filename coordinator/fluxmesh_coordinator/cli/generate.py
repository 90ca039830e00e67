"""`fluxmesh generate`: prompts in, PNG files out, on the mesh that is up or on this machine."""

from __future__ import annotations

from typing import Any

import click

from fluxmesh_coordinator.cli.parameters.options import (
    ConfigurableCommand,
    display_options,
    painting_settings,
    settings_options,
    spread_options,
)
from fluxmesh_coordinator.cli.parameters.types import UserPath


@click.command(cls=ConfigurableCommand)
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option(
    "--prompt-file",
    type=UserPath(),
    metavar="PATH",
    help="Paint each line of this file (-: stdin) that does not begin with #.",
)
@click.option(
    "--from",
    "from_",
    type=UserPath(),
    metavar="IMAGE",
    help="Make this picture again; other options change what they name.",
)
@click.option(
    "-o",
    "--output",
    type=UserPath(),
    metavar="PATH",
    help="A PNG file or a folder.  [the next free of out.png]",
)
@click.option("--save-raw", is_flag=True, help="One file an image (out.0.png, ...), not a grid.")
@click.option(
    "--stepwise", type=UserPath(), metavar="DIR", help="Also save the picture after each step."
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--allow-empty-prompt", is_flag=True, help="Paint without a prompt if it is empty.")
@settings_options
@spread_options
@display_options
@click.option(
    "-v", "--verbose", is_flag=True, help="Also tell the plan, times, and peak memory by phase."
)
@click.option("--json", "as_json", is_flag=True, help="Tell it in JSON, one object a line.")
@click.pass_context
def generate(
    context: click.Context,
    words: tuple[str, ...],
    prompt_file: str | None,
    from_: str | None,
    output: str | None,
    save_raw: bool,
    stepwise: str | None,
    force: bool,
    allow_empty_prompt: bool,
    placement: Any,
    force_shard: bool,
    wait: float | None,
    opens: bool,
    shows: bool,
    previews: bool,
    verbose: bool,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Paint PROMPT (- reads prompts from stdin, one a line).

    Image k of a call is the one that seed + k gives alone, byte for byte.
    """
    from fluxmesh_coordinator.artifacts.pictures import PictureFiles, PicturePath, StepFiles
    from fluxmesh_coordinator.artifacts.recipe import read_recipe
    from fluxmesh_coordinator.cli.parameters.prompts import only_prompt, read_prompts
    from fluxmesh_coordinator.commands.generate import Painter, Spread
    from fluxmesh_coordinator.commands.settings import draw_seed
    from fluxmesh_coordinator.console.generate_report import (
        Display,
        GenerateJsonReporter,
        GenerateTerminalReporter,
        Reporter,
    )

    earlier = read_recipe(from_) if from_ else None
    settings = painting_settings(context, earlier)
    prompts = read_prompts(
        only_prompt(words, "generate"),
        prompt_file,
        earlier.prompt if earlier else None,
        allow_empty=allow_empty_prompt,
    )
    seed = draw_seed() if settings.seed is None else settings.seed

    # All that can be wrong is found before anything is downloaded, loaded or written.
    for text in prompts:
        settings.request(text, seed)
    images = settings.n_images
    files = PictureFiles(PicturePath.parse(output, force=force), len(prompts), images, save_raw)
    steps = StepFiles(stepwise, len(prompts), images, force=force) if stepwise else None

    reporter: Reporter = (
        GenerateJsonReporter(previews=previews)
        if as_json
        else GenerateTerminalReporter(
            verbose=verbose, names_prompts=len(prompts) > 1, display=Display(opens, shows, previews)
        )
    )
    spread = Spread(placement, force_shard, wait)
    for sentence in settings.without_effect(save_raw=save_raw):
        reporter.note(sentence)
    with reporter, Painter(reporter, keep_warm=len(prompts) > 1, spread=spread) as painter:
        ready = painter.resolve(
            settings,
            prompts[0],
            seed,
            stepwise=steps is not None,
            preview_every=int(reporter.shows_previews),
        )
        for number, text in enumerate(prompts):
            each = ready.with_prompt(text)
            painter.paint(each, files, number=number, steps=steps, earlier=earlier)
        reporter.finished()
