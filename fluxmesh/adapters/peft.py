"""PEFT's settings of an adapter: how strong each of its modules is. Imports no mlx.

They stand beside the weights, in `adapter_config.json`, or in the file's header, where diffusers
puts them as JSON with the component's name before each setting. A module's scale is
`lora_alpha / r`, with `use_rslora` `lora_alpha / sqrt(r)`; `alpha_pattern` gives some modules
another alpha, by names that may be regular expressions (PEFT's `get_pattern_key`). `rank_pattern`
needs no reading: the factors have their rank in their shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxmesh.errors import AdapterError
from fluxmesh.models.registry import FAMILIES
from fluxmesh.storage.safetensors import Header

METADATA = "lora_adapter_metadata"  # where diffusers puts the settings, in a file's header
CONFIG = "adapter_config.json"  # where PEFT puts them, beside this file
PEFT_FILE = "adapter_model.safetensors"
MAX_PATTERN = 512  # characters of a regular expression
# A repeated group that ends in a repetition: it may take for ever on a name that doesn't match.
_ENDLESS = re.compile(r"[*+}]\)[*+{]")
_LITERAL = re.compile(r"[\w.\-]+")
_FOLDERS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.folder.components))
_COMPONENTS = (*_FOLDERS, "unet")


@dataclass(frozen=True)
class PeftSettings:
    """The settings of one file, by component; "" is of a file that names none."""

    source: str = ""  # the file that they are read from
    by_component: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scale(self, component: str, module: str, rank: int) -> float:
        """What a module's product is multiplied by; 1 where nothing is said.

        `module` is the name in the file; a `rank` of 0 stands for the settings' own. Raises
        `AdapterError` for settings that are none.
        """
        settings = self.by_component.get(component, self.by_component.get("", {}))
        alpha = settings.get("lora_alpha", settings.get("alpha"))
        name = _bare(module)
        patterns = settings.get("alpha_pattern") or {}
        try:
            alpha = next((value for key, value in patterns.items() if _fits(key, name)), alpha)
            rank = rank or settings.get("r", 0)
            if alpha is None or not rank:
                return 1.0
            return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise AdapterError(
                f"{self.source} has settings of PEFT's that can't be read ({error}); download it "
                "again."
            ) from error


def settings_of(file: Path, header: Header) -> PeftSettings:
    """The settings of a file: those beside it, else those in its header.

    Raises `AdapterError` for what is no JSON object.
    """
    beside = file.with_name(CONFIG)
    if beside.is_file() and is_named_by_peft(file):
        return PeftSettings(str(beside), {"": _parsed(str(beside), _text(beside))})
    text = header.metadata.get(METADATA)
    if not isinstance(text, str):
        return PeftSettings()
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in _parsed(f"{file}: {METADATA} in its header", text).items():
        component, dot, setting = key.partition(".")
        if not dot or component not in _COMPONENTS:
            component, setting = "", key
        component = "transformer" if component == "unet" else component
        by_component.setdefault(component, {})[setting] = value
    return PeftSettings(str(file), by_component)


def is_named_by_peft(file: Path) -> bool:
    """Whether settings beside a file are its own: it bears PEFT's name, or lies there alone."""
    if file.name == PEFT_FILE:
        return True
    return [path for path in file.parent.glob("*.safetensors") if path.name[:2] != "._"] == [file]


def metadata_with(settings: PeftSettings, metadata: Mapping[str, str]) -> dict[str, str]:
    """A header's metadata that say the same as settings that stand beside the file."""
    return {**metadata, METADATA: json.dumps(settings.by_component[""], sort_keys=True)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"Can't read {path}: {error}.") from error


def _parsed(source: str, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source} is no JSON; download it again.") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{source} should be a JSON object; download it again.")
    return settings


def _bare(module: str) -> str:
    """A module's name as PEFT's patterns have it."""
    for prefix in ("base_model.model", *_FOLDERS):
        module = module.removeprefix(f"{prefix}.")
    return module


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern, a name's end or a regular expression for one, means a module."""
    if _LITERAL.fullmatch(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    if len(pattern) > MAX_PATTERN or _ENDLESS.search(pattern):
        raise ValueError(f"pattern {pattern[:40]!r} is too long or repeats a repetition")
    return bool(re.match(rf"(?:.*\.)?(?:{pattern})$", name) or re.match(f"{pattern}$", name))
