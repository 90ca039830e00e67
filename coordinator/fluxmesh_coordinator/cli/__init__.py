"""The `fluxmesh` command: one module a command, imported when that command is named.

This module and the command modules import only click and the standard library at the top, so
that `fluxmesh --help` answers at once; a command imports what it computes with as it runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.machine.open_files import allow_many_files
from fluxmesh.version import __version__
from fluxmesh_coordinator.console.json_lines import emit
from fluxmesh_coordinator.console.option_names import in_options

COMMANDS = {
    "generate": "fluxmesh_coordinator.cli.generate:generate",
    "train": "fluxmesh_coordinator.cli.train:train",
    "interactive": "fluxmesh_coordinator.cli.interactive:interactive",
    "models": "fluxmesh_coordinator.cli.models:models",
    "adapters": "fluxmesh_coordinator.cli.adapters:adapters",
    "up": "fluxmesh_coordinator.cli.up:up",
    "status": "fluxmesh_coordinator.cli.status:status",
    "plan": "fluxmesh_coordinator.cli.plan:plan",
    "doctor": "fluxmesh_coordinator.cli.doctor:doctor",
    "logs": "fluxmesh_coordinator.cli.logs:logs",
    "down": "fluxmesh_coordinator.cli.down:down",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is first asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fluxmesh")
def cli() -> None:
    """FLUX images in MLX: same prompt, same seed, same picture.

    \b
    Begin with:
      fluxmesh generate "a red apple on a yellow background"
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 usage, 4 does not fit, 130 cancelled.

    Every error becomes one sentence on stderr; with `--json` also one line on stdout.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    allow_many_files()
    try:
        code = cli.main(arguments, prog_name="fluxmesh", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        _tell_program(arguments, error.format_message(), error.exit_code)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        sys.exit(_fail(arguments, error.format_message(), error.exit_code))
    except FluxmeshError as error:
        code = _fail(arguments, in_options(str(error)), error.exit_code)
        if {"-v", "--verbose"} & set(arguments):
            for note in getattr(error, "__notes__", ()):
                click.echo(note, err=True)
        sys.exit(code)
    except OSError as error:  # of a path that no command looked at more closely
        what = error.strerror or type(error).__name__
        where = "" if error.filename is None else f"{error.filename}: "
        sys.exit(_fail(arguments, f"{where}{what}.", FluxmeshError.exit_code))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail(arguments, "Cancelled.", CancelledError.exit_code))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(arguments: Sequence[str], message: str, code: int) -> int:
    click.echo(message if code == CancelledError.exit_code else f"Error: {message}", err=True)
    _tell_program(arguments, message, code)
    return code


def _tell_program(arguments: Sequence[str], message: str, code: int) -> None:
    if "--json" in arguments:
        emit("error", message=message, exit_code=code)
