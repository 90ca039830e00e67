"""What an agent's report of a failure means: an error for the user, or a host to go on without.

Pure; below `jobs/recovery.py`. An engine names the class of `fluxmesh.errors` that it raised.
"""

from __future__ import annotations

from fluxmesh import errors
from fluxmesh.wire.messages import ENGINE_KILLED, PEER_LATE

# What the request itself is to blame for: every host would say the same.
FINAL = {"UsageError", "AdapterError", "NotFiniteError"}
# What a host would say again, and another may not: its disk, its memory.
OF_HOST = {
    *("WeightsError", "ModelNotFoundError", "NotFetchedError", "NoSuchNameError"),
    "DoesNotFitError",
}
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


def is_of_backend(kind: str) -> bool:
    """Whether a ring's backend may be to blame for the end of one of its engines."""
    return kind not in OF_NO_BACKEND and kind not in OF_HOST


def error_of(kind: str, text: str) -> errors.FluxmeshError:
    """The error of that name; of one that is no error of ours, the base."""
    error_class = getattr(errors, kind, None)
    if isinstance(error_class, type) and issubclass(error_class, errors.FluxmeshError):
        return error_class(text)
    return errors.FluxmeshError(text)
