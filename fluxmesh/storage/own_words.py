"""Errors that name a path as the user did: `my model/vae`, and not where that is from the root.

Whoever opens what a user names goes by its full path, since a program may change its folder; what
went wrong there is told in the user's words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fluxmesh.errors import FluxmeshError


@contextmanager
def in_own_words(name: str) -> Iterator[None]:
    """Inside, an error about the path `name`, or about a file in it or beside it, says so."""
    try:
        yield
    except FluxmeshError as error:
        text = str(error)
        for place, words in _places(name):
            text = text.replace(place, words)
        error.args = (text,)
        raise


def _places(name: str) -> Iterator[tuple[str, str]]:
    """(how a path is known, how the user calls it), the longest first."""
    path = os.path.expanduser(name)
    if os.path.isabs(name) or not name.strip("./") or not os.path.exists(path):
        return
    full = os.path.join(os.getcwd(), path)  # as it is opened: `..` after a link leads elsewhere
    for place in dict.fromkeys((os.path.realpath(path), full, os.path.abspath(path))):
        yield place.rstrip("/"), name.rstrip("/")
    folder, above = os.path.dirname(name), os.path.dirname(full)
    if os.path.isfile(path) and above != "/":
        for place in dict.fromkeys((above, os.path.abspath(above))):
            yield f"{place}/", f"{folder}/" if folder else ""
