"""Errors whose text is the one sentence that the user reads.

Each kind carries the process exit code that the command line ends with. An error is its message and
its setting, and travels as these between processes. The message says what happened, where, and what
to do; it never holds a traceback or a newline. It names a setting by its field in backticks,
`n_images`: whoever shows it says --n-images, or a server's parameter. `setting` is the one that is
at fault, if it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class FluxmeshError(Exception):
    """Base of every error that fluxmesh raises on purpose."""

    exit_code = 1

    def __init__(self, *message: object, setting: str = "") -> None:
        """`setting` is the one that is at fault, by its field; "" where none is, or several."""
        super().__init__(*message)
        self.setting = setting

    def saying(self, text: str) -> Self:
        """The same in other words."""
        same = type(self).__new__(type(self), text)
        vars(same).update(vars(self))
        return same


class UsageError(FluxmeshError):
    """The request itself is wrong: an option, a prompt, a size."""

    exit_code = 2

    @classmethod
    def about(cls, setting: str, problem: str, remedy: str = "") -> Self:
        """Of one setting: what is wrong with it, and what would be right."""
        return cls(f"`{setting}` {problem}{remedy and f'; {remedy}'}.", setting=setting)


class ModelNotFoundError(FluxmeshError):
    """No checkpoint, adapter or file of that name; or the Hub refuses or can't be reached."""


class IncompleteModelError(ModelNotFoundError):
    """Files of a model are missing from its folder, by name in `lacks`."""

    lacks = ""  # where another process has raised it: its sentence says

    @classmethod
    def of(cls, where: object, lacks: str) -> Self:
        """That the folder `where` lacks these files."""
        error = cls(f"{where} lacks {lacks}; copy what is missing from where the folder came from.")
        error.lacks = lacks
        return error


class NotFetchedError(ModelNotFoundError):
    """A model, or a part of it, is not on this machine; `fluxmesh models pull` fetches it."""


class NoSuchNameError(ModelNotFoundError, UsageError):
    """What the user named is nowhere: no file, folder, alias or Hub id is called so."""


class WeightsError(FluxmeshError):
    """A weight file is truncated, corrupt, incomplete or of the wrong shape."""


class AdapterError(FluxmeshError):
    """A LoRA file that does not fit the model: unknown format, keys that match nothing."""


class NotFiniteError(FluxmeshError):
    """NaN or infinity came out of a model: of a step, an encoder or the autoencoder."""


class OutputError(FluxmeshError):
    """A result can't be written: it exists already, the folder takes nothing, the disk is full."""


class NoSuchFolderError(OutputError, UsageError):
    """A result is to go where there is no folder: the user named a place that isn't one."""


class HostUnreachableError(FluxmeshError):
    """No host of the mesh answers, or none that could do the work is left."""

    exit_code = 3


class LocalNetworkError(FluxmeshError):
    """macOS keeps a process out of the local network, or no cable leads to the other host."""


class DoesNotFitError(FluxmeshError):
    """The model does not fit in the memory of the hosts that are left."""

    exit_code = 4


class CancelledError(FluxmeshError):
    """The user pressed Ctrl-C."""

    exit_code = 130


@contextmanager
def about_setting(setting: str) -> Iterator[None]:
    """Inside, a name or file at fault is what that setting names, unless the error knows better."""
    try:
        yield
    except (ModelNotFoundError, WeightsError) as error:
        error.setting = error.setting or setting
        raise
