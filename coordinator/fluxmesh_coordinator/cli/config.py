"""`fluxmesh config`: what every setting is now, and where it comes from."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from fluxmesh_coordinator.cli import SuggestingGroup

if TYPE_CHECKING:
    from fluxmesh_coordinator.cli.parameters.defaults import Setting


def complete_settings(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """What `set` and `unset` take, for a shell's Tab."""
    from fluxmesh_coordinator.cli.parameters.defaults import known_settings

    titles = [setting.title for setting in known_settings().values()]
    return [CompletionItem(title) for title in titles if title.startswith(begun)]


@click.group(cls=SuggestingGroup, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def config(context: click.Context, as_json: bool) -> None:
    """Show settings and where they come from, or change them.

    An option of the command line stands above the environment (FLUXMESH_MODEL, ...), that above
    config.toml, and that above the option's own default. What a mesh that is up was brought up
    with stands above config.toml. `generate --from` takes the picture's own settings instead.
    """
    if context.invoked_subcommand is not None:
        return
    from fluxmesh_coordinator.cli.parameters.defaults import Defaults, known_settings
    from fluxmesh_coordinator.commands.config_file import config_path
    from fluxmesh_coordinator.console import terminal
    from fluxmesh_coordinator.console.json_lines import emit

    defaults, path = Defaults.read(), config_path()
    table = terminal.table(("setting", "value", "from"))
    for setting in known_settings().values():
        default = defaults.by_title.get(setting.title)
        if as_json:
            value = setting.own_default if default is None else default.value
            source = "default" if default is None else default.source
            emit("setting", key=setting.title, value=value, source=source)
        elif default is None:
            table.add_row(setting.title, setting.own_default, "default")
        else:
            table.add_row(setting.title, _shown(default.value), default.source)
    if as_json:
        return
    terminal.output().print(table)
    is_there = "" if path.is_file() else ", which is not there yet"
    click.echo(f"The file is {path}{is_there}; `fluxmesh config set KEY VALUE` writes it.")


@config.command("set")
@click.argument("key", shell_complete=complete_settings)
@click.argument("value")
def set_command(key: str, value: str) -> None:
    """Write KEY = VALUE into config.toml."""
    setting = _setting(key)
    # A relative folder would be another one in every folder that a command runs in.
    if setting.key == "output":
        from pathlib import Path

        value = str(Path(value).expanduser().absolute())
    setting.read(_typed(setting, value), "The value")
    _write(setting, value)


@config.command()
@click.argument("key", shell_complete=complete_settings)
def unset(key: str) -> None:
    """Take KEY out of config.toml."""
    _write(_setting(key), None)


def _setting(key: str) -> Setting:
    from fluxmesh.errors import UsageError
    from fluxmesh.spelling import did_you_mean
    from fluxmesh_coordinator.cli.parameters.defaults import known_settings

    by_title = {setting.title: setting for setting in known_settings().values()}
    setting = by_title.get(key.replace("_", "-"))
    if setting is None:
        end = did_you_mean(key, by_title, "; `fluxmesh config` lists what there is.")
        raise UsageError(f"{key} is no setting{end}")
    return setting


def _typed(setting: Setting, text: str) -> Any:
    """What was typed, as TOML would have it: a number is no text there."""
    if setting.option.is_flag:
        return {"true": True, "false": False}.get(text.lower(), text)
    if setting.is_text:
        return text
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def _write(setting: Setting, value: str | None) -> None:
    from fluxmesh.errors import UsageError
    from fluxmesh.storage.homes import Home, write_private
    from fluxmesh_coordinator.commands import config_file

    path = config_file.config_path()
    text = config_file.read_text(path)
    place = (setting.section, setting.key)
    # What is no TOML is not made worse.
    others = {(e.section, e.key): e.value for e in config_file.parse(text, path)}
    others.pop(place, None)
    typed = None if value is None else _typed(setting, value)
    new = config_file.changed(text, setting.section, setting.key, typed)
    try:
        written = {(e.section, e.key): e.value for e in config_file.parse(new, path)}
    except UsageError:
        written = {}
    if not written.items() >= others.items() or written.get(place) != typed:
        raise UsageError(f"{path} spells {setting.title} in a way of its own; change it there.")
    Home.default()  # makes the folder
    write_private(path, new)
    click.echo(f"{path}: {setting.title} is {'unset' if value is None else value} now.")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
