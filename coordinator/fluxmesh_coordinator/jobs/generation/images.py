"""The images of a job: which steps are done, who paints which, what can be decoded together. Pure.

Below `state.py`. An image's latents after its last acknowledged step are kept here, so that
whoever loses it, another goes on from there. Groups that are decoded together are fixed by the
images' numbers, never by who paints them: the same pictures on any mesh.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(kw_only=True)
class ImageProgress:
    """One image: which of its steps are done, and by whom."""

    index: int
    step: int = 0  # steps acknowledged
    latents: np.ndarray | None = None  # float32 [1, L, 4C] after them
    # The latest step that was computed, not approximated by a cache, counted from 0, and the
    # latents that it began from: what a cache that is lost with its engine is made from again.
    basis: int = 0
    basis_latents: np.ndarray | None = None  # None: the noise
    reused: int = 0  # steps that a cache approximated
    seconds: float = 0.0  # denoising
    placements: set[str] = field(default_factory=set)  # by which its steps were made
    painter: int | None = None  # rank that works at it now (the first one of a ring)
    is_out: bool = False  # its picture was told

    @property
    def placement(self) -> str:
        return next(iter(self.placements)) if len(self.placements) == 1 else "mixed"


@dataclass
class DecodeGroup:
    """Images that are decoded in one batch."""

    images: tuple[int, ...]
    decoder: int | None = None  # rank that decodes it now


class ImageTable:
    """All images of a job."""

    def __init__(self, images: int, steps: int, batch: int, *, decode_last: bool = False) -> None:
        """`batch` images are decoded at once; `decode_last`: none before all are painted."""
        self.steps = steps
        self.decode_last = decode_last
        self.images = [ImageProgress(index=k) for k in range(images)]
        starts = range(0, images, batch)
        self.groups = [DecodeGroup(tuple(range(k, min(k + batch, images)))) for k in starts]

    @property
    def unpainted(self) -> tuple[int, ...]:
        """Images with steps to go, whoever works at them."""
        return tuple(image.index for image in self.images if image.step < self.steps)

    @property
    def steps_done(self) -> int:
        """Of all images."""
        return sum(image.step for image in self.images)

    @property
    def is_complete(self) -> bool:
        return all(image.is_out for image in self.images)

    def take(self, rank: int, among: Collection[int]) -> ImageProgress | None:
        """The next image for `rank` to paint: those that somebody has begun go first."""
        free = [
            image
            for image in self.images
            if image.painter is None and image.step < self.steps and image.index in among
        ]
        if not free:
            return None
        image = min(free, key=lambda image: (-image.step, image.index))
        image.painter = rank
        return image

    def acknowledge(
        self,
        index: int,
        step: int,
        latents: np.ndarray,
        seconds: float,
        placement: str,
        *,
        reused: bool = False,
    ) -> bool:
        """Keeps what a step gave; False where it is no news (a step that was done already).

        `reused`: a cache approximated it.
        """
        image = self.images[index]
        if step <= image.step:
            return False
        if not reused:
            image.basis, image.basis_latents = step - 1, image.latents
        image.reused += reused
        image.step, image.latents = step, latents
        image.seconds += seconds
        image.placements.add(placement)
        if step == self.steps:
            image.painter = image.basis_latents = None
        return True

    def ready(self) -> Iterator[DecodeGroup]:
        """Groups that can be decoded, and that nobody decodes."""
        if self.decode_last and self.unpainted:
            return
        for group in self.groups:
            members = [self.images[k] for k in group.images]
            is_open = group.decoder is None and not all(image.is_out for image in members)
            if is_open and all(image.step == self.steps for image in members):
                yield group

    def latents_of(self, group: DecodeGroup) -> np.ndarray:
        """float32 [images, L, 4C]"""
        members = [self.images[k].latents for k in group.images]
        return np.concatenate([latents for latents in members if latents is not None])

    def pictured(self, index: int) -> bool:
        """Marks a picture as out, and lets its latents go with the last of its group; False where
        it was out before."""
        image = self.images[index]
        if image.is_out:
            return False
        image.is_out = True
        group = self._group(index)
        if all(self.images[k].is_out for k in group.images):
            group.decoder = None
            for k in group.images:
                self.images[k].latents = None
        return True

    def give_back(self, rank: int) -> None:
        """Whatever `rank` was at is for others."""
        for image in self.images:
            if image.painter == rank:
                image.painter = None
        for group in self.groups:
            if group.decoder == rank:
                group.decoder = None

    def _group(self, index: int) -> DecodeGroup:
        return next(group for group in self.groups if index in group.images)
