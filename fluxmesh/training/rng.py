"""Random numbers of a training run: one stream for each purpose and number. NumPy only.

Every draw is a function of (seed, purpose, number), so that it is the same on any host and in any
order, and a resume needs to remember no generator. Philox (Salmon et al. 2011) takes two words of
key: the seed, and purpose with number. Noise of pictures (`sampling/latents.py`) has 0 as its
second word, so that training never repeats it.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER, TIME, NOISE, CAPTION, DROPOUT, CROP, WEIGHTS, VALIDATION = range(1, 9)
_NUMBER_BITS = 56


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The generator of `number` (below 2^56) for one of the purposes above."""
    if not 0 <= number < 1 << _NUMBER_BITS:
        raise ValueError(f"stream number {number} is out of range")
    key = np.array([seed, purpose << _NUMBER_BITS | number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def number_of(name: str) -> int:
    """A stream's number for something that has a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
