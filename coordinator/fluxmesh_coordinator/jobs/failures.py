"""What an agent's report of a failure means: an error for the user, or a host to go on without.

Pure; below `jobs/recovery.py`. An engine names the class of `fluxmesh.errors` that it raised.
"""

from __future__ import annotations

from fluxmesh import errors
from fluxmesh.wire.messages import ENGINE_KILLED, PEER_LATE

# What a host would say again, and another may not: its disk, its memory.
OF_HOST = (errors.WeightsError, errors.ModelNotFoundError, errors.DoesNotFitError)
# What the request itself is to blame for, else: every host would say the same.
FINAL = (errors.UsageError, errors.AdapterError, errors.NotFiniteError)
# What agents say when they refuse a request -> the error that it stands for.
REFUSALS = {
    "usage": "UsageError",
    "version": "UsageError",
    "network": "LocalNetworkError",
}
LATE = PEER_LATE  # nobody's fault; a ring of the same hosts would end so again
# How the engines of a ring end when one of them does: in a ring no host is to blame for it.
OF_RING = {"Raised", LATE}
# Ends for which a ring's backend is not to blame.
OF_NO_BACKEND = {ENGINE_KILLED, LATE}


def is_of_host(kind: str) -> bool:
    """Whether a host's files or memory are not what the job needs."""
    return issubclass(_class_of(kind), OF_HOST)


def is_final(kind: str) -> bool:
    """Whether the request is to blame, whichever host does it."""
    return issubclass(_class_of(kind), FINAL) and not is_of_host(kind)


def is_of_backend(kind: str) -> bool:
    """Whether a ring's backend may be to blame for the end of one of its engines."""
    return kind not in OF_NO_BACKEND and not is_of_host(kind)


def error_of(kind: str, text: str, setting: str = "") -> errors.FluxmeshError:
    """The error of that name; of one that is no error of ours, the base."""
    return _class_of(kind)(text, setting=setting)


def _class_of(kind: str) -> type[errors.FluxmeshError]:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.FluxmeshError):
        return known
    return errors.FluxmeshError
