"""What `fluxmesh models list` tells: every model that has a name or is here, and what it takes.

Beside `default_model.py`, which takes one of them; a server tells the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fluxmesh.models.base import Architecture
from fluxmesh.models.files.family import Licence
from fluxmesh.models.registry import BY_PREFERENCE, PUBLISHED, READERS, family_of
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.takes import reader_of
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh_coordinator.runtime.default_model import default_model

OWN_LICENCE = Licence("MIT", is_commercial=True)  # of the embedded checkpoint: the package's


@dataclass(frozen=True)
class ListedModel:
    """A model that `--model` takes, for whoever chooses one, or what reads references for some."""

    name: str
    source: str  # Hub id, path, or "embedded"
    is_default: bool
    revision: str | None  # None where it can't be used
    nbytes: int  # of its files on this machine
    download_bytes: int | None  # of all that `pull` would fetch, about; None: nobody says
    note: str  # why it can't be used
    also: tuple[str, ...]  # what else it is called
    licence: str  # "" where nobody says
    is_commercial: bool | None
    is_gated: bool | None
    family: str
    steps: int | None
    takes: tuple[str, ...]  # of TAKES
    reads_for: tuple[str, ...] = ()  # of what paints nothing: whose references it reads

    def to_json(self) -> dict[str, Any]:
        """As `fluxmesh models list --json` tells it."""
        return {
            "name": self.name,
            "also": list(self.also),
            "source": self.source,
            "default": self.is_default,
            "usable": self.revision is not None,
            "revision": self.revision,
            "bytes": self.nbytes,
            "download_bytes": self.download_bytes,
            "note": self.note,
            "family": self.family,
            "licence": self.licence,
            "commercial": self.is_commercial,
            "gated": self.is_gated,
            "steps": self.steps,
            "takes": list(self.takes),
            **({"reads_references_for": list(self.reads_for)} if self.reads_for else {}),
        }


# What a model may take beside a prompt, in the order in which it is told.
TAKES = ("references", "mask", "control", "negative prompt", "adapters")


def takes_of(model: Architecture) -> tuple[str, ...]:
    """Those of TAKES that a model does: a mask every model, by what the sampler does with it."""
    words = {"mask": True, "adapters": bool(model.adapter_names)}
    words |= {word: word.partition(" ")[0] in model.takes for word in TAKES if word not in words}
    return tuple(word for word in TAKES if words[word])


def licence_of(name: str) -> Licence | None:
    """Of a model with a name, or one that reads references; None: nobody says."""
    known = PUBLISHED.get(name) or (READERS[name].published if name in READERS else None)
    return known.licence if known else OWN_LICENCE if name in embedded_names() else None


def _read_for(reader: str) -> Iterator[str]:
    """Published models whose references these models read."""
    for name, public in PUBLISHED.items():
        if reader_of(public.architecture) is READERS[reader]:
            yield name


def listed() -> Iterator[ListedModel]:
    """Every model that has a name, and those of the Hub's cache, as the one before the other is
    taken where none is named. Asks no network."""
    default = default_model(GenerateRequest(prompt="", seed=0)).name
    embedded = embedded_names()
    order = {name: place for place, name in enumerate((*embedded, *BY_PREFERENCE))}
    models = sorted(hub.list_models(), key=lambda info: order.get(info.name, len(order)))
    readers = {alias: reader.published for alias, reader in READERS.items()}
    for info in (*models, *hub.list_readers()):
        model, paints = info.architecture, info.name not in readers
        public = PUBLISHED.get(info.name) or readers.get(info.name)
        licence = licence_of(info.name)
        yield ListedModel(
            name=info.name,
            source=info.source,
            is_default=info.name == default,
            revision=info.revision,
            nbytes=info.nbytes,
            download_bytes=round(public.gigabytes * 1e9) if public else None,
            note=info.note,
            also=tuple(sorted((*public.also, public.repo))) if public else (),
            licence=licence.name if licence else "",
            is_commercial=licence.is_commercial if licence else None,
            is_gated=public.is_gated if public else False if licence else None,
            family=family_of(model).name if model else "",
            steps=model.defaults.steps if model and paints else None,
            takes=takes_of(model) if model and paints else (),
            reads_for=() if paints else tuple(_read_for(info.name)),
        )
