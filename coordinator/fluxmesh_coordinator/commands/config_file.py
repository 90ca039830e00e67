"""The user's `config.toml`: what stands in it and on which line, and how a value is changed.

    model = "schnell"
    image-size = "512x768"

    [train]
    lora-rank = 16

Knows nothing of what the settings mean: `cli/parameters/defaults.py` does. A hyphen and an
underscore are the same in a name. Comments and the order of lines stay as they are when a value is
changed.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.errors import UsageError
from fluxmesh.storage.homes import home_folder

Value = str | int | float | bool
_SECTION = re.compile(r"\s*\[\s*([A-Za-z0-9_-]+)\s*\]\s*(#.*)?$")
_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*=""")
_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)$")


@dataclass(frozen=True)
class ConfigEntry:
    """One value in the file."""

    section: str  # "" above all sections
    key: str  # with hyphens
    value: Any
    line: int | None  # counted from 1; None where the file spells it in a way of its own


def config_path() -> Path:
    """Where the file is, or would be."""
    return home_folder() / "config.toml"


def read_text(path: Path) -> str:
    """What stands in the file; "" where there is none. Raises `UsageError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}.") from None


def parse(text: str, path: Path) -> list[ConfigEntry]:
    """Every value in the file's text. Raises `UsageError` with the line that is no TOML."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _AT_LINE.search(str(error))
        where = f"{path}, line {at[1]}" if at else f"{path}, at its end"
        what = _AT_LINE.sub("", str(error)).removesuffix(" (at end of document)")
        raise UsageError(
            f'{where}: this is not TOML ({what}); a text stands in quotes, as in model = "schnell".'
        ) from None
    lines = {(section, key): number for number, section, key in _keys(text)}
    return [
        ConfigEntry(section, key, value, lines.get((section, key)))
        for section, key, value in _values(data)
    ]


def _values(data: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from ((_hyphens(name), _hyphens(key), each) for key, each in value.items())
        else:
            yield "", _hyphens(name), value


def _keys(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, section, key) of each line that gives a value."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if heading := _SECTION.match(line):
            section = _hyphens(heading[1])
        elif key := _KEY.match(line):
            yield number, section, _hyphens(key[1] or key[2] or key[3])


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def changed(text: str, section: str, key: str, value: Value | None) -> str:
    """The file's text with another value; None takes the line away.

    A new line stands at the end of its section. The caller reads the result again: what the file
    spells in a way of its own (a dotted key, a text over several lines) is not found here.
    """
    lines = text.splitlines()
    line = None if value is None else f"{key} = {_toml(value)}"
    at = next((n for n, *where in _keys(text) if where == [section, key]), None)
    if at is not None:
        lines[at - 1 : at] = [] if line is None else [line]
    elif line is not None:
        end = _end_of(lines, section)
        if end is None:
            lines += [*([""] if lines else []), f"[{section}]"]
            end = len(lines)
        lines.insert(end, line)
    return "".join(f"{each}\n" for each in lines)


def _end_of(lines: list[str], section: str) -> int | None:
    """The index after a section's last line that holds something; None: there is no such one."""
    end = 0 if section == "" else None
    current = ""
    for index, line in enumerate(lines):
        if heading := _SECTION.match(line):
            current = _hyphens(heading[1])
        if current == section and line.strip():
            end = index + 1
    return end


def _toml(value: Value) -> str:
    # JSON's words for texts, numbers, true and false are TOML's too.
    return json.dumps(value, ensure_ascii=False)
