"""Models where the Hub's library leaves them, and changes of their notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repo: str, **options: Any) -> Path:
    """A random model where the Hub's library would have put it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    make_checkpoint(folder / "snapshots" / COMMIT, **options)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
