"""A placement's transformer that is described once and then replayed.

Between `models/*/parallel.py` and the walk over a picture's steps. Python takes 14 ms to describe a
step of FLUX.1 on four GPUs; MLX hands out copies of what it once traced in 2 to 5. Of the 40 ms
that each GPU computes, that is much (docs/performance.md).

A trace holds the weights that it met: a `Replayed` is made anew where its transformer is, and
leaves with it. What it computes is what the transformer would, to the bit. MLX joins neighbouring
elementwise operations in a trace, and what is joined may round once instead of twice; with this
project's CUDA kernels no two such operations are neighbours, but in float16 and in widths that the
kernels don't take, and in adapters beside the weights. There, and elsewhere than on CUDA, nothing
is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from fluxmesh.kernels.ops import device, has_kernels
from fluxmesh.models.collectives import Ranks, Traffic
from fluxmesh.models.double_stream import tell_watcher, watching
from fluxmesh.models.lora_linear import AdaptedLinear

KEPT = 8  # traces, each of one set of shapes

Key = tuple[object, ...]


class NotArrays(Exception):
    """An argument that is neither an array nor made of them: each call would differ."""


class Trace(NamedTuple):
    """What replays a call with arguments of the same shapes."""

    run: Callable[..., list[mx.array]]  # the result, what the watcher is told, the last collective
    traffic: Traffic  # of each call


def replayed(flow: Any, ranks: Ranks) -> Any:
    """`flow`, a transformer spread over `ranks`; replayed where that changes nothing but time."""
    config = flow.config
    is_exact = (
        flow.dtype != mx.float16
        and has_kernels(config.head_dim, config.hidden_size, config.mlp_hidden_dim)
        and not any(isinstance(module, AdaptedLinear) for module in flow.flux.modules())
    )
    fits = device() == "cuda" and ranks.looks_ahead and is_exact
    return Replayed(flow, ranks) if fits else flow


class Replayed:
    """A transformer to everyone; of its calls, the first with each set of shapes is described."""

    def __init__(self, flow: Any, ranks: Ranks) -> None:
        self._flow, self._ranks = flow, ranks
        self._traces: dict[Key, Trace] = {}  # the one used last stands last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def __call__(self, *arguments: Any) -> mx.array:
        """The velocity; arguments and result as the transformer's. A step cache, which looks at
        what is computed, isn't replayed."""
        leaves: list[mx.array] = []
        try:
            structure = _taken_apart(arguments, leaves)
        except NotArrays:
            velocity: mx.array = self._flow(*arguments)
            return velocity
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        before = self._ranks.mark()
        if before.last is not None:  # the first collective, too, waits for the one before
            leaves = mx.depends(leaves, [before.last])
        trace = self._traces.pop(key, None) or _traced(self._flow, self._ranks, structure, leaves)
        while len(self._traces) >= KEPT:
            del self._traces[next(iter(self._traces))]
        self._traces[key] = trace
        velocity, *told, last = trace.run(*leaves)
        self._ranks.go_on(last, trace.traffic)
        for hidden in told:
            tell_watcher(hidden)
        return velocity


def _traced(flow: Any, ranks: Ranks, structure: Any, leaves: Sequence[mx.array]) -> Trace:
    """Describes a call. It holds `flow` and no `Replayed`: a cycle would keep the weights."""
    traffic = Traffic()

    def describe(*leaves: mx.array) -> list[mx.array]:
        nonlocal traffic
        before = ranks.mark()
        ranks.begin_anew()
        try:
            with watching() as told:
                velocity = flow(*_put_together(structure, iter(leaves)))
            after = ranks.mark()
        finally:
            ranks.rewind(before)
        traffic = after.traffic
        last = velocity if after.last is None else after.last
        return [velocity, *told, last]

    mx.eval(flow.views())
    run = mx.compile(describe)
    run(*leaves)  # described here, once; nothing is computed
    return Trace(run, traffic)


def _taken_apart(value: Any, leaves: list[mx.array]) -> Any:
    """What holds the arrays of `value`, which go to `leaves`. Raises `NotArrays`."""
    if isinstance(value, mx.array):
        leaves.append(value)
        return mx.array
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return type(value), tuple(_taken_apart(part, leaves) for part in value)
    raise NotArrays(type(value).__name__)


def _put_together(structure: Any, leaves: Iterator[mx.array]) -> Any:
    """The value that was taken apart, with other arrays."""
    if structure is mx.array:
        return next(leaves)
    if structure is None:
        return None
    kind, parts = structure
    values = [_put_together(part, leaves) for part in parts]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
