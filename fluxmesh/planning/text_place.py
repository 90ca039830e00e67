"""Which host reads a request's prompt, and how: text encoders are placed by memory and speed. Pure.

Below `candidates.py`, which asks once for each way of denoising. A text encoder can be larger than
what the denoiser leaves free (FLUX.2 dev: 31 GiB of 30 layers in bfloat16), and then there are
three ways besides keeping it:

- "turns": it comes before the denoiser's weights and leaves before they load, or load again;
- "layers": they are read and run one at a time, in the memory of one, for each new prompt;
- another host has the room.

A prompt that an engine remembers costs nothing there. Time is what counts: until the first step can
begin, and then what the next new prompt would cost, so that encoders that stay are preferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fluxmesh.cluster.snapshot import HostInfo, MeshView, TextTiming
from fluxmesh.planning.capacity import Memory, Need
from fluxmesh.planning.cost import Estimate
from fluxmesh.planning.workload import Workload

TextWay = Literal["remembered", "stays", "turns", "layers"]
WAYS: tuple[TextWay, ...] = ("remembered", "stays", "turns", "layers")
TextFigure = Literal["measured", "measured step", "arithmetic"]
# Seconds that a host which paints nothing must save by reading, for it is kept from other jobs;
# where the text encoders fit into one that paints.
WORTH_A_HOST = 1.0


@dataclass(frozen=True, kw_only=True)
class TextPlace:
    """Who reads the prompt, how, and what that takes."""

    rank: int
    way: TextWay
    nbytes: int  # of text encoders in memory at once, with what they compute
    makes_room: bool  # the denoiser that is there leaves first
    load_seconds: float = 0.0  # reading its weights
    encode_seconds: float = 0.0
    reload_seconds: float = 0.0  # of the denoiser, which left
    wait_seconds: float = 0.0  # until others let go of the host, beside those of the denoiser
    again_seconds: float = 0.0  # what the next prompt that is new will take
    figure: TextFigure = "arithmetic"  # where `encode_seconds` comes from

    @property
    def seconds(self) -> float:
        """Until the features are there, from when the host is leased."""
        return self.load_seconds + self.encode_seconds

    @property
    def stays(self) -> bool:
        """Whether the text encoders may stay in memory beside all else."""
        return self.way == "stays"


class TextPlaces:
    """All about one request's prompt on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView, memory: Memory) -> None:
        self.work, self.view, self.memory = work, view, memory
        model, weights = work.model.architecture, work.weights
        self.whole = work.text_bytes
        layer = model.text_layer_bytes(weights.dtype, weights.bits_of_text)
        # What sees references comes once the last layer has left.
        self.layer = None if layer is None else max(layer, work.vision_bytes)
        self.file = work.text_file_bytes
        self.working = work.text_working_bytes
        self.mark = work.mark
        self._encodes: dict[tuple[int, bool], float | None] = {}

    def best(
        self,
        needs: Sequence[Need],
        steps: Mapping[int, Estimate],
        waits: Mapping[int, float],
        without: frozenset[int] = frozenset(),
    ) -> TextPlace | None:
        """Where the prompt is read when these hosts denoise; None where no host can.

        `steps` and `waits` are of each rank: a step alone, and seconds until it can be leased.
        Not on the ranks in `without`.
        """
        by_rank = {need.rank: need for need in needs}
        if self.work.is_read:
            rank = min(by_rank, default=None)
            if rank is None:
                return None
            return TextPlace(rank=rank, way="remembered", nbytes=0, makes_room=False)
        asked = {need.rank: need.needed for need in needs}
        wait = max([waits[rank] for rank in by_rank], default=0.0)
        places = [
            place
            for host in self.view.hosts
            if host.rank not in without
            for place in self._on(
                host, by_rank, asked, steps[host.rank], max(0.0, waits[host.rank] - wait)
            )
        ]

        fits = any(place.rank in by_rank and place.way in WAYS[:2] for place in places)
        loads = {need.rank: self.memory.load_seconds(need) for need in needs}

        def cost(place: TextPlace) -> float:
            apart = WORTH_A_HOST if fits and place.rank not in by_rank else 0.0
            return round(self._delay(place, loads) + place.again_seconds + apart, 6)

        return min(
            places,
            key=lambda place: (
                cost(place),
                WAYS.index(place.way),
                steps[place.rank].seconds,
                place.rank,
            ),
            default=None,
        )

    def _delay(self, place: TextPlace, loads: Mapping[int, float]) -> float:
        """Seconds by which the first step comes later than the loading of these hosts allows.

        Another host reads while they load; one of them does first this and then that.
        """
        ready = max(loads.values(), default=0.0)
        own = loads.get(place.rank, 0.0) + place.reload_seconds
        return place.wait_seconds + max(0.0, place.seconds + own - ready)

    def leaving(self, needs: Sequence[Need], place: TextPlace | None) -> tuple[int, ...]:
        """Ranks whose text encoders of earlier prompts must leave before their weights load."""
        return tuple(
            need.rank
            for need in needs
            if (text := self.view.host(need.rank).text) is not None
            and text.nbytes
            and not (place is not None and place.stays and place.rank == need.rank)
            and need.needed + text.nbytes > need.available
        )

    # One host

    def _on(
        self,
        host: HostInfo,
        needs: Mapping[int, Need],
        asked: dict[int, int],
        step: Estimate,
        later: float,
    ) -> list[TextPlace]:
        """The ways in which one host can read it, none where it can't.

        `asked` is what each of the others needs, in bytes; this one can be leased `later` seconds
        after them.
        """
        held = host.text if host.text is not None and host.text.serves(self.work.weights) else None
        room = self.memory.room(host.rank, asked)
        beside = self._beside(host)
        seeing = self.work.vision_bytes  # which comes and leaves, where the prompt is remembered
        if self.work.preload:
            held = None
        elif (
            held is not None
            and self.mark in held.prompts
            and (not seeing or seeing + beside <= room)
        ):
            # No encoder runs; where those of others are, they stay as they are.
            return [self._place(host, "remembered", seeing, False, wait_seconds=later)]
        after = needs[host.rank].needed if host.rank in needs else beside
        resident = held is not None and held.nbytes > 0
        load = self.file / host.load_rate
        places: list[TextPlace] = []
        whole = self.whole + self.working
        encode, figure = self._encode_seconds(host, step, by_layers=False)
        how = {"encode_seconds": encode, "figure": figure, "wait_seconds": later}
        if self.whole + after <= room and whole + beside <= room:
            begin = 0.0 if resident else load
            places.append(
                self._place(
                    host, "stays", whole, False, load_seconds=begin, again_seconds=encode, **how
                )
            )
        elif self.work.preload:
            return []
        elif whole <= room:
            makes_room = not resident and whole + beside > room
            begin = 0.0 if resident and not makes_room else load
            # The next prompt finds the denoiser loaded, which leaves where both don't fit.
            weights = 0.0
            if whole + after > room and host.rank in needs:
                weights = self._denoiser_seconds(host, needs)
            places.append(
                self._place(
                    host,
                    "turns",
                    whole,
                    makes_room,
                    load_seconds=begin,
                    reload_seconds=self._again(host, needs) if makes_room else 0.0,
                    again_seconds=load + encode + weights,
                    **how,
                )
            )
        if self.layer is None or places and places[0].way == "stays":
            return places
        piece = self.layer + self.working
        if piece <= room:
            total, figure = self._encode_seconds(host, step, by_layers=True)
            makes_room = piece + beside > room
            weights = 0.0
            if piece + after > room and host.rank in needs:
                weights = self._denoiser_seconds(host, needs)
            places.append(
                self._place(
                    host,
                    "layers",
                    piece,
                    makes_room,
                    load_seconds=load,
                    encode_seconds=max(0.0, total - load),
                    reload_seconds=self._again(host, needs) if makes_room else 0.0,
                    wait_seconds=later,
                    again_seconds=max(total, load) + weights,
                    figure=figure,
                )
            )
        return places

    def _place(
        self, host: HostInfo, way: TextWay, nbytes: int, makes_room: bool, **seconds: object
    ) -> TextPlace:
        return TextPlace(
            rank=host.rank,
            way=way,
            nbytes=nbytes,
            makes_room=makes_room,
            **seconds,  # type: ignore[arg-type]
        )

    def _beside(self, host: HostInfo) -> int:
        """Bytes that the host holds now and goes on holding while it reads, without encoders.

        Another model leaves as soon as this one is opened.
        """
        held = host.holds
        if held is None or held.weights.denoiser != self.work.weights.denoiser:
            return 0
        return max(0, held.nbytes - (0 if host.text is None else host.text.nbytes))

    def _again(self, host: HostInfo, needs: Mapping[int, Need]) -> float:
        """Until the denoiser that left is there again, where this request uses it."""
        need = needs.get(host.rank)
        if need is None or need.load_bytes or host.holds is None:
            return 0.0  # it is not here, or loads anyway
        return self._denoiser_seconds(host, needs)

    def _denoiser_seconds(self, host: HostInfo, needs: Mapping[int, Need]) -> float:
        """Until the host has read its part of the denoiser."""
        need = needs[host.rank]
        return self.memory.whole_load(need.shards, need.weights_part) / host.load_rate

    def _encode_seconds(
        self, host: HostInfo, step: Estimate, *, by_layers: bool
    ) -> tuple[float, TextFigure]:
        """As it was measured there, or on its like; else its arithmetic at the speed of a step.

        By layers, with the reading of the weights.
        """
        load = self.file / host.load_rate if by_layers else 0.0
        timed = self._timed(host, by_layers=by_layers)
        if timed is not None:
            return timed, "measured"
        whole = self._timed(host, by_layers=False)
        if whole is not None:
            return load + whole, "measured"
        model, shape = self.work.model.architecture, self.work.shape
        flops = model.text_flops() * max(shape.calls, model.shape.calls)
        seconds = load + flops / self.work.step_flops * step.seconds
        return seconds, "arithmetic" if step.figure == "arithmetic" else "measured step"

    def _timed(self, host: HostInfo, *, by_layers: bool) -> float | None:
        """What it was measured to take on this host, else on the latest of its kind."""
        how = (host.rank, by_layers)
        if how not in self._encodes:
            self._encodes[how] = self._find_timed(host, by_layers)
        return self._encodes[how]

    def _find_timed(self, host: HostInfo, by_layers: bool) -> float | None:
        alike = {other.rank for other in self.view.hosts if other.kind == host.kind}
        timings = [
            timing
            for timing in self.view.timings.texts
            if timing.rank in alike and timing.by_layers == by_layers and self._is_of(timing)
        ]
        best = max(
            timings, key=lambda timing: (timing.rank == host.rank, timing.when), default=None
        )
        return None if best is None else best.seconds

    def _is_of(self, timing: TextTiming) -> bool:
        weights = self.work.weights
        mine = (weights.model, weights.dtype, weights.bits_of_text)
        return (timing.model, timing.dtype, timing.bits) == mine
