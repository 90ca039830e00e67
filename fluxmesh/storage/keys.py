"""CURVE keys of users and agents, and the list of those that an agent lets in.

A key is 40 characters of Z85. Secrets lie in 0600 files (`homes.py`) and are never shown, sent or
logged; public keys travel over the channel that starts an agent (ssh, or the pipe to a child), so
that each side knows the other's before the first byte on the network.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from fluxmesh.storage import apple_double
from fluxmesh.storage.homes import (
    HomeError,
    create_private,
    private_folder,
    read_own,
    read_private,
    write_private,
)

log = logging.getLogger(__name__)

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}  # Z85, ZeroMQ's RFC 32
_NAME = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9_.@-]{0,63}")


@dataclass(frozen=True)
class Keys:
    """A public key, and the secret that proves it."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> Keys:
        """A fresh pair."""
        import zmq  # here: a command that reads a public key needs no sockets

        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def of(cls, secret: str) -> Keys:
        """The pair of a secret. Raises `HomeError` where it is none."""
        import zmq

        if not is_key(secret):
            raise HomeError("A secret key must be 40 characters of Z85; rotate the keys.")
        return cls(zmq.curve_public(secret.encode()).decode(), secret)


def is_key(text: str) -> bool:
    """Whether a text has the form of a key: 8 groups of 5 digits, each a number of 32 bits."""
    if len(text) != 40 or not all(digit in _VALUES for digit in text):
        return False
    groups = (text[i : i + 5] for i in range(0, 40, 5))
    return all(sum(_VALUES[d] * 85 ** (4 - i) for i, d in enumerate(g)) < 2**32 for g in groups)


def load_keys(folder: Path, name: str) -> Keys:
    """The pair in `name`.key, made on first use; `name`.pub is for people.

    Two processes that come first at once end with the same pair. Raises `HomeError` where the file
    can be read by others, or holds no key.
    """
    path = folder / f"{name}.key"
    try:
        secret = read_private(path)
    except FileNotFoundError:
        private_folder(folder)
        create_private(path, Keys.new().secret + "\n")
        secret = read_private(path)
    try:
        keys = Keys.of(secret.strip())
    except HomeError as error:
        raise HomeError(f"{path}: {error}") from None
    public = folder / f"{name}.pub"
    if not public.is_file() or public.read_text("utf-8", "replace").strip() != keys.public:
        write_private(public, keys.public + "\n")
    return keys


def store_keys(folder: Path, name: str, keys: Keys) -> None:
    """Makes `keys` the pair in `name`.key: to rotate, after every agent has the new public key."""
    private_folder(folder)
    write_private(folder / f"{name}.key", keys.secret + "\n")
    write_private(folder / f"{name}.pub", keys.public + "\n")


class Allowlist:
    """The public keys in a folder, one file NAME.pub each. An empty folder lets nobody in."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is not there. Raises `HomeError` where it is not the user's."""
        self.folder = private_folder(folder)
        self._warned: set[str] = set()

    def users(self) -> dict[str, str]:
        """Public key to name, as the files say now. A file that holds no key lets nobody in."""
        names: dict[str, str] = {}
        for path in sorted(apple_double.without(self.folder.glob("*.pub"))):
            try:
                key = read_own(path).strip()
            except FileNotFoundError:  # removed at this moment
                continue
            except HomeError as error:
                self._tell(str(error))
                continue
            if _NAME.fullmatch(path.stem) and is_key(key):
                names[key] = path.stem
            else:
                self._tell(f"{path} holds no key of a user")
        return names

    def _tell(self, reason: str) -> None:
        """Once: the folder is read again and again."""
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("a key is left out: %s", reason)

    def add(self, name: str, key: str) -> None:
        """Lets a key in; one of the same name before is out. Raises `HomeError` for neither."""
        if not _NAME.fullmatch(name):
            raise HomeError("A user's name has letters, digits and _ . @ - alone, at most 64.")
        if not is_key(key):
            raise HomeError(f"The public key of {name} must be 40 characters of Z85.")
        write_private(self.folder / f"{name}.pub", key + "\n")

    def remove(self, name: str) -> None:
        """Lets a user in no more; twice is harmless."""
        if _NAME.fullmatch(name):
            (self.folder / f"{name}.pub").unlink(missing_ok=True)
