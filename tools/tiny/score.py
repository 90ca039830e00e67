"""Reads a picture back: which things does it show, and where?

Every rendering of every object, at several sizes and every place, is compared with the picture;
the one that explains most of it wins (matching pursuit on squared error, by FFT). A second
thing is looked for in what the first leaves unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from edits import Edit
from PIL import Image
from scenes import ANCHORS, PLACES, RELATIONS, RGB, Question, Thing
from sprites import pyramid

SHORT = 64  # pixels of the shorter side that pictures are compared at
SIZES = (0.26, 0.29, 0.33, 0.375, 0.42, 0.47, 0.53, 0.6, 0.67)
OFF_PLACE = 0.08  # of a side of the picture: from here on a thing stands elsewhere
OFF_SIZE = 1.2  # from here on it is of another size
SURPLUS = 6.0  # squared error that a thing too many explains, at the least


@dataclass(frozen=True)
class Verdict:
    """How one picture answers its question; None where the question does not ask."""

    objects: tuple[bool, ...]
    background: bool
    place: bool | None
    relation: bool | None

    @property
    def is_right(self) -> bool:
        asked = (*self.objects, self.background, self.place, self.relation)
        return all(part for part in asked if part is not None)


class SceneReader:
    """Holds the transformed renderings of all objects for pictures of one shape."""

    sizes = SIZES

    def __init__(self, sprites: np.ndarray, height: int, width: int) -> None:
        scale = SHORT / min(height, width)
        self.shape = (round(height * scale), round(width * scale))
        self.sides = tuple(round(size * SHORT) for size in self.sizes)
        self.levels = pyramid(sprites, self.sides)
        self.spectra = {
            side: np.fft.rfft2(level, s=self.shape, axes=(1, 2)).astype(np.complex64).conj()
            for side, level in self.levels.items()
        }
        # Of each rendering: colours squared, colours times what it covers, and that squared.
        self.squares = {
            side: (
                (level[..., :3] ** 2).sum(axis=(1, 2)),
                (level[..., :3] * level[..., 3:]).sum(axis=(1, 2)),
                (level[..., 3] ** 2).sum(axis=(1, 2)),
            )
            for side, level in self.levels.items()
        }

    def read(self, picture: np.ndarray, count: int) -> tuple[int, list[Thing]]:
        """Background (index into COLOURS) and the `count` things that explain a picture best."""
        background, colour, rest = self._without_background(picture)
        things = []
        for _ in range(count):
            thing, rest, _ = self._explain(rest, colour)
            things.append(thing)
        return background, things

    def _without_background(self, picture: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Background (index into COLOURS), its colour [3], and what the picture adds to that."""
        small = Image.fromarray(picture).resize(self.shape[::-1], Image.Resampling.BOX)
        image = np.asarray(small).astype(np.float32) / 255
        edges = (image[:2], image[-2:], image[:, :2], image[:, -2:])
        border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
        colour = np.median(border, axis=0)
        background = int(np.argmin(np.abs(RGB / 255.0 - colour).sum(axis=1)))
        return background, colour, image - colour

    def _explain(self, rest: np.ndarray, colour: np.ndarray) -> tuple[Thing, np.ndarray, float]:
        """The rendering that removes most squared error from `rest`, what it leaves, how much."""
        height, width = self.shape
        spectrum = np.fft.rfft2(rest, axes=(0, 1))
        # Drawing a thing adds its colours, less the background's where it covers that.
        covered = -(spectrum * colour).sum(axis=-1, keepdims=True)
        spectrum = np.concatenate([spectrum, covered], axis=-1).astype(np.complex64)[..., None]
        best = (-np.inf, 0, 0, 0, 0)
        for side in self.sides:
            colours, both, covers = self.squares[side]
            energy = (colours - 2 * both * colour).sum(axis=1) + covers * (colour**2).sum()
            product = (self.spectra[side][..., None, :] @ spectrum)[..., 0, 0]
            gain = 2 * np.fft.irfft2(product, s=self.shape) - energy[:, None, None]
            gain = gain[:, : height - side + 1, : width - side + 1]  # wholly inside
            index = int(np.argmax(gain))
            name, top, left = (int(i) for i in np.unravel_index(index, gain.shape))
            if gain[name, top, left] > best[0]:
                best = (float(gain[name, top, left]), name, side, top, left)
        gained, name, side, top, left = best
        level = self.levels[side][name]
        rest = rest.copy()
        window = rest[top : top + side, left : left + side]
        # Where the thing covers the picture nothing is left for another to explain.
        window[...] = (window - (level[..., :3] - level[..., 3:] * colour)) * (1 - level[..., 3:])
        centre = ((left + side / 2) / width, (top + side / 2) / height)
        return Thing(name, side / SHORT, *centre), rest, gained

    def judge(self, picture: np.ndarray, question: Question) -> Verdict:
        """Compares what a picture shows, uint8 [height, width, 3], with what was asked."""
        background, things = self.read(picture, len(question.names))
        by_name = {thing.name: thing for thing in things}
        objects = tuple(name in by_name for name in question.names)
        place = relation = None
        if question.place is not None:
            cells = [int(np.argmin([abs(c - a) for a in ANCHORS])) for c in
                     (things[0].x, things[0].y)]  # fmt: skip
            place = tuple(cells) == PLACES[question.place][:2]
        if question.relation is not None:
            leads, axis, _ = RELATIONS[question.relation]
            relation = all(objects)
            if relation:
                first, second = (getattr(by_name[name], axis) for name in question.names)
                relation = first < second if leads == 0 else first > second
        return Verdict(objects, background == question.background, place, relation)


def table(verdicts: list[Verdict]) -> dict[str, float]:
    """Percentages over all pictures: object, background, place and relation."""

    def share(values: list[bool]) -> float:
        return 100 * sum(values) / len(values)

    return {
        "object": share([hit for verdict in verdicts for hit in verdict.objects]),
        "background": share([verdict.background for verdict in verdicts]),
        "place": share([v.place for v in verdicts if v.place is not None]),
        "relation": share([v.relation for v in verdicts if v.relation is not None]),
    }


@dataclass(frozen=True)
class EditVerdict:
    """Whether what an edit asks for is done, and whether all else is as it was."""

    asked: bool
    stays: bool

    @property
    def is_right(self) -> bool:
        return self.asked and self.stays


class EditReader(SceneReader):
    """Reads a picture that was edited, and where and how large every thing is."""

    sizes = (0.25, 0.29, 0.33, 0.375, 0.43, 0.5, 0.58, 0.66, 0.75)

    def aspects(self, picture: np.ndarray, edit: Edit) -> dict[str, bool]:
        """What of the target (`edits.Edit.asked` has the names) a picture shows."""
        height, width = picture.shape[:2]
        target = edit.target.scene(height, width)
        background, colour, rest = self._without_background(picture)
        things = []
        for _ in target.things:
            thing, rest, _ = self._explain(rest, colour)
            things.append(thing)
        _, _, surplus = self._explain(rest, colour)
        aspects = {"background": background == target.background, "count": surplus < SURPLUS}
        for index, wanted in enumerate(target.things):
            # Of its own name where there is one; else the one that stands nearest to its place.
            same = [thing for thing in things if thing.name == wanted.name]
            nearest = min(same or things, key=lambda thing: _distance(thing, wanted))
            aspects[f"object {index}"] = bool(same)
            aspects[f"place {index}"] = _distance(nearest, wanted) < OFF_PLACE
            ratio = nearest.size / wanted.size
            aspects[f"size {index}"] = 1 / OFF_SIZE < ratio < OFF_SIZE
        return aspects

    def judge(self, picture: np.ndarray, edit: Edit) -> EditVerdict:  # type: ignore[override]
        """Compares an edited picture, uint8 [height, width, 3], with the edit's target."""
        aspects = self.aspects(picture, edit)
        return EditVerdict(
            asked=all(aspects[name] for name in edit.asked),
            stays=all(right for name, right in aspects.items() if name not in edit.asked),
        )


def _distance(thing: Thing, other: Thing) -> float:
    return max(abs(thing.x - other.x), abs(thing.y - other.y))


_kept: list[SceneReader] = []  # of a process that judges


def judge_all(
    reader: SceneReader, pictures: Sequence[np.ndarray], questions: Sequence[Any]
) -> list[Any]:
    """Each picture's verdict, on all cores. The reader is inherited: it is large."""
    with ProcessPoolExecutor(
        mp_context=get_context("fork"), initializer=_kept.append, initargs=(reader,)
    ) as workers:
        return list(workers.map(_judge, pictures, questions, chunksize=4))


def _judge(picture: np.ndarray, question: Any) -> Any:
    return _kept[-1].judge(picture, question)


def edit_table(questions: list[Edit], verdicts: list[EditVerdict]) -> dict[str, float]:
    """Percentages of edits that are done, and that leave the rest; then those done of each kind."""
    rows = {
        "asked": [verdict.asked for verdict in verdicts],
        "stays": [verdict.stays for verdict in verdicts],
    }
    for question, verdict in zip(questions, verdicts, strict=True):
        rows.setdefault(question.kind, []).append(verdict.asked)
    return {name: 100 * sum(values) / len(values) for name, values in rows.items()}
