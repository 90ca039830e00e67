"""Compiled kernels that outlive an engine: a folder of the agent's own, bounded and kept sound.

MLX compiles for CUDA as shapes and types come, for seconds each, and keeps what it has compiled in
the folder that MLX_PTX_CACHE_DIR names; by default in the machine's folder for temporary files,
which a restart empties and which anyone may write to. Metal has a cache of the system's own, and
what is generated on the CPU compiles nothing, so that there is nothing to keep.

MLX writes a module's files (NAME.ptx, NAME.txt, NAME.cu) in place, and engines are ended by
SIGKILL: what was written just before may be half of it, and would fail each engine that finds it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from importlib import metadata
from pathlib import Path

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import AgentHome, private_folder

log = logging.getLogger(__name__)

VARIABLE = "MLX_PTX_CACHE_DIR"
MOST = 256 << 20  # bytes that are kept; a model at one size takes a few
HALF_WRITTEN = 5.0  # seconds before an engine's end


def folder_for(home: AgentHome) -> Path | None:
    """Where the engine that starts now keeps what it compiles, tidied; None where there is no room.

    Other versions' go: MLX finds a kernel by its name alone.
    """
    try:
        version = metadata.version("mlx")
        folder = private_folder(private_folder(home.kernels) / version)
    except (FluxmeshError, metadata.PackageNotFoundError) as error:
        log.warning("compiled kernels are not kept: %s", error)
        return None
    for other in home.kernels.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    _bound(folder)
    return folder


def _bound(folder: Path) -> None:
    """Removes the modules that were compiled first, until the rest is small enough."""
    modules: dict[str, list[tuple[float, int, Path]]] = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            stat = path.stat()
            modules.setdefault(path.stem, []).append((stat.st_mtime, stat.st_size, path))
        total = sum(size for files in modules.values() for _, size, _ in files)
        for files in sorted(modules.values()):
            if total <= MOST:
                return
            total -= sum(size for _, size, _ in files)
            for _, _, path in files:
                path.unlink(missing_ok=True)


def drop_half_written(home: AgentHome) -> None:
    """An engine has ended just now, and not by itself: what it may have been writing goes."""
    drop_written_since(home, time.time() - HALF_WRITTEN)


def drop_written_since(home: AgentHome, since: float) -> None:
    """Removes the modules of which a file was written since then, in seconds since 1970."""
    with contextlib.suppress(OSError):
        for path in [path for path in home.kernels.rglob("*") if path.is_file()]:
            if path.exists() and path.stat().st_mtime >= since:
                for part in path.parent.iterdir():
                    if part.stem == path.stem:
                        part.unlink(missing_ok=True)
