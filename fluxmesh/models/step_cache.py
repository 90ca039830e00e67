"""Step caching: blocks that would do nearly what they did before are skipped. An approximation.

Neighbouring steps ask nearly the same of the transformer. What its first double block adds to the
image tokens tells how near: where that has changed by less than a threshold since the last step
that was computed, the other blocks are not run, and what they added then is added again. Off unless
asked for (`--cache`), because the picture is another one, if a similar one.

Source: first-block cache of ParaAttention (https://github.com/chengzeyi/ParaAttention) and
diffusers (`FirstBlockCacheConfig`), after TeaCache, Liu et al. 2024
(https://arxiv.org/abs/2411.19108).

Stands beside `transformer.py` and `parallel.py`, whose transformers call it between their first
block and the others; `denoise.py` tells it which step must be computed. Knows neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import mlx.core as mx
import numpy as np


class StepCache:
    """What one image's steps share; another image needs another one."""

    def __init__(
        self,
        threshold: float,
        gather: Callable[[mx.array], mx.array] | None = None,
        leader: StepCache | None = None,
    ) -> None:
        """`threshold` is of the relative change (L1) of what the first block adds; 0 skips nothing.

        On a ring, `gather` puts all ranks' rows one after another (`Ranks.gather`): every rank then
        reads the same bytes, whatever tokens are its own, and so they decide alike. With a `leader`
        it compares nothing and does as that one did in this step.
        """
        self.threshold = threshold
        self.is_forced = False  # the next step is computed, whatever has changed
        self.reused = False  # whether the latest step reused what an earlier one had computed
        self._gather, self._leader = gather, leader
        # What the first block added when a step was last computed, and then all the others.
        self._kept: tuple[mx.array, mx.array] | None = None

    @classmethod
    def of_calls(
        cls, calls: int, threshold: float, gather: Callable[[mx.array], mx.array] | None = None
    ) -> list[Self]:
        """Those of an image whose steps take so many calls, in their order.

        The first call decides for its whole step: one step, then, was computed last, from which
        whoever goes on with the image makes all of them again.
        """
        leader = cls(threshold, gather)
        return [leader, *(cls(threshold, leader=leader) for _ in range(calls - 1))]

    def rest(self, added: mx.array, tokens: mx.array, compute: Callable[[], mx.array]) -> mx.array:
        """The tokens after all blocks, [B, S, D], by `compute` or by what it gave before.

        `added` is what the first block added to this rank's image tokens [B, s, D]; `tokens` are
        those after it, of the shape that `compute` gives. Waits for the device to compare.
        """
        if self._kept is not None and not self.is_forced:
            then, residual = self._kept
            leader = self._leader
            self.reused = self._is_close(added, then) if leader is None else leader.reused
            if self.reused:
                return tokens + residual
        self.reused = False
        x = compute()
        self._kept = added, x - tokens
        # Computed together with x: else what they are made of would stay in memory instead.
        return mx.depends(x, list(self._kept))

    def _is_close(self, now: mx.array, then: mx.array) -> bool:
        """Whether less has changed than the threshold; NaN has."""
        now, then = now.astype(mx.float32), then.astype(mx.float32)
        sums = mx.stack([mx.abs(now - then).sum(), mx.abs(then).sum()])[None]  # [1, 2]
        every = np.array(sums if self._gather is None else self._gather(sums), dtype=np.float64)
        change, size = every.sum(axis=0)  # here, in one order: a ring's sum may round by rank
        return bool(change < self.threshold * size)
