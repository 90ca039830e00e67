"""`fluxmesh bench`: one table of what this machine, or the mesh that is up, takes for a step."""

from __future__ import annotations

import time
from dataclasses import asdict

import click

from fluxmesh_coordinator.cli.completion import complete_models
from fluxmesh_coordinator.cli.parameters.types import ImageSize


@click.command(short_help="Measure steps, links and placements.")
@click.option(
    "-m",
    "--model",
    "models",
    metavar="MODEL",
    multiple=True,
    shell_complete=complete_models,
    help="A model to measure; may be given several times.  [tiny, and the best that is here]",
)
@click.option(
    "--image-size",
    "--size",
    "sizes",
    type=ImageSize(),
    multiple=True,
    help="Size of the pictures; may be given several times.  [the model's own]",
)
@click.option("--steps", type=int, default=4, show_default=True, help="Steps of each picture.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def bench(
    context: click.Context,
    models: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    steps: int,
    as_json: bool,
) -> None:
    """Measure how long a step and a picture take, and print it beside what was predicted.

    Every placement of the mesh that is up is measured; if none is up, this machine. Pictures are
    painted as `generate` paints them, twice each, and not kept. The table is made to be posted.
    Exits 4 if no model fits in memory.
    """
    from fluxmesh_coordinator.commands.bench import Bench, check_steps
    from fluxmesh_coordinator.commands.generate import Painter
    from fluxmesh_coordinator.console import bench_table, terminal
    from fluxmesh_coordinator.console.generate_report import (
        GenerateJsonReporter,
        GenerateTerminalReporter,
        Reporter,
    )
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.console.option_names import in_options

    check_steps(steps)
    reporter: Reporter = GenerateJsonReporter() if as_json else GenerateTerminalReporter()
    measured = False
    with reporter, Painter(reporter, keep_warm=True) as painter:
        work = Bench(painter, steps)
        for row in work.rows(list(models) or work.models(), sizes):
            measured = measured or row.step is not None
            if as_json:
                emit("benched", **asdict(row))
            else:  # at once: whoever breaks off a bench of hours has what was measured so far
                reporter.note(bench_table.sentence(row))
        report = work.report()
    if as_json:
        emit(**bench_table.as_json(report))
    else:
        for line in bench_table.lines(report, terminal.output().width, time.time()):
            click.echo(in_options(line))
    if not measured:
        context.exit(4)
