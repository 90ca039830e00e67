"""A request, ready for a mesh: model, adapters and defaults looked up, each once.

Between what a user asks (`GenerateRequest`, in which much may be left open) and `mesh.py`, which
makes a job of it. Whoever asks comes by here: the command line and a server by way of `commands/`,
a Python program by way of `Mesh.generate`. It stands in `runtime/` and not in `commands/`, for
`Mesh` stands here too, and nothing imports upward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from fluxmesh.errors import ModelNotFoundError
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import AdapterRef, FilledRequest, GenerateRequest
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.deploy.what_if import published
from fluxmesh_coordinator.runtime.adapter_upload import Files, by_hash

Downloading = Callable[[str, int, int], None]  # hears the model, bytes done, bytes in all


@dataclass(frozen=True)
class ResolvedModel:
    """A model as this machine knows it; its files may be on hosts of the mesh alone."""

    name: str  # as a user may say it again: an alias, a Hub id, a path
    full_name: str  # as other processes and machines know it
    sizes: ModelSizes
    revision: str = ""  # "" where the files are elsewhere: no one here can know it
    is_here: bool = True

    @classmethod
    def for_mesh(
        cls, name: str, record: MeshRecord | None, downloading: Downloading | None = None
    ) -> Self:
        """What `name` is on the mesh of `record`; None is this machine alone.

        This machine fetches what it lacks to paint by itself, and nothing for a mesh of others.
        Raises what `hub.resolve` does.
        """
        if record is not None and not record.is_this_machine:
            return cls.known(name)

        def progress(done: int, total: int) -> None:
            if downloading is not None:
                downloading(name, done, total)

        return cls.of(hub.resolve(name, progress=progress))

    @classmethod
    def known(cls, name: str) -> Self:
        """What is known of a model without fetching it.

        The aliases of FLUX.1 have their published sizes where the files are not on this machine.
        Raises what `hub.resolve` does for any other model that is not here.
        """
        try:
            return cls.of(hub.resolve(name, download=False))
        except ModelNotFoundError:
            alias = hub.alias_of(name)
            if alias not in hub.REPOS:
                raise
            return cls(alias, alias, published(alias), is_here=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """One whose files are on this machine."""
        name = checkpoint.name
        return cls(name, hub.full_name(name), ModelSizes.of(checkpoint), checkpoint.revision)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request with nothing left open, in the names that agents know."""

    request: FilledRequest  # the model by its full name, adapters by their files' hashes
    model: ResolvedModel
    adapters: tuple[AdapterRef, ...]  # those of the request, in order, as the user named them
    files: Files

    @classmethod
    def of(cls, request: GenerateRequest, model: ResolvedModel) -> Self:
        """Hashes the adapters and fills in what is open. Raises `AdapterError`, `UsageError`."""
        named, files = by_hash(request.adapters)
        known = replace(request, model=model.full_name, adapters=named)
        return cls(
            request=model.sizes.fill(known), model=model, adapters=request.adapters, files=files
        )

    def with_prompt(self, prompt: str) -> Self:
        """The same for another prompt. Raises `UsageError` for one that is no text."""
        return replace(self, request=replace(self.request, prompt=prompt))
