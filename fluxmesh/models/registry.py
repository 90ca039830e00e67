"""The families of models that fluxmesh knows, one row each. Imports mlx for a runtime alone."""

from __future__ import annotations

import os
import re
from importlib import import_module
from typing import Any

from fluxmesh.models.base import Architecture
from fluxmesh.models.files.family import Family, PublishedModel, ReferenceReader
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux2.family import FLUX2

FAMILIES: tuple[Family, ...] = (FLUX1, FLUX2)

# The classes that an architecture is made of, for whoever writes one down and reads it again.
PARTS = tuple(part for family in FAMILIES for part in family.parts)


# By alias.
PUBLISHED: dict[str, PublishedModel] = {
    alias: model for family in FAMILIES for alias, model in family.published.items()
}
# With which models read references that read none by themselves, by alias.
READERS: dict[str, ReferenceReader] = {
    family.reader.alias: family.reader for family in FAMILIES if family.reader is not None
}
_ALL = [family.name for family in FAMILIES]
NAMES = " and ".join((", ".join(_ALL[:-1]), _ALL[-1]))  # of all, for sentences


# What is taken where the user names no model: the first of these that is here and fits. Models that
# paint in a few steps come first, for somebody waits: a minute's picture is worth more to who did
# not choose than a better one in half an hour. Among them, and again among the others, the newest
# family comes first, and its larger model; base models last, which are made to be trained further
# and compute each step twice. A model that needs a picture beside the prompt is never taken so.
BY_PREFERENCE = (
    *("klein-9b", "klein-9b-kv", "klein-4b"),  # 4 steps, FLUX.2
    "schnell",  # 4 steps, FLUX.1
    *("krea-dev", "dev", "kontext"),  # FLUX.1; krea-dev is the newer, kontext is for editing
    *("klein-base-9b", "klein-base-4b"),  # 50 steps, each computed twice
    "flux2-dev",  # 50 steps of 32 billion numbers: half an hour on one Mac
)
# What to fetch first: no account, a licence for everything.
FIRST_TO_FETCH = next(
    alias
    for alias in BY_PREFERENCE
    if not PUBLISHED[alias].is_gated and PUBLISHED[alias].licence.is_commercial
)
# What goes before these for a request that gives such a picture: models that were made for it. Of a
# map nobody knows which kind it is: edges are what fluxmesh can make of a photo, and come first.
TOOLS_BY_PREFERENCE = ("fill", "canny", "depth")
# What is trained where the user names no model: the bases first, which are there for that, and of
# them the one that more machines can train. Any other only where none of these is here.
TO_TRAIN = ("klein-base-4b", "klein-base-9b", "dev", "krea-dev")


def published(name: str) -> Architecture:
    """A known model in numbers, as its repository on the Hub declares them. Raises `KeyError`."""
    return PUBLISHED[ALIASES[spelled(name)]].architecture


def spelled(name: str) -> str:
    """A model's name as it is compared: `FLUX.2-klein-4B`, `flux2_klein_4b` are one."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return re.sub(r"^flux(?=\d)", "flux-", words)


def spellings(alias: str, model: PublishedModel) -> set[str]:
    """All short names of a model, as `spelled` gives them."""
    own = model.repo.rpartition("/")[2]
    return {spelled(name) for name in (alias, f"flux-{alias}", own, *model.also)}


# By every way to spell it, as `spelled` gives that; a repository's whole name is in `REPO_ALIASES`.
ALIASES: dict[str, str] = {
    spelling: alias
    for alias, model in PUBLISHED.items()
    for spelling in sorted(spellings(alias, model))
}
REPO_ALIASES: dict[str, str] = {model.repo.lower(): alias for alias, model in PUBLISHED.items()}


def reader_alias(name: str) -> str | None:
    """The alias of `READERS` that a name means, or None.

    An alias is one whatever lies here; other spellings give way to a file or folder of that name.
    """
    if name.lower() in READERS:
        return name.lower()
    for alias, reader in READERS.items():
        is_repo = name.lower() == reader.published.repo.lower()
        if is_repo or spelled(name) in spellings(alias, reader.published):
            return None if os.path.exists(os.path.expanduser(name)) else alias
    return None


def family_of(architecture: Architecture) -> Family:
    """Whose checkpoint it is."""
    return next(kind for kind in FAMILIES if isinstance(architecture, kind.parts[0]))


def runtime_of(architecture: Architecture) -> Any:
    """What computes with a checkpoint of this architecture: its family's `Runtime`. Loads mlx."""
    module, _, name = family_of(architecture).runtime.partition(":")
    return getattr(import_module(module), name)(architecture)
