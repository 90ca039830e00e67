"""Any file of a checkpoint, damaged or unreadable in any way: a sentence that names it, no more."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxmesh import FluxPipeline
from fluxmesh.errors import FluxmeshError
from tests.checkpoints import make_checkpoint


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def circular(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(5000))


# Not one of the files a checkpoint must have, or one that may be empty.
SOUND = {("empty", "merges.txt")}


@pytest.mark.parametrize("damage", [folder, dangling, circular, empty, noise])
def test_what_is_wrong_with_a_file_is_a_sentence_with_its_folder(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    made = make_checkpoint(tmp_path / "sound")
    files = [path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for number, file in enumerate(files):
        if file.name == "fluxmesh.json" or (damage.__name__, file.name) in SOUND:
            continue
        bad = tmp_path / f"bad-{number}"
        shutil.copytree(made.folder, bad)
        damage(bad / file)
        with pytest.raises(FluxmeshError) as caught:
            flux = FluxPipeline(str(bad))
            assert flux.checkpoint.content  # as an engine tells it
            flux.encode("a dog")
            flux.ensure_models_are_loaded()
        assert bad.name in str(caught.value) and "\n" not in str(caught.value), file
