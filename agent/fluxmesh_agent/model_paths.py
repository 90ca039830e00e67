"""From a model's or adapter's name that came over the wire to what an engine may open.

A name is an alias, a Hub id (looked for in this host's cache) or a path. A path counts only inside
of the roots: the embedded checkpoints, the host's own folder of models, and what `--root` adds; no
message makes an engine read anything else. Adapters are named by their hash. Imports no mlx.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import AdapterError, ModelNotFoundError
from fluxmesh.models.registry import reader_alias
from fluxmesh.request import AdapterRef
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_folders
from fluxmesh.weights.models_folder import entry_in

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Roots:
    """Where an engine may look."""

    adapters: Path
    models: Path | None = None
    others: Sequence[Path] = ()

    def locate(self, weights: ModelVariant) -> ModelVariant:
        """The same weights under names that open them here.

        Raises `ModelNotFoundError` for a path outside of the roots or of no file, `AdapterError`
        for an adapter that was never sent.
        """
        adapters = tuple(self._adapter(adapter) for adapter in weights.adapters)
        return replace(weights, model=self.model(weights.model), adapters=adapters)

    def model(self, name: str) -> str:
        """What `hub.resolve_any` takes; raises `ModelNotFoundError`."""
        alias = hub.alias_of(name) or reader_alias(name)
        if alias == hub.TINY:
            return name
        if self.models is not None and not os.path.isabs(name):
            inside = self._inside(entry_in(self.models, name))
            if inside is not None:
                return inside
        if alias is not None:
            return name
        if os.path.isabs(name) or name.startswith("~"):
            inside = self._inside(Path(os.path.expanduser(name)))
            if inside is None and self.models is not None:  # it was pushed here
                inside = self._inside(entry_in(self.models, os.path.expanduser(name)))
            if inside is not None:
                return inside
        elif hub.is_hub_id(name) and not name.endswith(".safetensors"):
            return name
        raise ModelNotFoundError(
            f"This host has no model {name} where its agent may read{self._places()}; "
            "`fluxmesh models push` copies it there from a host that has it, or name the folder "
            "that it is in as `models` of this host in the hostfile, and run `fluxmesh up` again."
        )

    def _places(self) -> str:
        """The folders that are the user's, for a sentence."""
        folders = [str(folder) for folder in (self.models, *self.others) if folder is not None]
        return f" ({', '.join(folders)})" if folders else ""

    def _inside(self, path: Path) -> str | None:
        """The path, all links followed, if it is there and inside of a root.

        A file that is a link keeps its name where its folder is inside too: what it needs lies
        beside the link, as in the Hub's cache.
        """
        real = Path(os.path.realpath(path))
        roots = [*embedded_folders(), *self.others, *([self.models] if self.models else [])]

        def is_allowed(place: Path) -> bool:
            return any(place.is_relative_to(os.path.realpath(root)) for root in roots)

        if not (is_allowed(real) and real.exists()):
            return None
        folder = Path(os.path.realpath(path.parent))
        return str(folder / path.name if real.is_file() and is_allowed(folder) else real)

    def _adapter(self, adapter: AdapterRef) -> AdapterRef:
        path = self.adapters / f"{adapter.path}.safetensors"
        if not SHA256.fullmatch(adapter.path) or not path.is_file():
            raise AdapterError("The adapter was not sent to this host; send it, and try again.")
        return AdapterRef(str(path), adapter.scale)
