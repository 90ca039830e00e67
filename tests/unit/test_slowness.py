"""Limits of seconds grow with what others take of the machine, and only then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.slowness import slowdown


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """So many threads that want a processor all the time, and Python lets one run."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            pass

    started = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in started:
            thread.join()


def test_what_is_shared_with_three_others_takes_longer() -> None:
    assert slowdown() >= 1.0
    with busy(3):
        assert slowdown() > 2.0
