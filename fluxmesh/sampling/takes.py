"""What a model takes beside a prompt, and who takes it where it does not.

Asked before anything is loaded or fetched: the sentence names the models on this machine that can
do what was asked. Above `hub.py`; no mlx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.models.base import Architecture
from fluxmesh.models.files.family import ReferenceReader
from fluxmesh.models.registry import PUBLISHED, family_of
from fluxmesh.request import Condition, GenerateRequest
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.reference_readers import resolve_reader

WORDS: dict[Condition, str] = {
    "references": "reference pictures",
    "reference_strengths": "strength of a reference picture",
    "control": "control picture",
    "control_from": "control picture",
    "negative": "negative prompt",
    "cfg": "classifier-free guidance",
}


def check_takes(
    conditions: Sequence[Condition],
    references: Sequence[np.ndarray],
    name: str,
    model: Architecture,
) -> None:
    """Raises `UsageError` where a model does not take what it is given."""
    given, most = len(references), model.most_references
    for condition in conditions:
        if condition not in model.takes:
            if condition == "control_from" and "control" in model.takes:
                raise UsageError(
                    f"`control_from`: {name} follows a map of {model.follows}, and fluxmesh makes "
                    "those of edges alone; give a ready map as `control`.",
                    setting="control_from",
                )
            able = _sentence(condition, conditions, given)
            raise UsageError(
                f"`{condition}`: {name} takes no {WORDS[condition]}; {able}.", setting=condition
            )
    if given > most:
        able = _sentence("references", conditions, given)
        raise UsageError(
            f"`references`: {name} takes no more than {most}, and {given} were given; {able}.",
            setting="references",
        )


def check_given(request: GenerateRequest, name: str, model: Architecture) -> None:
    """Raises `UsageError` where a model can't paint without what a request leaves out."""
    lacking = model.lacking(request)
    if lacking is not None:
        raise UsageError(f"{name} {lacking}.")


def check_published(request: GenerateRequest) -> None:
    """The same of a published model by its alias, which need not be on this machine."""
    model = PUBLISHED.get(hub.alias_of(request.model) or "")
    if model is not None:
        # An adapter may bring a control map: its file says so once it is here.
        brought: set[Condition] = set()
        if request.adapters and "control" not in model.architecture.takes:
            brought = {"control", "control_from"}
        if request.redux or reader_of(model.architecture) is not None:
            brought |= {"references", "reference_strengths"}
        conditions = [each for each in request.conditions if each not in brought]
        references = request.references if "references" in conditions else ()
        check_takes(conditions, references, request.model, model.architecture)


@dataclass(frozen=True)
class ReferenceReading:
    """A model as it reads references."""

    architecture: Architecture
    reader: Checkpoint | None = None  # with which it does, where not by itself


def reader_of(model: Architecture) -> ReferenceReader | None:
    """With what a model can read references that reads none by itself; None for any other."""
    reader = family_of(model).reader
    if reader is None or "references" in model.takes:
        return None
    return None if model.reading_with(reader.published.architecture) is None else reader


def with_reader(
    model: Architecture,
    name: str,
    reader: str,
    *,
    download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceReading:
    """How a model, which users call `name`, reads references; `reader` as of a request's `redux`.

    As it is where no reader is made for it, or none is needed: `check_takes` says what follows.
    Raises what `resolve_reader` does, and `UsageError` for a reader that was made for others.
    """
    family = family_of(model)
    if family.reader is None or "references" in model.takes:
        if reader:
            why = "reads them by itself" if "references" in model.takes else "takes none"
            raise UsageError(
                f"`redux` reads references, and {name} {why}; leave it out.", setting="redux"
            )
        return ReferenceReading(model)
    if not reader and reader_of(model) is None:
        return ReferenceReading(model)
    checkpoint = resolve_reader(reader, family, download=download, progress=progress)
    reading = model.reading_with(checkpoint.architecture)
    if reading is None:
        raise UsageError(
            f"`redux` {checkpoint.name} was not made for {name}: it reads references for models "
            "that paint from text of the same width; name another model, or leave both out.",
            setting="redux",
        )
    return ReferenceReading(reading, checkpoint)


def read_here(model: Architecture, reader: str = "") -> Architecture:
    """A model as it reads references with what is on this machine, `reader` as of `with_reader`."""
    try:
        return with_reader(model, "", reader, download=False).architecture
    except FluxmeshError:
        return model


def _able(conditions: Sequence[Condition], pictures: int) -> Iterator[str]:
    """Models on this machine that take all of these, and so many reference pictures."""
    for name in hub.names_here():
        try:
            model = hub.resolve(name, download=False).architecture
        except FluxmeshError:  # a broken folder is no reason to say nothing of the others
            continue
        reading = read_here(model)
        most = reading.most_references if "references" in reading.takes else 0
        if reading.takes.issuperset(conditions) and pictures <= most:
            yield name


def _sentence(refused: Condition, conditions: Sequence[Condition], pictures: int) -> str:
    """Who here takes all that was given; where none does, who takes what was refused."""
    able = list(_able(conditions, pictures))
    if able:
        return f"of the models on this machine, {_do(able)}"
    able = list(_able([refused], pictures if refused == "references" else 0))
    if able:
        return f"of the models on this machine, {_do(able)}, but none takes all else that is given"
    return (
        "no model on this machine does: `fluxmesh models list` says which do, and "
        "`fluxmesh models pull` fetches one"
    )


def _do(able: Sequence[str]) -> str:
    return f"{', '.join(able[:-1])} and {able[-1]} do" if len(able) > 1 else f"{able[0]} does"
