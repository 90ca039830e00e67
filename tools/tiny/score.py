"""Reads a picture back: which things does it show, and where?

Every rendering of every object, at several sizes and every place, is compared with the picture;
the one that explains most of it wins (matching pursuit on squared error, by FFT). A second
thing is looked for in what the first leaves unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scenes import ANCHORS, PLACES, RELATIONS, RGB, Question, Thing
from sprites import pyramid

SHORT = 64  # pixels of the shorter side that pictures are compared at
SIZES = (0.26, 0.29, 0.33, 0.375, 0.42, 0.47, 0.53, 0.6, 0.67)


@dataclass(frozen=True)
class Verdict:
    """How one picture answers its question; None where the question does not ask."""

    objects: tuple[bool, ...]
    background: bool
    place: bool | None
    relation: bool | None


class SceneReader:
    """Holds the transformed renderings of all objects for pictures of one shape."""

    def __init__(self, sprites: np.ndarray, height: int, width: int) -> None:
        scale = SHORT / min(height, width)
        self.shape = (round(height * scale), round(width * scale))
        self.sides = tuple(round(size * SHORT) for size in SIZES)
        self.levels = pyramid(sprites, self.sides)
        self.spectra = {
            side: np.fft.rfft2(level, s=self.shape, axes=(1, 2)).astype(np.complex64)
            for side, level in self.levels.items()
        }

    def read(self, picture: np.ndarray, count: int) -> tuple[int, list[Thing]]:
        """Background (index into COLOURS) and the `count` things that explain a picture best."""
        small = Image.fromarray(picture).resize(self.shape[::-1], Image.Resampling.BOX)
        image = np.asarray(small).astype(np.float32) / 255
        edges = (image[:2], image[-2:], image[:, :2], image[:, -2:])
        border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
        colour = np.median(border, axis=0)
        background = int(np.argmin(np.abs(RGB / 255.0 - colour).sum(axis=1)))
        rest = image - colour
        things = []
        for _ in range(count):
            thing, rest = self._explain(rest, colour)
            things.append(thing)
        return background, things

    def _explain(self, rest: np.ndarray, colour: np.ndarray) -> tuple[Thing, np.ndarray]:
        """The rendering that removes most squared error from `rest`, and what it leaves."""
        height, width = self.shape
        spectrum = np.fft.rfft2(rest, axes=(0, 1))
        best = (-np.inf, 0, 0, 0, 0)
        for side in self.sides:
            level, levels = self.levels[side], self.spectra[side]
            change = level[..., :3] - level[..., 3:] * colour  # what drawing it adds
            energy = (change**2).sum(axis=(1, 2, 3))
            changes = levels[..., :3] - levels[..., 3:] * colour
            product = (spectrum[None] * np.conj(changes)).sum(axis=-1)
            gain = 2 * np.fft.irfft2(product, s=self.shape) - energy[:, None, None]
            gain = gain[:, : height - side + 1, : width - side + 1]  # wholly inside
            index = int(np.argmax(gain))
            name, top, left = (int(i) for i in np.unravel_index(index, gain.shape))
            if gain[name, top, left] > best[0]:
                best = (float(gain[name, top, left]), name, side, top, left)
        _, name, side, top, left = best
        level = self.levels[side][name]
        rest = rest.copy()
        window = rest[top : top + side, left : left + side]
        # Where the thing covers the picture nothing is left for another to explain.
        window[...] = (window - (level[..., :3] - level[..., 3:] * colour)) * (1 - level[..., 3:])
        centre = ((left + side / 2) / width, (top + side / 2) / height)
        return Thing(name, side / SHORT, *centre), rest

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
