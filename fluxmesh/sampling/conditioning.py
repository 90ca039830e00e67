"""What the transformer is told about a prompt, and a memory of the last few prompts.

T5's features and CLIP's pooled vector depend on the prompt alone, so a prompt seen before costs
nothing: `PromptMemory` keeps the latest. Stands below the pipeline; the encoders themselves are
in `t5.py` and `clip.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import mlx.core as mx

REMEMBERED = 16  # prompts; 512 tokens of T5-XXL's features are 4 MiB in bfloat16


class Conditioning(NamedTuple):
    """A prompt as the transformer reads it, in the dtype of the encoders' weights."""

    t5: mx.array  # [1, T, context_in_dim], one vector a token
    clip: mx.array  # [1, vec_in_dim], one vector a prompt


class PromptMemory:
    """The conditioning of the latest prompts, least recently used first out."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self.size = size
        self._known: OrderedDict[tuple[str, bool], Conditioning] = OrderedDict()

    def get(self, prompt: str, padded: bool) -> Conditioning | None:
        """What was stored for this prompt with this padding, or None."""
        conditioning = self._known.get((prompt, padded))
        if conditioning is not None:
            self._known.move_to_end((prompt, padded))
        return conditioning

    def put(self, prompt: str, padded: bool, conditioning: Conditioning) -> None:
        """Stores what `get` then finds, and forgets the least recently used beyond `size`."""
        self._known[prompt, padded] = conditioning
        self._known.move_to_end((prompt, padded))
        while len(self._known) > self.size:
            self._known.popitem(last=False)
