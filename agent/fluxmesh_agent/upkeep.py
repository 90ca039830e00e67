"""What an agent has its engine do when nobody asks for it: load what is missing, get ready. Pure.

`fluxmesh up` tells each host what it is to hold (`Keep`). An engine that was ended with a broken
ring, or died, holds nothing; whoever comes next would wait for it to load. So the agent loads it by
itself, once the host has been idle for a moment, also while a job that has no use for the host goes
on elsewhere. Then it gets ready for sizes that were asked for in the mesh, and that its engine has
not made yet (`NoteSize`): alone, for a ring can't be practised by one of its members.

`service.py` asks what is due and gives it to `lifecycle.py`, where a job goes before it.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import Holding, ModelVariant, StepShape
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError
from fluxmesh.request import AdapterRef
from fluxmesh.wire.messages import Keep, Load, NoteSize, Warm
from fluxmesh_agent.lifecycle import OWN, Lifecycle

SIZES = 8  # that are remembered, the latest ones


class Upkeep:
    """What is to be held, and what has been tried."""

    def __init__(self, keep: Keep | None = None, deadlines: Deadlines = DEADLINES) -> None:
        self.keep, self.deadlines = keep, deadlines
        self._sizes: deque[NoteSize] = deque(maxlen=SIZES)
        self._used = float("-inf")  # when somebody last had a use for the host
        self._not_before = float("-inf")
        self._pause = self.deadlines.load_again[0]
        self._tries: Load | Warm | None = None
        self._leaves = ""  # the name of a ring that is of no more use

    # What is told

    def want(self, keep: Keep) -> None:
        """`fluxmesh up` says what to hold."""
        if keep != self.keep:
            self._pause, self._not_before = self.deadlines.load_again[0], float("-inf")
        self.keep = keep

    def note(self, size: NoteSize) -> None:
        """Pictures of a size were asked for somewhere in the mesh."""
        if size in self._sizes:
            self._sizes.remove(size)
        self._sizes.append(size)

    def leave(self, ring: str) -> None:
        """The ring of this name was made of what a loss had left."""
        self._leaves = ring

    def used(self, now: float) -> None:
        """A job had a use for the host, or its engine ended."""
        self._used = now

    def failed(self, now: float) -> None:
        """What was due last did not work: a size is forgotten, a load tried again later."""
        tried, self._tries = self._tries, None
        if isinstance(tried, Warm):
            same = (tried.weights, tried.height, tried.width)
            kept = (s for s in self._sizes if (s.weights, s.height, s.width) != same)
            self._sizes = deque(kept, SIZES)
            return
        self._not_before = now + self._pause
        self._pause = min(self.deadlines.load_again[1], 2 * self._pause)

    def worked(self) -> None:
        """What was due last is done."""
        self._tries = None
        self._pause, self._not_before = self.deadlines.load_again[0], float("-inf")

    # What follows

    def is_leaving(self, life: Lifecycle) -> bool:
        """Whether the engine is in a ring that is of no more use, and would load again what it has.

        To leave a ring is to be another process.
        """
        keep, name = self.keep, life.ring.name
        is_ours = keep is not None and (life.holds is None or _is_kept(life.holds, keep))
        return name != "" and name == self._leaves and is_ours

    def due(self, life: Lifecycle, *, leased: bool, now: float) -> Load | Warm | None:
        """What the engine shall do now; None where it is asked for, or nothing is missing."""
        if not life.is_free:
            self._used = now
        pause = self.deadlines.left_out if leased else self.deadlines.idle
        if life.own is not None or now - self._used < pause:
            return None
        work: Load | Warm | None = None
        if now >= self._not_before:
            work = self._left_out(life) if leased else self._missing(life)
        if work is None and not leased:
            work = self._unready(life)
        self._tries = work
        return work

    def _left_out(self, life: Lifecycle) -> Load | None:
        """A job has the host leased, ended its engine, and goes on without.

        What else it may want with the memory is not known: only the model that it paints with.
        """
        keep = self.keep
        if keep is None or not life.is_bare or life.served != keep.weights:
            return None
        text = "text encoders"
        return self._load(life, tuple(name for name in keep.components if name != text))

    def _missing(self, life: Lifecycle) -> Load | None:
        """What the engine lacks; other weights, which somebody chose meanwhile, stay."""
        keep = self.keep
        if keep is None or (life.holds is not None and not _is_kept(life.holds, keep)):
            return None
        has = () if self.is_leaving(life) else life.components
        return self._load(life, tuple(name for name in keep.components if name not in has))

    def _load(self, life: Lifecycle, components: tuple[str, ...]) -> Load | None:
        keep = self.keep
        if keep is None or keep.weights is None or not components:
            return None
        part = keep if life.holds is None else life.holds  # whole weights serve for a shard
        return Load(
            fence=0,
            job=OWN,
            ring_generation=life.ring_generation,
            weights=keep.weights,
            shards=part.shards,
            shard=part.shard,
            shares=part.shares,
            components=components,
        )

    def _unready(self, life: Lifecycle) -> Warm | None:
        """The size asked for last for which this engine has not compiled yet."""
        held = life.holds
        if held is None or held.shards > 1:
            return None
        for size in reversed(self._sizes):
            shape = StepShape.of(size.weights, "data", 1, size.height, size.width)
            if size.weights == held.weights and shape not in life.compiled:
                return Warm(
                    fence=0,
                    job=OWN,
                    ring_generation=life.ring_generation,
                    weights=held.weights,
                    height=size.height,
                    width=size.width,
                    memory_bytes=size.memory_bytes,
                )
        return None


def _is_kept(held: Holding, keep: Keep) -> bool:
    part = (held.shards, held.shard, held.shares)
    is_same = keep.weights is not None and held.weights.denoiser == keep.weights.denoiser
    return is_same and part in ((1, 0, EVEN), (keep.shards, keep.shard, keep.shares))


def to_json(keep: Keep) -> str:
    """What an agent that is started again reads."""
    return json.dumps(asdict(keep)) + "\n"


def from_json(text: str) -> Keep:
    """What `to_json` wrote. Raises `FluxmeshError` for anything else."""
    try:
        data = json.loads(text)
        weights = data.pop("weights")
        if weights is not None:
            adapters = tuple(AdapterRef(**adapter) for adapter in weights.pop("adapters"))
            weights = ModelVariant(adapters=adapters, **weights)
        shares = Shares.from_plain(data.pop("shares", {}))
        components = tuple(data.pop("components"))
        return Keep(weights=weights, components=components, shares=shares, **data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FluxmeshError(f"It does not say what this host is to hold ({error}).") from None
