"""A failed job as bytes, and as a session that goes through it once more. Pure.

Above `input_log.py`. The bytes are msgpack: no pickle, and nothing but the classes below is made of
them. They hold what hosts said and when, with their names and addresses, and no more of the user's
than that: each text that he wrote (prompts, captions, names of his folders) is a number, arrays are
their shapes, secrets are zeros of the same length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import msgpack
import numpy as np

from fluxmesh import request
from fluxmesh.cluster import backends, hostfile, hostfile_fields, shares, snapshot
from fluxmesh.errors import UsageError
from fluxmesh.models import registry
from fluxmesh.models.base import ModelDefaults
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.training import request as train_request
from fluxmesh.training.data import dataset, encode_units
from fluxmesh.training.micro_batches import Sampler, TimeSteps
from fluxmesh.training.plan import TrainingPlan
from fluxmesh.version import __version__
from fluxmesh.wire import protocol
from fluxmesh_coordinator.jobs import types
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.jobs.input_log import InputLog, Noted, brief
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.training.session import TrainingSession

FORMAT = 3
MAX_BYTES = 1 << 16  # of a secret or a nonce
KIND = "~"  # the key under which a map says what it stands for

CLASSES: dict[str, type[Any]] = protocol.TYPES | {
    kind.__name__: kind
    for kind in (
        *(types.Leased, types.LeasedHost, types.Links, types.Answered, types.Reported),
        *(types.Gone, types.Back, types.Tick, types.Stop),
        *(tasks.Wanted, tasks.EncodeTask, tasks.OpenTask, tasks.AdvanceTask, tasks.ValidateTask),
        *(tasks.PaintTask, tasks.GiveTask, tasks.HaltTask, tasks.FinishTask),
        *(
            snapshot.HostInfo,
            snapshot.LinkInfo,
            snapshot.ModelVariant,
            snapshot.Holding,
            snapshot.KeptModel,
            shares.Shares,
            snapshot.StepTiming,
            snapshot.RingPlace,
            snapshot.StepShape,
            snapshot.Timings,
            snapshot.RingTiming,
            snapshot.JobTiming,
            snapshot.CollectiveTime,
            snapshot.TextHolding,
            snapshot.TextTiming,
        ),
        *(hostfile.Host, hostfile_fields.Endpoint, backends.Fallback, backends.BackendFault),
        *(request.FilledRequest, request.AdapterRef, request.SourceImage, request.PromptCut),
        *(GenerationJob, ModelSizes, ModelDefaults, *registry.PARTS),
        *(
            train_request.TrainRequest,
            dataset.Example,
            encode_units.Caption,
            encode_units.Crop,
            TimeSteps,
        ),
    )
}
# What a user wrote, or where his files lie: class -> fields.
PRIVATE: dict[str, set[str]] = {
    "FilledRequest": {"prompt", "negative"},
    "Encode": {"prompt", "negative"},
    "Encoded": {"prompt", "dropped", "negative_dropped"},  # the event
    "Caption": {"text"},
    "Example": {"where", "caption", "data"},
    "TrainRequest": {
        *("dataset", "trigger", "prior_folder", "progress_prompt", "output_dir", "cache_dir"),
    },
}
SENTENCES = {"text", "reason"}  # fields of what hosts say went wrong
PLAIN = (
    *("request", "examples", "sizes", "trained", "held_out", "priors"),
    *("times", "picture_size", "data"),
)  # of a training's plan


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A job that failed, ready to go through it again. Iterate it once."""

    session: JobSession[Any]
    log: InputLog
    error: str  # as whoever ran it was told
    version: str  # of fluxmesh

    def __iter__(self) -> Iterator[tuple[float, types.Input, list[types.Instruction]]]:
        """Every input, when it came, and what the session says to it now."""
        for noted in self.log.noted:
            yield noted.now, noted.event, self.session.handle(noted.event, noted.now)

    def differences(self) -> list[str]:
        """Where the session does now what it didn't then, a sentence each."""
        sentences = []
        for noted, (now, event, instructions) in zip(self.log.noted, self, strict=True):
            said = tuple(map(brief, instructions))
            if said != noted.said:
                then = ", ".join(noted.said) or "nothing"
                sentences.append(f"{now:.3f} {type(event).__name__}: {said} now, {then} then.")
        return sentences


def to_bytes(session: JobSession[Any], log: InputLog, error: str) -> bytes:
    """What `from_bytes` reads."""
    packer = Packer()
    job = _pack_job(session, packer)  # first: then it is known what the user wrote
    packed: bytes = msgpack.packb(
        {
            "format": FORMAT,
            "version": __version__,
            "error": packer.sentence(error),
            "job": job,
            "features": log.features,
            "missing": log.missing,
            "inputs": [[n.now, packer.pack(n.event), list(n.said)] for n in log.noted],
        }
    )
    return packed


def from_bytes(data: bytes) -> Replay:
    """A failed job. Raises `UsageError` where the bytes are something else."""
    try:
        record = msgpack.unpackb(data, use_list=False, strict_map_key=False)
        if record["format"] != FORMAT:
            raise UsageError(f"It is a record of fluxmesh {record['version']}; use that one.")
        log = InputLog()
        log.missing = record["missing"]
        log.features = record["features"]
        for now, event, said in record["inputs"]:
            log.noted.append(Noted(now, unpack(event), said))
        session = _unpack_job(record["job"], log)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(f"It is no record of a failed job: {error}.") from error
    return Replay(session=session, log=log, error=record["error"], version=record["version"])


# Values


class Packer:
    """Plain values of what a session hears: what msgpack knows, and maps that say their class."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {"": ""}  # the user's -> what stands for it
        # Of the prompt, by which a host says that it remembers it -> of what stands for it.
        self._marks: dict[str, str] = {}

    def pack(self, value: Any) -> Any:
        """As `unpack` reads it. Raises `TypeError` for a class that is not known."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes):
            return {KIND: "bytes", "size": len(value)}
        if isinstance(value, np.ndarray):
            return {KIND: "array", "dtype": value.dtype.str, "shape": value.shape}
        if isinstance(value, Mapping):
            return {KIND: "map", "items": [[k, self.pack(v)] for k, v in value.items()]}
        name = type(value).__name__
        if is_dataclass(value):
            packed = {
                each.name: self._field(name, each.name, getattr(value, each.name))
                for each in fields(value)
            }
            if isinstance(value, request.FilledRequest):
                texts = {each: packed[each] for each in ("prompt", "negative")}
                self._marks[_mark(value)] = _mark(replace(value, **texts))
            return {KIND: name} | packed
        if isinstance(value, hostfile_fields.Endpoint):
            return {KIND: name, **value._asdict()}
        if isinstance(value, tuple | list | range):
            return [self.pack(item) for item in value]
        raise TypeError(f"{name} can't be packed")

    def sentence(self, text: str) -> str:
        """What was said of the job, in which what the user wrote is as hidden as elsewhere."""
        for written, stand_in in self._texts.items():
            if written:
                text = text.replace(written, stand_in)
        return text

    def _field(self, kind: str, name: str, value: Any) -> Any:
        if name in PRIVATE.get(kind, ()):
            if not isinstance(value, str):
                return None if value is None else ""
            # The same stand-in for the same text: captions are told apart by what they are.
            return self._texts.setdefault(value, f"text {len(self._texts)}")
        if name in SENTENCES and isinstance(value, str):
            return self.sentence(value)
        if (kind, name) == ("TextHolding", "prompts"):  # others than this one change nothing
            return [self._marks[mark] for mark in value if mark in self._marks]
        return self.pack(value)


def _mark(asked: request.FilledRequest) -> str:
    return snapshot.prompt_mark(asked.prompt, asked.t5_padding, asked.negative)


def unpack(plain: Any) -> Any:
    """What was packed; every sequence is a tuple."""
    if isinstance(plain, tuple):
        return tuple(unpack(item) for item in plain)
    if not isinstance(plain, dict):
        return plain
    match plain[KIND]:
        case "bytes":
            return bytes(min(plain["size"], MAX_BYTES))
        case "array":
            return np.broadcast_to(np.zeros((), plain["dtype"]), plain["shape"])
        case "map":
            return {key: unpack(value) for key, value in plain["items"]}
    kind = CLASSES[plain[KIND]]
    return kind(**{name: unpack(value) for name, value in plain.items() if name != KIND})


# Jobs


def _pack_job(session: JobSession[Any], packer: Packer) -> dict[str, Any]:
    job = session.state.job
    if isinstance(job, GenerationJob):
        return {"generation": packer.pack(job)}
    assert isinstance(job, tasks.TrainingJob)
    plan = {name: packer.pack(getattr(job.plan, name)) for name in PLAIN}
    plain = ("id", "secret", "weights", "base_bytes", "size", "content")
    return {"training": {name: packer.pack(getattr(job, name)) for name in plain}, "plan": plan}


def _unpack_job(record: dict[str, Any], log: InputLog) -> JobSession[Any]:
    if "generation" in record:
        return GenerationSession(unpack(record["generation"]))
    plan = _plan(**{name: unpack(record["plan"][name]) for name in PLAIN})

    def features(unit: encode_units.Unit) -> dict[str, np.ndarray]:
        shapes = log.features.get(names.name_of(unit), {})
        return {
            name: np.broadcast_to(np.zeros((), dtype), shape)
            for name, (dtype, shape) in shapes.items()
        }

    def pixels(crop: encode_units.Crop) -> np.ndarray:
        height, width = plan.sizes[crop.image]
        return np.broadcast_to(np.uint8(0), (height, width, 3))

    fields = {name: unpack(value) for name, value in record["training"].items()}
    job = tasks.TrainingJob(plan=plan, features=features, pixels=pixels, **fields)
    names = tasks.Names(job)
    return TrainingSession(job)


def _plan(**plain: Any) -> TrainingPlan:
    """As `training.plan.prepare` makes it."""
    request, sizes, times = plain["request"], plain["sizes"], plain["times"]

    def sampler(images: tuple[int, ...], caption_dropout: float) -> Sampler:
        return Sampler(
            request.seed,
            [sizes[image] for image in images],
            request.num_augmentations,
            request.batch_size,
            times,
            caption_dropout,
        )

    priors = plain["priors"]
    return TrainingPlan(
        sampler=sampler(plain["trained"], request.caption_dropout),
        prior_sampler=sampler(priors, 0.0) if priors else None,
        **plain,
    )
