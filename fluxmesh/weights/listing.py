"""What a repository of the Hub holds, and headers of its files without the files.

Below `download.py`: names, sizes and hashes from one question, and the first bytes of a file of
safetensors from another, so that a model is checked before a weight of it is fetched. Imports
huggingface_hub when called, never before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import MAX_HEADER, Header, parse_header

FIRST_BYTES = 256 << 10  # asked for at once: a FLUX's header is 30 to 150 KB
SMALLEST = 16  # bytes; nothing smaller is a file of safetensors


@dataclass(frozen=True)
class Listing:
    """A repository at its newest revision, and where its files go."""

    repo: str
    cache: Path
    commit: str
    endpoint: str | None
    sizes: Mapping[str, int]  # bytes of each file, by name
    hashes: Mapping[str, str]  # SHA-256 of the large ones

    @classmethod
    def of(cls, repo: str, cache: Path) -> Self:
        """Asks the Hub. Raises what its library does."""
        import huggingface_hub

        endpoint = os.environ.get("HF_ENDPOINT")  # read now, not when the library was imported
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
        files = info.siblings or []
        return cls(
            repo=repo,
            cache=cache,
            commit=str(info.sha),
            endpoint=endpoint,
            sizes={file.rfilename: file.size or 0 for file in files},
            hashes={file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None},
        )

    @property
    def folder(self) -> Path:
        """The repository's, in the cache."""
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The folder of this revision's files."""
        return self.folder / "snapshots" / self.commit

    def missing(self, files: Sequence[str]) -> list[str]:
        """Those that are not here yet."""
        return [file for file in files if not (self.snapshot / file).is_file()]

    def finish(self) -> None:
        """Marks the revision as the one that is found from now on."""
        (self.folder / "refs").mkdir(parents=True, exist_ok=True)
        ref = self.folder / "refs" / "main"
        commit = self.commit.encode()
        if not ref.is_file() or ref.read_bytes() != commit:  # who has this one in memory keeps it
            ref.write_bytes(commit)


def remote_header(listing: Listing, name: str) -> Header:
    """The header of a file of safetensors on the Hub, and nothing else of it.

    Raises `WeightsError` where the file has none, and what the Hub's library does.
    """
    size = listing.sizes[name]
    path = listing.snapshot / name
    if size < SMALLEST:
        raise WeightsError(f"{name} of {listing.repo} is no file of safetensors.")
    first = _first_bytes(listing, name, min(size, FIRST_BYTES))
    length = int.from_bytes(first[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise WeightsError(f"{name} of {listing.repo} is no file of safetensors.")
    if length + 8 > len(first):
        first = _first_bytes(listing, name, length + 8)
    return parse_header(path, first[8 : 8 + length], size)


def _first_bytes(listing: Listing, name: str, count: int) -> bytes:
    """The first `count` bytes, also from a server that can only send all: the rest is not read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(listing.repo, name, revision=listing.commit, endpoint=listing.endpoint)
    wanted = build_hf_headers() | {"Range": f"bytes=0-{count - 1}"}
    content = bytearray()
    with get_session().stream("GET", url, headers=wanted, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            content += piece
            if len(content) >= count:
                break
    return bytes(content[:count])
