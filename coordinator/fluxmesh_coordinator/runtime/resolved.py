"""A request, ready for a mesh: model, adapters and defaults looked up, each once.

Between what a user asks (`GenerateRequest`, in which much may be left open) and `mesh.py`, which
makes a job of it. Whoever asks comes by here: the command line and a server by way of `commands/`,
a Python program by way of `Mesh.generate`. It stands in `runtime/` and not in `commands/`, for
`Mesh` stands here too, and nothing imports upward.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from fluxmesh.adapters.targets import targets_of
from fluxmesh.errors import NotFetchedError
from fluxmesh.events import Encoded
from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import family_of, reader_alias
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import AdapterRef, FilledRequest, GenerateRequest
from fluxmesh.sampling.takes import (
    ReferenceReading,
    check_given,
    check_takes,
    reader_of,
    with_reader,
)
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.reference_readers import full_reader_name
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.deploy.what_if import published
from fluxmesh_coordinator.runtime.adapter_upload import Downloading, Files, by_hash, checked


@dataclass(frozen=True)
class ResolvedModel:
    """A model as this machine knows it; its files may be on hosts of the mesh alone."""

    name: str  # as a user may say it again: an alias, a Hub id, a path
    full_name: str  # as other processes and machines know it
    sizes: ModelSizes
    revision: str = ""  # "" where the files are elsewhere: no one here can know it
    is_here: bool = True
    fetches: bool = True  # whether what it lacks is fetched to this machine
    checkpoint: Checkpoint | None = field(default=None, repr=False)  # where its files are here

    @property
    def is_changed(self) -> bool:
        """Whether its files, where they are here, are others by now."""
        return self.checkpoint is not None and self.checkpoint.stamps.changed is not None

    def revision_read(self, encoded: Encoded) -> str:
        """The revision of what the hosts have read: ours, where they have the same files as we.

        Ours may have been changed before they opened them, and other machines may have others.
        """
        if self.checkpoint is None or encoded.revision in ("", self.revision):
            return self.revision
        is_same = not self.is_changed and self.checkpoint.content == encoded.content
        return self.revision if is_same else encoded.revision

    @property
    def paths(self) -> dict[str, str]:
        """`own_paths` of it."""
        return own_paths(self.name, self.full_name)

    @classmethod
    def for_mesh(
        cls,
        name: str,
        record: MeshRecord | None,
        downloading: Downloading | None = None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Self:
        """What `name` is on the mesh of `record`; None is this machine alone.

        This machine fetches what it lacks to paint by itself, and nothing for a mesh of others.
        `note` hears of a licence before that. Raises what `hub.resolve` does.
        """
        if record is not None and not record.is_this_machine:
            return cls.known(name)

        def progress(done: int, total: int) -> None:
            if downloading is not None:
                downloading(name, done, total)

        try:
            return cls.of(hub.resolve(name, download=False))
        except NotFetchedError:
            if notice := hub.notice_of(name):
                note(notice)
            return cls.of(hub.resolve(name, progress=progress))

    @classmethod
    def known(cls, name: str) -> Self:
        """What is known of a model without fetching it.

        The aliases have their published sizes where the files are not on this machine.
        Raises what `hub.resolve` does for any other model that is not here.
        """
        try:
            return replace(cls.of(hub.resolve(name, download=False)), fetches=False)
        except NotFetchedError:
            alias = hub.alias_of(name)
            if alias not in hub.REPOS:
                raise
            return cls(alias, alias, published(alias), is_here=False, fetches=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """One whose files are on this machine."""
        _ = checkpoint.stamps  # as the files are now
        name, sizes = checkpoint.name, ModelSizes.of(checkpoint)
        return cls(name, hub.full_name(name), sizes, checkpoint.revision, checkpoint=checkpoint)


def _read_by(
    request: GenerateRequest,
    model: ResolvedModel,
    architecture: Architecture,
    downloading: Downloading | None,
    note: Callable[[str], None],
) -> ReferenceReading:
    """How the request's references are read; what reads them is fetched where models are."""
    if not request.references:
        return ReferenceReading(architecture)
    how = (architecture, model.name, request.redux)
    try:
        return with_reader(*how, download=False)
    except NotFetchedError:
        published = reader_of(architecture)
        is_named = request.redux and reader_alias(request.redux) is None
        if not model.fetches and (published is None or is_named):
            raise
        if not model.fetches and published is not None:  # hosts have it, or say that they don't
            reading = architecture.reading_with(published.published.architecture)
            return ReferenceReading(reading or architecture)
    name = full_reader_name(request.redux, family_of(architecture))
    if notice := hub.notice_of(name):
        note(notice)
    progress = None if downloading is None else functools.partial(downloading, name)
    return with_reader(*how, progress=progress)


def own_paths(name: str, full_name: str) -> dict[str, str]:
    """The paths by which others know a model, each with what the user calls it; none of an alias.

    A sentence of an engine about one of its files then names the path that the user gave.
    """
    if not os.path.isabs(full_name):
        return {}
    paths = (os.path.realpath(full_name), full_name)  # the longest that can be found goes first
    return {path: name.rstrip("/") for path in paths if path != name.rstrip("/")}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request with nothing left open, in the names that agents know."""

    request: FilledRequest  # the model by its full name, adapters by their files' hashes
    model: ResolvedModel
    adapters: tuple[AdapterRef, ...]  # those of the request, in order, as the user named them
    files: Files
    notes: tuple[str, ...] = ()  # sentences: what of the adapters is left out
    reader: str = ""  # with which references are read, as the user named it; "" is by the model
    reader_revision: str = ""  # "" where its files are elsewhere
    reader_content: str = ""  # `Checkpoint.content`, the same

    @classmethod
    def of(
        cls,
        request: GenerateRequest,
        model: ResolvedModel,
        downloading: Downloading | None = None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Self:
        """Fetches, checks and hashes the adapters, and fills in what is open.

        What the model doesn't take is refused first. `downloading` hears of what comes from the
        Hub, `note` of the licence of what reads references before that comes. Raises
        `AdapterError`, `UsageError`, and what a download raises.
        """
        sizes = model.sizes
        architecture = sizes.architecture
        reading = ReferenceReading(architecture)
        if not request.adapters:
            reading = _read_by(request, model, architecture, downloading, note)
            check_takes(request.conditions, request.references, model.name, reading.architecture)
        named, files = by_hash(request.adapters, downloading)
        opened = checked(files, targets_of(architecture))
        notes = tuple(note for adapter in opened for note in adapter.notes)
        for adapter in opened:
            if adapter.inputs:  # a control LoRA: the model then takes a map
                architecture = architecture.with_inputs(dict(adapter.inputs), adapter.name)
        if request.adapters:
            reading = _read_by(request, model, architecture, downloading, note)
        architecture = reading.architecture
        if architecture is not sizes.architecture:
            model = replace(model, sizes=replace(sizes, architecture=architecture))
        if request.adapters:
            check_takes(request.conditions, request.references, model.name, architecture)
        sizes = model.sizes
        sees = bool(request.references and architecture.of_role("vision"))
        reader = full_reader_name(request.redux, family_of(architecture)) if sees else ""
        known = replace(request, model=model.full_name, adapters=named, redux=reader)
        return cls(
            request=sizes.fill(known),
            model=model,
            adapters=request.adapters,
            files=files,
            notes=notes,
            reader=(request.redux or reader) if sees else "",
            reader_revision="" if reading.reader is None else reading.reader.revision,
            reader_content="" if reading.reader is None else reading.reader.content,
        )

    @property
    def paths(self) -> dict[str, str]:
        """`own_paths` of all that the request names."""
        return self.model.paths | own_paths(self.reader, self.request.redux)

    def complete(self) -> Self:
        """Itself. Raises `UsageError` where the model can't paint without what is left out."""
        check_given(self.request, self.model.name, self.model.sizes.architecture)
        return self

    def of_images(self, first: int, count: int) -> Self:
        """Of its images, `count` from `first` (counted from 0) on, alone."""
        request = self.request
        if (first, count) == (0, request.n_images):
            return self
        some = replace(request, seed=request.seed_of(first), n_images=count)
        return replace(self, request=some)

    def with_prompt(self, prompt: str) -> Self:
        """The same for another prompt. Raises `UsageError` for one that is no text."""
        return replace(self, request=replace(self.request, prompt=prompt))
