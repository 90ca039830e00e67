"""What arrays take in memory: MLX's allocator on a GPU gives whole pages, 16 KiB on a Mac."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import mlx.core as mx

BYTES = 1 << 20  # whole pages of any size that there is


@functools.cache
def page_size() -> int:
    """To how many bytes MLX's allocator rounds what is above a page; 1 where it doesn't."""
    mx.synchronize()
    mx.clear_cache()  # or a larger piece that is there already would be taken
    before = mx.get_active_memory()
    array = mx.zeros((BYTES + 1,), mx.uint8)
    mx.eval(array)
    rounded = mx.get_active_memory() - before - BYTES
    del array
    mx.clear_cache()
    return rounded


@contextmanager
def without_cache() -> Iterator[None]:
    """Inside, no array takes a piece that was freed, which may be a page larger than it needs."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def allocated(arrays: Iterable[mx.array]) -> int:
    """Bytes that the allocator counts for arrays of which each has memory of its own."""
    page = page_size()
    sizes = (array.nbytes for array in arrays)
    return sum(-(-size // page) * page if size > page else size for size in sizes)
