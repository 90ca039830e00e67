"""The `fluxmesh` command: one module a command, imported when that command is named.

This module and the command modules import only click and the standard library at the top, so
that `fluxmesh --help` answers at once; a command imports what it computes with as it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NoReturn

import click

from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.machine.open_files import allow_many_files
from fluxmesh.spelling import did_you_mean
from fluxmesh.storage import interrupts
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
    "hostfile": "fluxmesh_coordinator.cli.up:hostfile",
    "status": "fluxmesh_coordinator.cli.status:status",
    "plan": "fluxmesh_coordinator.cli.plan:plan",
    "bench": "fluxmesh_coordinator.cli.bench:bench",
    "doctor": "fluxmesh_coordinator.cli.doctor:doctor",
    "logs": "fluxmesh_coordinator.cli.logs:logs",
    "down": "fluxmesh_coordinator.cli.down:down",
    "serve": "fluxmesh_coordinator.cli.serve:serve",
    "config": "fluxmesh_coordinator.cli.config:config",
    "completion": "fluxmesh_coordinator.cli.completion:completion",
}
# Whose options environment and config.toml may give.
TAKE_DEFAULTS = {"generate", "interactive", "plan", "up", "train"}


class SuggestingGroup(click.Group):
    """A group that knows what is near a command that it has not."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, name):
            return super().resolve_command(ctx, args)
        end = did_you_mean(name, self.list_commands(ctx), ".")
        raise click.UsageError(f"There is no command {name!r}{end}", ctx)


class LazyGroup(SuggestingGroup):
    """A group that imports a command's module when the command is first asked for."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, with the defaults that environment and config.toml give it."""
        name, command, rest = super().resolve_command(ctx, args)
        asks_for_help = not {"-h", "--help"}.isdisjoint(rest)
        if name in TAKE_DEFAULTS and not (ctx.resilient_parsing or asks_for_help):
            from fluxmesh_coordinator.cli.parameters.defaults import Defaults

            ctx.obj = Defaults.read()
            values = {key: default.value for key, default in ctx.obj.of(name).items()}
            ctx.default_map = {name: values}
        return name, command, rest

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

    Every error becomes one sentence on stderr; with `--json` also one line on stdout. None: this is
    the program itself, whose signals are ours.
    """
    if arguments is None:
        interrupts.cancel_from_now()
    code = _code_of(list(sys.argv[1:] if arguments is None else arguments))
    if interrupts.happened():
        interrupts.show_cursor()
    interrupts.put_right()
    if arguments is None:
        interrupts.ignore()
        if code == CancelledError.exit_code:  # Python would wait for threads, and tell of them
            _flush()
            os._exit(code)
    sys.exit(code)


def _code_of(arguments: Sequence[str]) -> int:
    """What a command ends with, once that is told."""
    allow_many_files()
    try:
        code = cli.main(arguments, prog_name="fluxmesh", standalone_mode=False)
    except CancelledError as error:
        return _fail(arguments, in_options(str(error)), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(arguments, "Cancelled.", CancelledError.exit_code)
    except BaseException as error:
        # Where a signal meets a library, what comes out of it may be anything.
        if interrupts.happened():
            return _fail(arguments, "Cancelled.", CancelledError.exit_code)
        return _told(arguments, error)
    return code if isinstance(code, int) else 0


def _told(arguments: Sequence[str], error: BaseException) -> int:
    """The exit code of an error, which is told as a sentence. Raises what is none of ours."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and error.ctx is not None:
        click.echo(error.ctx.get_help(), err=True)
        _tell_program(arguments, f"{error.ctx.command_path} needs a command.", error.exit_code)
        return error.exit_code
    if isinstance(error, click.UsageError):
        return _fail(arguments, _of_usage(error), error.exit_code)
    if isinstance(error, click.ClickException):
        return _fail(arguments, error.format_message(), error.exit_code)
    if isinstance(error, FluxmeshError):
        code = _fail(arguments, in_options(str(error)), error.exit_code)
        if {"-v", "--verbose"} & set(arguments):
            for note in getattr(error, "__notes__", ()):
                click.echo(note, err=True)
        return code
    if isinstance(error, OSError):  # of a path that no command looked at more closely
        what = error.strerror or type(error).__name__
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(arguments, f"{where}{what}.", FluxmeshError.exit_code)
    raise error


def _of_usage(error: click.UsageError) -> str:
    """What click says of a wrong command line, in one sentence that names its help."""
    if isinstance(error, click.NoSuchOption):
        known = error.ctx.command.params if error.ctx else ()
        names = [name for option in known for name in (*option.opts, *option.secondary_opts)]
        said = f"There is no option {error.option_name}{did_you_mean(error.option_name, names)}"
    else:
        said = " ".join(error.format_message().split()).removesuffix(".")
    if error.ctx is None:
        return said if said.endswith("?") else f"{said}."
    link = "" if said.endswith("?") else ";"
    return f"{said}{link} `{error.ctx.command_path} --help` tells what there is."


def _error_word() -> str:
    """Red on a terminal, unless its user wants no colours (https://no-color.org)."""
    has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style("Error:", fg="red", bold=True) if has_colours else "Error:"


def _fail(arguments: Sequence[str], message: str, code: int) -> int:
    is_cancel = code == CancelledError.exit_code
    with _into_nothing(code):
        click.echo(message if is_cancel else f"{_error_word()} {message}", err=True)
        _tell_program(arguments, message, code)
    return code


def _flush() -> None:
    with _into_nothing(CancelledError.exit_code):
        sys.stdout.flush()
        sys.stderr.flush()


def _into_nothing(code: int) -> AbstractContextManager[None]:
    """Who reads what was cancelled may be gone, or have closed the terminal: that is no error."""
    return suppress(OSError) if code == CancelledError.exit_code else nullcontext()


def _tell_program(arguments: Sequence[str], message: str, code: int) -> None:
    if "--json" in arguments:
        emit("error", message=message, exit_code=code)
