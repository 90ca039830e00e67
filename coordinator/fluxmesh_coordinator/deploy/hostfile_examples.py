"""The example hostfiles that come with fluxmesh, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

from fluxmesh.errors import UsageError

# The wheel holds the checkout's folder (pyproject.toml); an editable install has the checkout.
FOLDERS = (
    Path(__file__).resolve().parents[1] / "hostfiles",
    Path(__file__).resolve().parents[3] / "hostfiles",
)
ABOUT = {
    "local-1": "this machine alone",
    "local-2": "two agents on this machine: a mesh without a second Mac",
    "local-4": "four agents on this machine",
    "thunderbolt-2": "two Macs and one thunderbolt cable",
    "thunderbolt-4": "four Macs in a ring, each with a cable to the next",
    "jaccl-4": "four Macs, each with a thunderbolt 5 cable to every other, RDMA on",
}


def example(name: str) -> str:
    """The text of one. Raises `UsageError` where there is none of that name."""
    if name not in ABOUT:
        raise UsageError(f"There is no example {name!r}; there are {', '.join(ABOUT)}.")
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return (folder / f"{name}.json").read_text(encoding="utf-8")
