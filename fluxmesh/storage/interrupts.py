"""Ctrl-C, SIGTERM and a terminal that closes: one way in which each of them ends a command.

Until a command begins there is nothing to put in order, and a signal ends the process at once
(`begin`). From then on (`cancel_from_now`) the first signal raises `KeyboardInterrupt` in the main
thread, and all that follow are ignored, so that no second Ctrl-C breaks off what the first one has
put under way; a program that goes on after it says `handled`. Where half a thing would be left, the
signal waits (`uninterrupted`); what has to be ended although nobody holds it any more, because the
signal came between two lines, is in a list (`at_end`) that the command's end works off.

A signal that is ignored when the program starts stays so: that is how `nohup`, and shells that run
something in the background, ask for it. Python runs all of this in the main thread alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL = (signal.SIGINT, signal.SIGHUP)  # those that a terminal sends to all who share it
EXIT_CODE = 130  # of what was cancelled, by whichever of them

_impatience = 0.0  # seconds after the first signal, from which on another ends the process at once
_first: float | None = None  # when the signal came that nobody has handled yet
_number = signal.SIGINT  # which one that was
_closers: list[Callable[[], None]] = []


def begin() -> None:
    """From now on a signal ends the process at once: it has begun nothing."""
    _listen(_leave)


def cancel_from_now() -> None:
    """From now on the first signal raises `KeyboardInterrupt`."""
    from fluxmesh.deadlines import DEADLINES  # not in the first moments of a process

    global _impatience
    _impatience = DEADLINES.impatience
    sys.unraisablehook = _unraisable
    _listen(_cancel)


def ignore() -> None:
    """From now on no signal counts: the command is done, and the process about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def happened() -> bool:
    """Whether a signal has come that nobody has handled."""
    return _first is not None


def handled() -> None:
    """What Ctrl-C was to stop has stopped, and the program goes on: the next one counts again.

    Raises `KeyboardInterrupt` where it was SIGTERM, or a terminal that closed: those end it all.
    """
    global _first
    if _first is not None and _number != signal.SIGINT:
        raise KeyboardInterrupt
    _first = None


def at_end(close: Callable[[], None]) -> Callable[[], None]:
    """Has `close` called by `put_right`, unless the function that is returned is called before."""

    def forget() -> None:
        with contextlib.suppress(ValueError):
            _closers.remove(close)

    _closers.append(close)
    return forget


def put_right() -> None:
    """Ends what was begun and is nobody's any more, the last first."""
    while _closers:
        with contextlib.suppress(Exception):  # the next one is to be ended all the same
            _closers.pop()()


def show_cursor() -> None:
    """A bar hides it, and may have been interrupted in the middle of that."""
    with contextlib.suppress(OSError):
        if os.isatty(2) and os.environ.get("TERM") not in (None, "", "dumb"):
            os.write(2, b"\x1b[?25h")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals back until the block is done, then lets them through.

    Python runs signal handlers in the main thread only; elsewhere, and where a signal is ignored
    or would end the process, there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    previous = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    for each in previous:
        signal.signal(each, hold)
    try:
        yield
    finally:
        try:
            _restore(previous)
        except KeyboardInterrupt:  # it came between two of them
            _restore(previous)
            raise
        for number in dict.fromkeys(held):  # also where the block failed: it is what was asked for
            signal.raise_signal(number)


@contextmanager
def not_for_children() -> Iterator[None]:
    """What starts in the block hears of no Ctrl-C, which a terminal sends to all of a session.

    `start_new_session` alone leaves a moment: a signal that comes between fork and setsid kills the
    child. It begins with these signals blocked, and may let them through.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Within


def _restore(handlers: Mapping[signal.Signals, Callable[..., object]]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _listen(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _cancel(number: int, _frame: FrameType | None) -> None:
    global _first, _number
    if number == signal.SIGHUP:
        _let_go_of_terminal()
    if _first is None:
        _first, _number = time.monotonic(), signal.Signals(number)
        raise KeyboardInterrupt
    if time.monotonic() - _first > _impatience:
        _leave(number, None)


def _leave(_number: int, _frame: FrameType | None) -> None:
    if happened():
        show_cursor()
    with contextlib.suppress(OSError):
        os.write(2, b"Cancelled.\n")
    os._exit(EXIT_CODE)


def _let_go_of_terminal() -> None:
    """What is written to a terminal that has closed is lost, and no error."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _unraisable(what: UnraisableHookArgs) -> None:
    """A signal that came while Python ran what can raise nothing, such as `__del__`, comes again.

    Of what else goes wrong there, nothing is told while the program ends for a signal.
    """
    global _first
    if isinstance(what.exc_value, KeyboardInterrupt):
        _first = None
        again = threading.Timer(0.02, os.kill, (os.getpid(), _number))
        again.daemon = True
        again.start()
    elif not happened():
        sys.__unraisablehook__(what)
