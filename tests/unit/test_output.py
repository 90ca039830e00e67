"""Names that are free, files that are whole, and grids."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxmesh.errors import OutputError, UsageError
from fluxmesh.storage import atomic, durable
from fluxmesh_coordinator.artifacts.pictures import (
    GAP,
    PictureFiles,
    PicturePath,
    StepFiles,
    encode_png,
    grid,
)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_png_holds_its_pixels_and_its_recipe(tmp_path: Path) -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    (tmp_path / "a.png").write_bytes(encode_png(pixels, '{"prompt":"x"}'))
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == pixels).all()
        assert image.text["fluxmesh"] == '{"prompt":"x"}'
        assert image.text["Software"].startswith("fluxmesh ")


def test_one_picture_is_its_own_grid() -> None:
    picture = np.full((4, 6, 3), 9, np.uint8)
    assert grid([picture]) is picture


def test_a_grid_fills_row_by_row_and_leaves_the_rest_black() -> None:
    pictures = [np.full((4, 6, 3), k + 1, np.uint8) for k in range(5)]
    sheet = grid(pictures, n_rows=2)
    gap = GAP
    assert sheet.shape == (4 * 2 + gap, 6 * 3 + 2 * gap, 3)
    assert sheet[0, 6 + gap, 0] == 2
    assert sheet[4 + gap, 0, 0] == 4
    assert (sheet[4 + gap :, 2 * (6 + gap) :] == 0).all()
    assert grid(pictures, n_rows=9).shape == (4 * 5 + 4 * gap, 6, 3)


def test_the_default_name_is_the_next_free_one(tmp_path: Path) -> None:
    for taken in ("out.png", "out-1.png", "out-2.0.png", "outer.png", "out-x.png"):
        (tmp_path / taken).write_bytes(b"theirs")
    target = PicturePath.parse(str(tmp_path))
    assert PictureFiles(target).save(0, None, b"a").name == "out-3.png"
    assert PictureFiles(target).save(0, None, b"b").name == "out-4.png"


def test_raw_images_of_a_call_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"theirs")
    files = PictureFiles(PicturePath.parse(str(tmp_path)), n_images=2, save_raw=True)
    assert [files.save(0, k, b"x").name for k in (0, 1)] == ["out-1.0.png", "out-1.1.png"]


def test_prompts_of_a_call_get_names_of_their_own(tmp_path: Path) -> None:
    given = PictureFiles(PicturePath.parse(str(tmp_path / "dog.png")), n_prompts=2)
    assert [given.save(k, None, b"x").name for k in (0, 1)] == ["dog.png", "dog-1.png"]
    free = PictureFiles(PicturePath.parse(str(tmp_path)), n_prompts=2)
    assert [free.save(k, None, b"x").name for k in (0, 1)] == ["out.png", "out-1.png"]


def test_a_name_that_somebody_takes_in_between_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def slow_link(source: Any, path: Any) -> None:
        if Path(path).name == "out.png" and not os.path.exists(path):
            Path(path).write_bytes(b"theirs")
        link(source, path)

    monkeypatch.setattr(os, "link", slow_link)
    assert PictureFiles(PicturePath.parse(str(tmp_path))).save(0, None, b"mine").name == "out-1.png"
    assert (tmp_path / "out.png").read_bytes() == b"theirs"
    assert names(tmp_path) == ["out-1.png", "out.png"]


def test_a_given_name_is_refused_before_and_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "dog.png"
    files = PictureFiles(PicturePath.parse(str(path)))
    path.write_bytes(b"theirs")
    with pytest.raises(OutputError, match=r"dog\.png exists already: add `force`"):
        files.save(0, None, b"mine")
    with pytest.raises(OutputError, match=r"dog\.png exists already: add `force`"):
        PictureFiles(PicturePath.parse(str(path)))
    with pytest.raises(OutputError, match=r"dog\.1\.png exists already"):
        (tmp_path / "dog.1.png").write_bytes(b"theirs")
        PictureFiles(PicturePath.parse(str(path)), n_images=2, save_raw=True)
    assert path.read_bytes() == b"theirs"
    PictureFiles(PicturePath.parse(str(path), force=True)).save(0, None, b"mine")
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == ["dog.1.png", "dog.png"]


def test_output_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end it in \.png"):
        PicturePath.parse(str(tmp_path / "dog.jpeg"))
    with pytest.raises(OutputError, match="does not exist"):
        PicturePath.parse(str(tmp_path / "missing" / "dog.png"))
    with pytest.raises(OutputError, match="does not exist"):
        PicturePath.parse(f"{tmp_path}/missing/")
    assert PicturePath.parse(str(tmp_path / "dog")).suffix == ".png"
    assert PictureFiles(PicturePath.parse(str(tmp_path / "v1.2.PNG"))).save(0, None, b"x") == (
        tmp_path / "v1.2.PNG"
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links_keep_the_same_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_link(_source: Any, _path: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    atomic.write_file(tmp_path / "a.png", b"whole")
    with pytest.raises(FileExistsError):
        atomic.write_file(tmp_path / "a.png", b"other")
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert names(tmp_path) == ["a.png"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OutputError, match=r"Could not write .*a\.png: No space left on device"):
        atomic.write_file(tmp_path / "a.png", b"data")
    assert names(tmp_path) == []


def test_ctrl_c_while_writing_waits_for_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = durable.sync

    def interrupted(descriptor: int) -> None:
        signal.raise_signal(signal.SIGINT)
        sync(descriptor)

    monkeypatch.setattr(durable, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(tmp_path / "a.png", b"whole")
    assert names(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_writer_that_was_killed_has_left_goes_and_what_is_being_written_stays(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fluxmesh.storage import durable\n"
        "from fluxmesh.storage.atomic import write_file\n"
        "durable.sync = lambda handle: (print(flush=True), time.sleep(60))\n"
        "write_file(Path(sys.argv[1]), b'half')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        atomic.write_file(tmp_path / "b.png", b"whole")
        assert len(names(tmp_path)) == 2  # it is still at it
        writer.kill()
        writer.wait()
    (tmp_path / ".theirs.tmp").write_bytes(b"of somebody else")
    atomic.write_file(tmp_path / "c.png", b"whole")
    assert names(tmp_path) == [".theirs.tmp", "b.png", "c.png"]


def test_ctrl_c_counts_where_the_name_was_taken_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(_source: Any, _path: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise FileExistsError

    monkeypatch.setattr(os, "link", taken)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(tmp_path / "a.png", b"data")
    assert names(tmp_path) == []


def test_steps_go_to_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "steps"
    steps = StepFiles(str(folder), 2, 3, force=False)
    assert not folder.exists()
    steps.save(1, 2, 7, 100, b"x")
    assert names(folder) == ["prompt-1-image-2-step-007.png"]
    with pytest.raises(OutputError, match="is not empty"):
        StepFiles(str(folder), 1, 1, force=False)
    StepFiles(str(folder), 1, 1, force=True).save(0, 0, 1, 4, b"x")
    assert names(folder) == ["prompt-1-image-2-step-007.png", "step-01.png"]
    with pytest.raises(OutputError, match="is no folder"):
        StepFiles(str(folder / "step-01.png"), 1, 1, force=False)
