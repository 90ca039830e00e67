"""A memory of the last few prompts: one that was seen lately costs nothing.

Features depend on what is read and on the bits of the text encoders alone. Stands below the
pipeline; what they are is their family's (`models/runtime.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from fluxmesh.models.runtime import PromptFeatures

REMEMBERED = 16  # prompts; 512 tokens of T5-XXL's features are 4 MiB in bfloat16


class PromptKey(NamedTuple):
    """All that a prompt's features depend on, beside the weights as they are stored."""

    prompt: str
    padded: bool
    negative: str | None  # what to move away from; None is the model's own
    bits: int | None  # of the text encoders, where they have their own


class PromptMemory:
    """The features of the latest prompts, least recently used first out."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self.size = size
        self._known: OrderedDict[PromptKey, PromptFeatures] = OrderedDict()

    @property
    def prompts(self) -> tuple[PromptKey, ...]:
        """What is remembered, the least recently used first."""
        return tuple(self._known)

    def get(
        self,
        prompt: str,
        padded: bool,
        negative: str | None = None,
        bits: int | None = None,
    ) -> PromptFeatures | None:
        """What was stored for this prompt with this padding and this negative prompt, as text
        encoders of so many bits read them, or None."""
        key = PromptKey(prompt, padded, negative, bits)
        features = self._known.get(key)
        if features is not None:
            self._known.move_to_end(key)
        return features

    def put(
        self,
        prompt: str,
        padded: bool,
        features: PromptFeatures,
        negative: str | None = None,
        bits: int | None = None,
    ) -> None:
        """Stores what `get` then finds, and forgets the least recently used beyond `size`."""
        key = PromptKey(prompt, padded, negative, bits)
        self._known[key] = features
        self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
