"""`fluxmesh interactive`: prompt after prompt, with the weights kept in memory."""

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
@click.option(
    "-o", "--output", type=UserPath(), metavar="FOLDER", help="Where pictures go.  [this folder]"
)
@settings_options
@spread_options
@display_options
@click.option(
    "-v", "--verbose", is_flag=True, help="Also tell the plan, times, and peak memory by phase."
)
@click.pass_context
def interactive(
    context: click.Context,
    output: str | None,
    placement: Any,
    force_shard: bool,
    wait: float | None,
    opens: bool,
    shows: bool,
    previews: bool,
    verbose: bool,
    **_settings: Any,
) -> None:
    """Paint prompt after prompt, warm.

    A line is a prompt, or changes a setting if it begins with /; /help tells which there are.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.artifacts.pictures import PicturePath
    from fluxmesh_coordinator.cli.conversation import Conversation
    from fluxmesh_coordinator.commands.generate import Spread
    from fluxmesh_coordinator.console.generate_report import Display, GenerateTerminalReporter

    target = PicturePath.parse(output)
    if target.given:
        raise UsageError(f"--output {output}: interactive takes a folder, and names the files.")
    settings = painting_settings(context)
    if settings.model is not None:
        hub.check_name(settings.model)  # before the first prompt, as /model does
    display = Display(opens, shows, previews)
    with GenerateTerminalReporter(verbose=verbose, display=display) as reporter:
        Conversation(settings, target, reporter, Spread(placement, force_shard, wait)).run()
