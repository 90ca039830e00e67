"""Which model works where the user names none: the best that is here whole, and fits.

`models/registry.py` says what is better than what, `weights/hub.py` what is on this machine, the
planner what fits; on a mesh that is up, what it holds goes before all of this. Nothing is fetched.
Hosts of a mesh that is up are asked what they have; of any others, what no hostfile tells is taken
to suffice, and the plan that follows says what is lacking.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.hostfile import Hostfile
from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.errors import AdapterError, ModelNotFoundError
from fluxmesh.machine import memory
from fluxmesh.machine.tools import is_mac
from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import FIRST_TO_FETCH, PUBLISHED, TO_TRAIN
from fluxmesh.planning.plan import plan
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import AdapterRef, Condition, FilledRequest, GenerateRequest
from fluxmesh.sampling.takes import read_here
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh_coordinator.agents.mesh_file import THIS_MACHINE
from fluxmesh_coordinator.deploy import what_if

if TYPE_CHECKING:
    from fluxmesh_coordinator.runtime.mesh import Mesh

UNKNOWN = 1 << 50  # bytes: more than any model takes
LINK_RATE = 1e9  # bytes/s; a place decides what fits, no rate does

GIVEN: dict[Condition, str] = {
    "references": "reference pictures",
    "control": "a control map",
    "control_from": "a map of edges",
    "negative": "a negative prompt",
    "cfg": "classifier-free guidance",
}

ViewOf = Callable[[FilledRequest, ModelSizes], MeshView]


@dataclass(frozen=True)
class DefaultModel:
    """What stands in for the name of a model."""

    checkpoint: Checkpoint
    too_large: tuple[str, ...] = ()  # better ones that are here too
    given: tuple[str, ...] = ()  # what the request has beside a prompt, in words
    alike: tuple[str, ...] = ()  # others here that follow a map, which may be one of theirs

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def sentence(self) -> str:
        """Why this one, and how to get others."""
        others = ", ".join(self.too_large)
        if self.name not in embedded_names():
            able = f" for {' and '.join(self.given)}" if self.given else ""
            fits = f" and fits ({others} would not)" if others else ""
            if self.alike:
                fits += f" (a map made for {' or '.join(self.alike)} takes that)"
            return (
                f"{self.name} is the best model that is here{able}{fits}; `fluxmesh models list` "
                "tells of others, and `model` names one."
            )
        if others:
            return (
                f"{self.name} is the small checkpoint inside fluxmesh: what else is here would not "
                f"fit ({others}); `bits` takes less memory, `low_memory` too."
            )
        first = PUBLISHED[FIRST_TO_FETCH]
        return (
            f"{self.name} is the small checkpoint inside fluxmesh; for FLUX itself, run "
            f"`fluxmesh models pull {FIRST_TO_FETCH}` ({first.gigabytes:.0f} GB, "
            f"{first.licence.name}, no account needed), or name one with `model`."
        )


def default_model(
    request: GenerateRequest, view_of: ViewOf | None = None, *, paints_into: bool = False
) -> DefaultModel:
    """The best model that is here and can do `request`, whose own model is not looked at.

    It takes what the request has beside a prompt, if any does. `paints_into` tells that it will
    have a picture of which a part is painted. `view_of` gives the hosts as they are before a
    request; None is this machine alone.
    """
    embedded = embedded_names()
    given = tuple(GIVEN[each] for each in request.conditions if each in GIVEN)
    given += ("a mask",) if paints_into else ()
    too_large: list[Checkpoint] = []
    for checkpoint, architecture in _able(request, paints_into=paints_into):
        names = tuple(model.name for model in too_large)
        if checkpoint.name in embedded:
            return DefaultModel(checkpoint, names)
        view_of = view_of or expected_view()  # which asks the machine's own tools
        sizes = replace(ModelSizes.of(checkpoint), architecture=architecture)
        filled = sizes.fill(replace(request, model=checkpoint.name))
        if plan(filled, view_of(filled, sizes), sizes).winner is not None:
            return DefaultModel(checkpoint, names, given, _alike(request, checkpoint))
        too_large.append(checkpoint)
    if too_large:  # the plan says what the best of them lacks; any other does not take the request
        return DefaultModel(too_large[0], given=given)
    # None takes all of it: of the embedded ones that which lacks least says who takes the rest.
    last = (model for model in hub.preferred_here() if model.name in embedded)
    return DefaultModel(min(last, key=lambda model: _lacking(model, request)))


def _alike(request: GenerateRequest, chosen: Checkpoint) -> tuple[str, ...]:
    """Other tools here that follow a map: which of them it was made for, no picture says."""
    if request.control is None or request.adapters:
        return ()
    tools = [tool for tool in hub.tools_here() if _takes(tool.architecture, request)]
    names = [tool.name for tool in tools]
    return tuple(name for name in names if name != chosen.name) if chosen.name in names else ()


def _able(
    request: GenerateRequest, *, paints_into: bool
) -> Iterator[tuple[Checkpoint, Architecture]]:
    """Models here, the best first, that take what the request has beside a prompt.

    Those that its adapters were made for, where there are any: an adapter fits one size alone.
    Each with its architecture, to which an adapter may have added a map that is followed.
    """
    if request.adapters:
        yield from _able_with_adapters(request, list(_candidates(request, paints_into=paints_into)))
        return
    is_any = False
    for model in _candidates(request, paints_into=paints_into):
        if _takes(model.architecture, request):
            is_any = True
            yield model, model.architecture
    if request.references and not is_any:  # those that read references with others
        for model in _candidates(request, paints_into=paints_into):
            architecture = read_here(model.architecture, request.redux)
            if _takes(architecture, request):
                yield model, architecture


def _candidates(request: GenerateRequest, *, paints_into: bool) -> Iterator[Checkpoint]:
    """Models here, the best first; before the usual ones, those made for such a picture."""
    if request.control is not None or paints_into:
        yield from (tool for tool in hub.tools_here() if _reads_mask(tool) == paints_into)
    yield from hub.preferred_here()


def _able_with_adapters(
    request: GenerateRequest, models: Sequence[Checkpoint]
) -> Iterator[tuple[Checkpoint, Architecture]]:
    """Of these models, those that the adapters were made for; if there is none, all that take the
    request without them: what is wrong with them is said later."""
    adapted = [(model, _adapted(request.adapters, model)) for model in models]
    known = [(model, on) for model, on in adapted if on is not None]
    # One that brings a map is for a model without: a tool follows its own already.
    known.sort(key=lambda pair: (not pair[1].is_wider, not pair[1].is_whole))
    fitting = [(model, on.architecture) for model, on in known]
    others = [(model, model.architecture) for model in models]
    for pairs in (fitting, others):
        by_themselves = [pair for pair in pairs if _takes(pair[1], request)]
        read = ((model, read_here(sizes, request.redux)) for model, sizes in pairs)
        with_others = [pair for pair in read if _takes(pair[1], request)]
        if by_themselves or with_others:
            yield from by_themselves or with_others
            return


def _reads_mask(model: Checkpoint) -> bool:
    return model.architecture.fills_by_channels


def _lacking(model: Checkpoint, request: GenerateRequest) -> int:
    """How much of what a request has beside a prompt a model does not take."""
    return len(set(request.conditions) - model.architecture.takes)


def _takes(model: Architecture, request: GenerateRequest) -> bool:
    enough = len(request.references) <= model.most_references
    return enough and model.takes.issuperset(request.conditions)


class _Adapted(NamedTuple):
    """A model with adapters on it."""

    architecture: Architecture
    is_wider: bool  # they bring inputs that it has not
    is_whole: bool  # nothing of them is left out


def _adapted(adapters: Sequence[AdapterRef], model: Checkpoint) -> _Adapted | None:
    """A model with adapters on it; None where they are for another one.

    Nobody knows of those that are not here.
    """
    from fluxmesh.adapters.find import find_adapter
    from fluxmesh.adapters.reading import open_adapter
    from fluxmesh.adapters.targets import targets_of

    architecture: Architecture = model.architecture
    is_whole = True
    for adapter in adapters:
        try:
            path = find_adapter(adapter.path, download=False)
            opened = open_adapter(path, targets_of(model.architecture))
        except ModelNotFoundError:
            continue
        except AdapterError:
            return None
        is_whole = is_whole and not opened.notes
        if opened.inputs:
            inputs = {name: count for (_, name), count in opened.inputs.items()}
            architecture = architecture.with_inputs(inputs, adapter.path)
    return _Adapted(architecture, architecture is not model.architecture, is_whole)


def view_of_mesh(mesh: Mesh) -> ViewOf:
    """The hosts of a mesh as they answer; all that its hostfile tells where none has yet."""
    view = mesh.view
    return as_measured(view) if view.hosts else expected_view(mesh.record.hostfile)


def as_measured(view: MeshView) -> ViewOf:
    """Hosts that were asked."""
    return lambda request, sizes: view


def default_to_train() -> str:
    """The name of the best model that is here to be trained: of `TO_TRAIN`, if any of it is.

    One that was distilled to few steps, which a training wears off, where there is no other.
    """
    embedded = embedded_names()
    models = list(hub.preferred_here())
    known = [model for model in models if model.name not in embedded]
    by_name = {model.name: model for model in known}
    meant = [by_name[name] for name in TO_TRAIN if name in by_name]
    whole = [model for model in known if model.architecture.distilled_steps is None]
    return (*meant, *whole, *known, *models)[0].name


def expected_view(hostfile: Hostfile | None = None) -> ViewOf:
    """The hosts of a hostfile, or this machine, before any of them was asked."""
    asked = hostfile or hostfiles.parse(THIS_MACHINE)
    here = memory.accelerator_bytes()
    platform = "metal" if is_mac() else "cuda" if shutil.which("nvidia-smi") else "cpu"
    assumption = {**what_if.NUMBERS, "kind": "expected", "platform": platform, "warm": False}

    def view_of(request: FilledRequest, sizes: ModelSizes) -> MeshView:
        work = Workload.of(request, sizes)
        known = {**assumption, "memory": UNKNOWN, "link_rate": LINK_RATE}
        view = what_if.assumed_view(asked, known, work, work.weights)
        hosts = []
        for info, host in zip(view.hosts, asked.hosts, strict=True):
            room = here if host.is_local else UNKNOWN
            most = min(info.memory_bytes, room)
            hosts.append(replace(info, memory_bytes=most, free_bytes=room, machine_bytes=0))
        return replace(view, hosts=tuple(hosts))

    return view_of
