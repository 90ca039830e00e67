"""Places that take no files are found before there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fluxmesh.errors import NoSuchFolderError, OutputError, UsageError
from fluxmesh.storage.writable import check_folder, check_new, check_room
from fluxmesh_coordinator.artifacts.pictures import PicturePath, StepFiles
from tests.unwritable import unwritable_folder


def test_a_folder_that_is_there_or_can_be_made_is_left_as_it_is(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    check_new(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_nothing_is_named(tmp_path: Path) -> None:
    with unwritable_folder(tmp_path / "locked") as folder:
        for place in (folder, folder / "a" / "b"):
            with pytest.raises(OutputError, match=f"Nothing can be written into {folder}: "):
                check_folder(place)
        with pytest.raises(OutputError, match=str(folder)):
            check_new(folder / "new")
        with pytest.raises(OutputError, match=str(folder)):
            PicturePath.parse(str(folder / "dog.png"))
        with pytest.raises(OutputError, match=str(folder)):
            StepFiles(str(folder / "steps"), 1, 1, force=False)


def test_the_default_place_is_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with unwritable_folder(tmp_path / "locked") as folder:
        monkeypatch.chdir(folder)
        with pytest.raises(OutputError, match="Nothing can be written into"):
            PicturePath.parse(None)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NoSuchFolderError, match=f"{file} is a file"):
        check_folder(file / "out" / "put")
    with pytest.raises(NoSuchFolderError, match=f"{file} is a file"):
        PicturePath.parse(str(file / "dog.png"))
    with pytest.raises(NoSuchFolderError, match=f"{file} is a file"):
        StepFiles(str(file / "steps"), 1, 1, force=True)


def test_a_link_to_a_disk_that_is_away_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to("/Volumes/T7/pictures")
    for check in (check_folder, lambda folder: PicturePath.parse(str(folder / "dog.png"))):
        with pytest.raises(
            NoSuchFolderError, match="away is a link to /Volumes/T7/pictures, where"
        ):
            check(tmp_path / "away")


def test_a_name_that_is_too_long_is_told_before_anything_is_painted(tmp_path: Path) -> None:
    PicturePath.parse(str(tmp_path / f"{'d' * 200}.png"))
    for name in ("d" * 252 + ".png", "\u00e9" * 126 + ".png"):
        with pytest.raises(OutputError, match="its name is too long; choose a shorter"):
            PicturePath.parse(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_no_place() -> None:
    """As `--output "$FILE"` says it where the shell's variable is not set."""
    with pytest.raises(UsageError, match="`output` names nothing"):
        PicturePath.parse("")


def test_what_is_there_and_what_has_no_folder_is_no_new_place(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(OutputError, match="exists already"):
        check_new(tmp_path / "link")
    with pytest.raises(NoSuchFolderError, match="does not exist; make it first"):
        check_new(tmp_path / "a" / "b")
    for output in (tmp_path / "a" / "dog.png", f"{tmp_path}/a/"):
        with pytest.raises(NoSuchFolderError, match="does not exist; make it first") as caught:
            PicturePath.parse(str(output))
        assert caught.value.exit_code == UsageError.exit_code


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "new", free // 2)
    with pytest.raises(OutputError, match=r"at least .* GB, and its disk has"):
        check_room(tmp_path / "new", 2 * free)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PicturePath.parse("~/dog.png").folder == tmp_path
    assert PicturePath.parse("~").folder == tmp_path
    assert StepFiles("~/steps", 1, 1, force=False).folder == tmp_path / "steps"
