"""A file of tensors by its first bytes: safetensors or GGUF, the same `Header` of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluxmesh.errors import WeightsError
from fluxmesh.storage import gguf, safetensors
from fluxmesh.storage.safetensors import Entry, Header


def read_header(path: Path) -> Header:
    """Reads and checks a file's header. Raises `WeightsError` naming the file and what is wrong."""
    try:
        is_gguf = gguf.is_gguf(path)
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    return gguf.read_header(path) if is_gguf else safetensors.read_header(path)


def read_headers(files: Sequence[Path]) -> Header:
    """One header of several files, each tensor in one of them."""
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        entries |= header.entries
        metadata |= header.metadata
    return Header(entries, metadata)
