"""What options are where the command line does not name them: environment, then config.toml.

    command line  >  FLUXMESH_MODEL, ...  >  config.toml  >  the option's own default

An option is a setting where the command line can name another value, so that nobody is bound to
what a file says. Those of painting stand at the top of the file, those of training under `[train]`;
the top's model is every command's. In the environment, the setting's name is in capitals:
FLUXMESH_IMAGE_SIZE, FLUXMESH_TRAIN_LORA_RANK.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import click

from fluxmesh.errors import UsageError
from fluxmesh.spelling import did_you_mean
from fluxmesh_coordinator.commands import config_file
from fluxmesh_coordinator.commands.config_file import ConfigEntry

PAINTING = (
    *("model", "image-size", "steps", "guidance", "n-images", "n-rows", "dtype", "bits"),
    *("text-bits", "negative-prompt", "cfg"),
    *("low-memory", "cache", "wait", "output", "open", "show", "preview"),
)
TRAIN = "train"
SHARED = "model"  # of painting, and of training unless that names its own


@dataclass(frozen=True)
class Setting:
    """An option that environment and file may name."""

    section: str  # "" or "train"
    key: str
    option: click.Option

    @property
    def title(self) -> str:
        """As `fluxmesh config` names it: `steps`, `train.lora-rank`."""
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def variable(self) -> str:
        """The environment variable of its name."""
        return f"FLUXMESH_{self.title.upper().replace('.', '_').replace('-', '_')}"

    @property
    def is_text(self) -> bool:
        """Whether it takes any text: a name or a path, that a number is not."""
        return isinstance(self.option.type, click.types.StringParamType | click.Path)

    @property
    def own_default(self) -> str:
        """What the option's help says of its default, in words."""
        _, bracket, words = (self.option.help or "").rpartition("[")
        return words.removesuffix("]") if bracket else "off" if self.option.is_flag else "none"

    def read(self, value: Any, where: str) -> Any:
        """A value as the option takes it. Raises `UsageError` that begins with `where`."""
        if wrong := self._other_kind(value):
            raise UsageError(f"{where}: {self.title} takes {wrong}.")
        if self.key == "output":
            value = os.path.join(os.path.expanduser(value), "")  # a folder, never a file
        try:
            text = value if isinstance(value, bool) else str(value)
            read = self.option.type.convert(text, self.option, None)
            self._check(read)
        except click.BadParameter as error:
            raise UsageError(f"{where}: {self.title}: {error.message}") from None
        except UsageError as error:  # it names the setting itself
            field = str(self.option.name)
            raise UsageError(f"{where}: {str(error).replace(f'`{field}`', self.title)}") from None
        return read

    def _other_kind(self, value: Any) -> str:
        """What the setting takes instead of a value of this kind; "" where the kind is right."""
        if self.option.is_flag:  # a variable holds "1" or "yes"
            return "" if isinstance(value, bool | str) else "true or false"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return "one text or number"
        if self.is_text:
            return "" if isinstance(value, str) else "a text, in quotes"
        return ""

    def _check(self, value: Any) -> None:
        """Whether a request could have it, as far as that is known without a model."""
        callback = self.option.callback
        if callback is not None:
            value = callback(click.Context(click.Command("")), self.option, value)
        chosen = {str(self.option.name): value}
        if self.section == TRAIN:
            from fluxmesh_coordinator.commands.train import request_of

            request_of("x", {"model": "tiny", "seed": 0, **chosen})
        else:
            from fluxmesh_coordinator.commands.settings import GenerateSettings

            GenerateSettings().with_chosen(chosen).request("x", 0)


def known_settings() -> dict[tuple[str, str], Setting]:
    """All of them by (section, key), in the order of the help."""
    from fluxmesh_coordinator.cli.generate import generate
    from fluxmesh_coordinator.cli.train import train

    painting = {setting.key: setting for setting in _settings_of("", generate)}
    every = [painting[key] for key in PAINTING if key in painting]
    every += _settings_of(TRAIN, train)
    return {(setting.section, setting.key): setting for setting in every}


def _settings_of(section: str, command: click.Command) -> Iterator[Setting]:
    for option in command.params:
        if isinstance(option, click.Option) and (not option.is_flag or option.secondary_opts):
            yield Setting(section, max(option.opts, key=len).removeprefix("--"), option)


@dataclass(frozen=True)
class Default:
    """A setting's value, and where it comes from."""

    setting: Setting
    value: Any
    source: str  # FLUXMESH_MODEL, or the file with its line
    is_of_file: bool


@dataclass(frozen=True)
class Defaults:
    """What environment and file say together."""

    by_title: Mapping[str, Default]

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, path: Path | None = None) -> Self:
        """Reads both. Raises `UsageError` for anything that is no setting, or has a wrong value."""
        environ = os.environ if environ is None else environ
        path = path or config_file.config_path()
        known = known_settings()
        defaults: dict[str, Default] = {}
        for entry in config_file.parse(config_file.read_text(path), path):
            where = f"{path}, line {entry.line}" if entry.line else str(path)
            setting = _named(entry, known, where)
            defaults[setting.title] = Default(
                setting, setting.read(entry.value, where), where, True
            )
        for setting in known.values():
            text = environ.get(setting.variable, "")
            if text:  # an empty variable is none, as everywhere
                value = setting.read(text, setting.variable)
                defaults[setting.title] = Default(setting, value, setting.variable, False)
        return cls(defaults)

    def of(self, command: str) -> dict[str, Default]:
        """Those that a command may have, by the names of its parameters."""
        section = TRAIN if command == TRAIN else ""
        own = {
            str(each.setting.option.name): each
            for each in self.by_title.values()
            if each.setting.section == section
        }
        shared = self.by_title.get(SHARED)
        mine = own.get(SHARED)
        # A variable for all commands stands above what the file says of this one.
        if shared and (mine is None or (mine.is_of_file and not shared.is_of_file)):
            own[SHARED] = shared
        return own

    @cached_property
    def of_file(self) -> frozenset[str]:
        """Parameters of painting that the file alone names."""
        return frozenset(name for name, each in self.of("generate").items() if each.is_of_file)


def _named(entry: ConfigEntry, known: Mapping[tuple[str, str], Setting], where: str) -> Setting:
    """The setting that an entry of the file means."""
    setting = known.get((entry.section, entry.key))
    if setting is not None:
        return setting
    sections = {section for section, _ in known}
    if entry.section not in sections:
        end = did_you_mean(entry.section, sections - {""}, f"; there is [{TRAIN}] alone.")
        raise UsageError(f"{where}: there is no section [{entry.section}]{end}")
    here = [key for section, key in known if section == entry.section]
    elsewhere = [s for s, key in known if key == entry.key]
    if elsewhere:
        place = f"under [{elsewhere[0]}]" if elsewhere[0] else "above all sections"
        end = f"; {entry.key} stands {place}."
    else:
        end = did_you_mean(entry.key, here)
    title = f"{entry.section}.{entry.key}" if entry.section else entry.key
    raise UsageError(
        f"{where}: {title} is no setting{end or '; `fluxmesh config` lists what there is.'}"
    )
