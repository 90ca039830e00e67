"""The key of a server that is reachable from elsewhere: made once, kept where only its user reads.

Clients send it as `Authorization: Bearer KEY`; `guard/access.py` compares it.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from fluxmesh.errors import UsageError
from fluxmesh.storage.homes import create_private, read_private

SHORTEST = 16  # characters of one that a user has written


def read_or_make(path: Path) -> tuple[str, bool]:
    """The key in a file, and whether it was made just now.

    Raises `HomeError` where others could read it, `UsageError` for one that is too short to be one.
    """
    is_new = False
    try:
        text = read_private(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = create_private(path, secrets.token_urlsafe(32) + "\n")
        text = read_private(path)
    key = text.strip()
    if len(key) < SHORTEST or not key.isascii() or any(letter.isspace() for letter in key):
        raise UsageError.about(
            "key_file", f"{path} holds no key", f"write {SHORTEST} letters or more, or remove it"
        )
    return key, is_new
