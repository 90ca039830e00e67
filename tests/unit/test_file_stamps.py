"""Whether files are still the ones that were read, by stat alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.storage.file_stamps import FileStamps
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint


def written_again(file: Path) -> None:
    file.write_bytes(b"other")


def replaced(file: Path) -> None:
    """By one of the same size and time."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"x" * status.st_size)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)


def changed_in_place(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.write(b"y")
    os.utime(file, ns=(1, 1))  # a clock of coarse ticks would give the same time


@pytest.mark.parametrize("change", [written_again, replaced, changed_in_place, Path.unlink])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_that_is_another_one_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], is_link: bool
) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(b"known")
    named = list(files)
    if is_link:  # as the Hub's cache has them
        named[1] = tmp_path / "link"
        named[1].symlink_to(files[1])
    stamps = FileStamps.of([*named, tmp_path / "missing"])
    assert stamps.changed is None
    files[1].read_bytes()
    (tmp_path / "unknown").touch()
    assert stamps.changed is None
    change(files[1])
    assert stamps.changed == named[1]


def test_a_file_that_comes_later_is_noticed(tmp_path: Path) -> None:
    stamps = FileStamps.of([tmp_path / "comes"])
    (tmp_path / "comes").touch()
    assert stamps.changed == tmp_path / "comes"


def test_all_that_a_checkpoint_was_read_from_counts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model").path
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    counted = {file for file, _ in hub.resolve(str(folder)).stamps.stamps}
    assert set(files) == counted and len(files) > 5
    for file in files:
        known = hub.resolve(str(folder)).stamps
        assert known.changed is None
        os.utime(file, ns=(2, 2))
        assert known.changed == file


def test_a_name_of_the_hub_that_means_another_revision_counts(tmp_path: Path) -> None:
    repo = tmp_path / "models--me--mine"
    shutil.copytree(make_checkpoint(tmp_path / "model").path, repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    stamps = hub.resolve(str(repo / "snapshots" / "0123")).stamps
    assert stamps.changed is None
    (repo / "refs" / "main").write_text("45678")
    assert stamps.changed == (repo / "refs" / "main")


def test_a_checkpoint_whose_files_change_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its revision is of the old files, its stamps are of the new ones, and nobody notices."""
    old, new = (make_checkpoint(tmp_path / name, seed=k).path for k, name in enumerate("ab"))
    model, read = tmp_path / "mine", hub.from_folder
    shutil.copytree(old, model)
    changes = iter([new, old, new])

    def change_then(folder: Path, *how: Any, **more: Any) -> Checkpoint:
        checkpoint = read(folder, *how, **more)
        if (other := next(changes, None)) is not None:  # between what it was read from and stamps
            shutil.rmtree(model)
            shutil.copytree(other, model)
        return checkpoint

    monkeypatch.setattr(hub, "from_folder", change_then)
    known = hub.resolve(str(model))
    assert known.revision == hub.resolve(str(new)).revision != hub.resolve(str(old)).revision
    assert known.stamps.changed is None

    def touch_then(folder: Path, *how: Any, **more: Any) -> Checkpoint:
        (model / "model_index.json").touch()
        return read(folder, *how, **more)

    monkeypatch.setattr(hub, "from_folder", touch_then)
    with pytest.raises(WeightsError, match="change while they are read"):
        hub.resolve(str(model))
