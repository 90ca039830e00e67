"""Where fluxmesh keeps what outlives a process: keys, the mesh that is up, an agent's state.

    FLUXMESH_HOME   ~/.config/fluxmesh                   a user's: `Home`
    FLUXMESH_STATE  ~/.local/state/fluxmesh              the agents', in `agent-PORT`: `AgentHome`
                    ~/.local/state/fluxmesh/models       checkpoints that were pushed to this host

All folders are 0700 and all files 0600. A file is replaced in one piece or not at all, and one that
others could have read or changed is refused, for a key in it may no longer be a secret.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage import atomic


class HomeError(FluxmeshError):
    """A folder or file that fluxmesh keeps is not the user's own, or can't be used."""


def home_folder() -> Path:
    """A user's folder, which need not be there."""
    chosen = os.environ.get("FLUXMESH_HOME")
    return Path(chosen) if chosen else Path.home() / ".config" / "fluxmesh"


@dataclass(frozen=True)
class Home:
    """A user's folder."""

    folder: Path

    @classmethod
    def default(cls) -> Home:
        """That of FLUXMESH_HOME, or of the user; made if it is not there."""
        return cls(private_folder(home_folder(), "FLUXMESH_HOME"))

    @property
    def mesh(self) -> Path:
        """The mesh that is up."""
        return self.folder / "mesh.json"

    @property
    def hints(self) -> Path:
        """When the user was given each hint."""
        return self.folder / "hints.json"

    @property
    def history(self) -> Path:
        """What was typed at `fluxmesh interactive`."""
        return self.folder / "history"


@dataclass(frozen=True)
class AgentHome:
    """An agent's folder."""

    folder: Path

    @classmethod
    def default(cls, port: int) -> AgentHome:
        """That of the agent at `port`, below FLUXMESH_STATE or the user's own; made if missing."""
        base = private_folder(_agents(), "FLUXMESH_STATE")
        return cls(private_folder(base / f"agent-{port}"))

    @classmethod
    def is_there(cls, port: int) -> bool:
        """Whether there is a folder of an agent at `port`."""
        return (_agents() / f"agent-{port}").is_dir()

    @property
    def authorized(self) -> Path:
        """The folder of public keys that may talk to the agent: `keys.Allowlist`."""
        return self.folder / "authorized"

    @property
    def agent(self) -> Path:
        """Process id, its start time, endpoint and boot id of the agent that runs."""
        return self.folder / "agent.json"

    @property
    def engine(self) -> Path:
        """Process id and start time of the engine that runs."""
        return self.folder / "engine.json"

    @property
    def keep(self) -> Path:
        """What the host is to hold, for as long as the mesh is up."""
        return self.folder / "keep.json"

    @property
    def kernels(self) -> Path:
        """The folder of kernels that engines have compiled, in a folder a version of MLX."""
        return self.folder / "kernels"

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"

    @property
    def adapters(self) -> Path:
        """The folder of adapters by hash."""
        return self.folder / "adapters"


def models_folder() -> Path:
    """A host's own folder of models, where its hostfile names none; it need not be there."""
    return _agents() / "models"


def private_folder(path: Path, variable: str = "") -> Path:
    """Makes a folder that only its owner may look into, and returns it.

    `variable` is what would name another one, if anything does. One that is there already is made
    so. Raises `HomeError` where it belongs to someone else, is a link, or can't be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise HomeError(f"{path} is not a folder of your own; remove it, or choose another.")
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        remedy = f"; set {variable} to a folder that you can write" if variable else ""
        raise HomeError(f"{path} can't be used: {error.strerror or error}{remedy}.") from None
    return path


def write_private(path: Path, content: str | bytes) -> None:
    """Writes a file that only its owner may read, in one piece: the old one stays or the new is.

    Raises `HomeError` where it can't be written.
    """
    _write(path, content, atomic.replaced_file)


def create_private(path: Path, text: str) -> bool:
    """As `write_private`, but a file that is there stays as it is: then False."""
    try:
        _write(path, text, atomic.new_file)
    except FileExistsError:
        return False
    return True


def _write(path: Path, content: str | bytes, opened: atomic.Opens) -> None:
    data = content.encode() if isinstance(content, str) else content
    try:
        with opened(path, 0o600) as file:
            file.write(data)
    except FileExistsError:
        raise
    except OSError as error:
        raise HomeError(f"{path} can't be written: {error.strerror or error}.") from None


def read_private(path: Path) -> str:
    """The text of a file that only its owner may read.

    Raises `FileNotFoundError` where there is none, `HomeError` where others may read or change it.
    """
    return _read(path, 0o077, "can be read by others; rotate the keys if someone may have, and")


def read_own(path: Path) -> str:
    """The text of a file that others may read, but only its owner change. Raises the same."""
    return _read(path, 0o022, "can be changed by others; look who did, and")


def _read(path: Path, forbidden: int, reason: str) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid():
                raise HomeError(f"{path} belongs to someone else; remove it.")
            if stat.S_IMODE(status.st_mode) & forbidden:
                raise HomeError(f"{path} {reason} run: chmod 600 {path}")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise HomeError(f"{path} can't be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise HomeError(f"{path} is not text.") from None


def _agents() -> Path:
    """The folder of this user's agents, each of which has one of its own in it."""
    chosen = os.environ.get("FLUXMESH_STATE")
    return Path(chosen) if chosen else Path.home() / ".local" / "state" / "fluxmesh"
