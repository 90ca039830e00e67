"""What the server can paint with: models and adapters, by the names that clients know.

A client names what is in these lists, and nothing else: no name of a client becomes a path, and
none makes the server fetch anything. Below every face; everything here blocks.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import family_of
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.takes import read_here
from fluxmesh.spelling import did_you_mean
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh_coordinator.runtime.default_model import default_model
from fluxmesh_coordinator.runtime.model_list import licence_of
from fluxmesh_coordinator.server.problems import ProblemError

FRESH = 30.0  # seconds, after which it is looked again at what is on this machine
FIELDS = {"negative": "negative_prompt"}  # a condition of the library, as a client's field
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked for."""

    name: str  # as clients say it
    source: str  # as the library knows it: an alias, a Hub id, a path
    checkpoint: Checkpoint
    reading: Architecture  # as it reads references, with what is here

    @property
    def is_changed(self) -> bool:
        """Whether its files are others by now."""
        return self.checkpoint.stamps.changed is not None

    @property
    def takes(self) -> list[str]:
        """What a request may bring beside a prompt, as clients call it."""
        conditions = sorted(self.reading.takes)
        return ["image", "mask", "adapters", *(FIELDS.get(name, name) for name in conditions)]

    @property
    def edits(self) -> bool:
        """Whether it is shown pictures and paints them as the prompt says.

        Redux, which takes strengths, sees pictures and changes none.
        """
        takes = self.reading.takes
        return "references" in takes and "reference_strengths" not in takes

    def described(self) -> dict[str, Any]:
        """What a client is told of it."""
        architecture, defaults = self.reading, self.checkpoint.defaults
        licence = licence_of(self.checkpoint.name)
        return {
            "name": self.name,
            "family": family_of(architecture).name,
            "size_bytes": sum(part.nbytes for part in self.checkpoint.components.values()),
            "licence": licence.name if licence else None,
            "embedded": hub.alias_of(self.source) in embedded_names(),
            "steps": defaults.steps,
            "guidance": defaults.guidance if architecture.takes_guidance else None,
            "size": {"width": defaults.width, "height": defaults.height},
            "takes": self.takes,
            "max_references": architecture.most_references if "references" in self.takes else 0,
        }


class Catalogue:
    """Models and adapters of this server."""

    def __init__(self, default: str | None, adapters: Path) -> None:
        """`default` is the model that the server was started with: any name that the CLI takes.

        Raises as `hub.resolve` where it is not on this machine.
        """
        self.adapters_folder = adapters
        self._given = None if default is None else _served(default, hub.resolve(default))
        self._lock = threading.Lock()
        self._models: dict[str, ServedModel] = {}
        self._looked = -math.inf  # of the clock `time.monotonic`

    def models(self) -> dict[str, ServedModel]:
        """By name, the default first."""
        with self._lock:
            is_old = time.monotonic() - self._looked > FRESH
            lacks_given = self._given is not None and self._given.name not in self._models
            if is_old or lacks_given or any(each.is_changed for each in self._models.values()):
                self._models = self._look()
                self._looked = time.monotonic()
            return dict(self._models)

    def forget(self) -> None:
        """What is on this machine is looked up anew when it is asked for next."""
        with self._lock:
            self._looked = -math.inf

    @property
    def is_given(self) -> bool:
        """Whether the server was started with a model."""
        return self._given is not None

    @property
    def given(self) -> ServedModel | None:
        """The model that the server was started with, as its files are now.

        Raises as `hub.resolve` where they are gone, or broken.
        """
        if self._given is not None and self._given.is_changed:
            source = self._given.source
            self._given = _served(source, hub.resolve(source, download=False))
        return self._given

    @property
    def default(self) -> ServedModel:
        """What paints where a client names nothing."""
        return next(iter(self.models().values()))

    @property
    def editor(self) -> ServedModel | None:
        """What edits where a client names nothing; None: no model here does."""
        picture = np.zeros((128, 128, 3), np.uint8)
        best = default_model(GenerateRequest(prompt="", seed=0, references=(picture,)))
        known = self.models().get(best.name)
        return known if known is not None and known.edits else None

    def find(self, name: str) -> ServedModel | None:
        """The model of that name, in any of its spellings; None: it is not here."""
        models = self.models()
        known = models.get(name) or models.get(hub.alias_of(name) or "")
        if known is None:
            known = next((m for m in models.values() if m.name.lower() == name.lower()), None)
        return known

    def model(self, name: str) -> ServedModel:
        """Raises `ProblemError` where it is not here."""
        known = self.find(name)
        if known is None:
            end = did_you_mean(name, list(self.models()), ".")
            raise ProblemError(
                404, f"`model` {name[:80]} is not on this server{end}", "model_not_found",
                setting="model",
            )  # fmt: skip
        return known

    def adapters(self) -> dict[str, Path]:
        """Files of the adapters' folder, by their names without the suffix."""
        try:
            files = sorted(os.scandir(self.adapters_folder), key=lambda entry: entry.name)
        except OSError:
            return {}
        return {
            entry.name.removesuffix(SUFFIX): Path(entry.path)
            for entry in files
            if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.is_file()
        }

    def adapter(self, name: str) -> Path:
        """The file of an adapter. Raises `UsageError` for one that is not in the folder."""
        known = self.adapters()
        path = known.get(name.removesuffix(SUFFIX))
        if path is None:
            end = did_you_mean(name, list(known), ".")
            raise UsageError(
                f"`adapters` names {name[:80]!r}, which is not on this server{end}",
                setting="adapters",
            )
        return path

    def without_paths(self, text: str) -> str:
        """A sentence for clients, in their names for what lies in folders of this machine."""
        text = text.replace(f"{self.adapters_folder}{os.sep}", "")
        given = self._given
        if given is not None and given.source != given.name:
            for path in (hub.full_name(given.source), given.source):
                text = text.replace(path, given.name)
        return text

    def _look(self) -> dict[str, ServedModel]:
        first: ServedModel | None = None
        with contextlib.suppress(FluxmeshError):  # its files are gone: the others are there still
            first = self.given
        if first is None:
            first = _served("", default_model(GenerateRequest(prompt="", seed=0)).checkpoint)
        models = {first.name: first}
        for name in hub.names_here():
            try:
                model = _served(name, hub.resolve(name, download=False))
            except FluxmeshError:  # not whole, or broken: `fluxmesh models list` says how
                continue
            models.setdefault(model.name, model)
        return models


def _served(name: str, checkpoint: Checkpoint) -> ServedModel:
    source = name or checkpoint.name
    is_path = hub.alias_of(source) is None and os.path.exists(os.path.expanduser(source))
    shown = os.path.basename(source.rstrip("/")) if is_path else checkpoint.name
    reading = read_here(checkpoint.architecture)
    _ = checkpoint.stamps  # as the files are now
    return ServedModel(shown.removesuffix(SUFFIX), source, checkpoint, reading)
