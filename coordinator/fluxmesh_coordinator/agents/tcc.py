"""Folders that macOS keeps from who comes over ssh, and the sentence about them. Pure.

Privacy & Security ("TCC") lets a process into a user's Documents, Desktop and Downloads, into
iCloud and onto other volumes only where the app that it came from may go there. For ssh that is
sshd-keygen-wrapper, which nobody has been asked about: files there answer "Operation not
permitted", also to their owner. A daemon of launchd meets the same.
"""

from __future__ import annotations

from pathlib import PurePosixPath

FOLDERS = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents", "Library/CloudStorage")
ACCESS = (
    "move it out (such as to ~/fluxmesh), or give sshd-keygen-wrapper Full Disk Access in System "
    "Settings > Privacy & Security"
)


def protected_by(path: str, home: str) -> str:
    """The protected folder that `path` lies in, as people write it; "" where it lies in none."""
    where = PurePosixPath(path)
    for folder in FOLDERS:
        if where.is_relative_to(PurePosixPath(home) / folder):
            return f"~/{folder}"
    if where.is_relative_to("/Volumes") and len(where.parts) > 2:
        return f"/Volumes/{where.parts[2]}"
    return ""


def denied(path: str) -> str:
    """What to do where macOS says "Operation not permitted" about a path over ssh."""
    return (
        f"macOS does not let who comes over ssh read {path} (Documents, Desktop, Downloads, iCloud "
        f"and other volumes are kept private); {ACCESS}."
    )
