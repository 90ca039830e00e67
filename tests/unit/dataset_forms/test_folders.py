"""Data sets as tools and people leave them: every one read, or what is passed over told by name."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.errors import ModelNotFoundError
from fluxmesh.images.files import read_picture
from fluxmesh.training.data.dataset import DatasetError, fingerprint, load_dataset
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import read_examples
from tests.datasets import CAPTIONS, SIZES, picture, write_pictures
from tests.unit.dataset_forms.folders import captioned, captions, problems, read

# Captions beside pictures


def test_caption_files_of_kohya_are_read_and_two_that_differ_are_told(tmp_path: Path) -> None:
    captioned(tmp_path, ending=".caption")
    assert captions(tmp_path) == list(CAPTIONS)
    (tmp_path / "0.txt").write_text(CAPTIONS[0])  # as both tools of one user write it
    assert captions(tmp_path) == list(CAPTIONS)
    (tmp_path / "1.txt").write_text("tag, another tag")
    assert problems(tmp_path) == (
        "1.png has a caption each in 1.caption and 1.txt, which differ; keep one",
    )


def test_endings_in_capitals_and_accents_in_either_spelling_find_each_other(tmp_path: Path) -> None:
    picture(0, SIZES[0]).save(tmp_path / unicodedata.normalize("NFC", "Éclair.PNG"), "PNG")
    (tmp_path / unicodedata.normalize("NFD", "Éclair.TXT")).write_text("a cake")
    assert captions(tmp_path) == ["a cake"]


def test_subfolders_are_read_and_what_systems_leave_there_is_not(tmp_path: Path) -> None:
    whole, tmp_path = tmp_path, tmp_path / "data"
    captioned(tmp_path / "b", 1)
    captioned(tmp_path / "a" / "deep", 1, first=1)
    for place in ("__MACOSX", ".thumbnails", "a"):
        (tmp_path / place).mkdir(exist_ok=True)
    for junk in ("__MACOSX/0.png", ".thumbnails/1.png", "a/._1.png", "a/._1.txt"):
        (tmp_path / junk).write_bytes(b"\0\5\x16\7")
    captioned(whole / "elsewhere", 1, first=2)
    (tmp_path / "c").symlink_to(whole / "elsewhere")
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # leads back
    (tmp_path / "b" / "0000012_progress.png").write_bytes(b"of a training whose output is here")
    examples, notes = read(tmp_path)
    assert [example.caption for example in examples] == [CAPTIONS[1], CAPTIONS[0], CAPTIONS[2]]
    assert examples[0].where == "a/deep/1.txt for 1.png"
    assert not notes


def test_a_caption_without_its_picture_is_named(tmp_path: Path) -> None:
    captioned(tmp_path)
    for name in ("7.txt", "8.caption"):
        (tmp_path / name).write_text("a dog")
    assert read(tmp_path)[1] == ["2 texts: 7.txt, 8.caption without a picture of the same name"]


def test_what_is_passed_over_is_part_of_the_error_too(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "2.txt").rename(tmp_path / "two.txt")
    with pytest.raises(DatasetError, match=r"no caption for 1 picture: 2\.png.* two\.txt without"):
        load_dataset(str(tmp_path))


def test_two_pictures_of_one_name_are_told_unless_metadata_tells_them_apart(tmp_path: Path) -> None:
    captioned(tmp_path)
    picture(5, SIZES[0]).save(tmp_path / "0.jpg")
    assert problems(tmp_path)[0].startswith("0.jpg and 0.png have one name, and so one caption")
    (tmp_path / "0.txt").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a dog\n0.jpg,a cat\n")
    assert captions(tmp_path) == ["a cat", "a dog", *CAPTIONS[1:]]


def test_a_picture_that_is_there_twice_is_noted(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "copy.txt").write_text(CAPTIONS[1])
    examples, notes = read(tmp_path)
    assert len(examples) == 4
    assert notes == [
        "the same picture with the same caption: 1.txt for 1.png = copy.txt for copy.png"
    ]


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_a_mark_is_read_in_every_width(tmp_path: Path, encoding: str) -> None:
    picture(0, SIZES[0]).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("ein späterer Fuchs 狐", encoding=encoding)
    assert captions(tmp_path) == ["ein späterer Fuchs 狐"]
    (tmp_path / "0.txt").unlink()
    row = json.dumps({"file_name": "0.png", "text": "ein Füchslein"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding=encoding)
    assert captions(tmp_path) == ["ein Füchslein"]


def test_texts_in_older_encodings_are_told_all_at_once(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "0.txt").write_text("Füchse", encoding="latin-1")
    (tmp_path / "2.txt").write_text("a fox", encoding="utf-16-le")  # without its mark
    assert problems(tmp_path) == (
        "not valid UTF-8 in 2 files: 0.txt, 2.txt; save them as UTF-8 (`iconv -f latin1 -t utf-8`)",
    )


# kohya's


def test_kohyas_folders_repeat_their_pictures_and_name_those_without_a_caption(
    tmp_path: Path,
) -> None:
    captioned(tmp_path / "10_sks dog", 1)
    picture(1, SIZES[1]).save(tmp_path / "10_sks dog" / "1.png")
    captioned(tmp_path / "4_a_cat", 1, first=2)
    captioned(tmp_path / "0_left out", 1, first=3)
    examples, notes = read(tmp_path)
    assert [(example.caption, example.repeats) for example in examples] == [
        (CAPTIONS[0], 5),
        ("sks dog", 5),
        (CAPTIONS[2], 2),
    ]
    assert any("10_sks dog/1.png" in note and "folder names theirs" in note for note in notes)
    assert "pictures are repeated as kohya's folders say: 10_sks dog 5, 4_a_cat 2" in notes
    assert any("0_left out/3.png" in note for note in notes)


def test_folders_that_repeat_alike_change_nothing(tmp_path: Path) -> None:
    captioned(tmp_path / "plain")
    captioned(tmp_path / "img" / "20_sks dog")
    examples, notes = read(tmp_path / "img")
    assert {example.repeats for example in examples} == {1}
    assert fingerprint(examples) == fingerprint(read(tmp_path / "plain")[0])
    assert len(notes) == 1 and "`iterations` says how long" in notes[0]


def test_repeats_are_part_of_what_a_resume_must_find_again(tmp_path: Path) -> None:
    prints = set()
    for number in (5, 7):
        folder = tmp_path / str(number)
        captioned(folder / "2_a", 1)
        captioned(folder / f"{number}_b", 1, first=1)
        prints.add(fingerprint(read(folder)[0]))
    assert len(prints) == 2


def test_a_whole_project_of_kohyas_is_not_taught_its_regularization_pictures(
    tmp_path: Path,
) -> None:
    captioned(tmp_path / "img" / "10_sks dog")
    captioned(tmp_path / "reg" / "1_dog")
    (told,) = problems(tmp_path)
    assert told.startswith("reg holds kohya's regularization pictures") and "`prior_folder`" in told
    assert len(read(tmp_path / "reg")[0]) == 3


def test_a_number_too_large_to_be_repeats_is_told(tmp_path: Path) -> None:
    captioned(tmp_path / "20240101_dog", 1)
    captioned(tmp_path / "1_cat", 1, first=1)
    (told,) = problems(tmp_path)
    assert told.startswith("20240101_dog: repeated more than 10000 times")


@pytest.mark.parametrize("name", ["dataset.toml", "dataset_config.toml", "meta_lat.json"])
def test_kohyas_settings_are_named_as_not_read(tmp_path: Path, name: str) -> None:
    captioned(tmp_path)
    (tmp_path / name).write_text("")
    (note,) = read(tmp_path)[1]
    assert note.startswith(f"{name}: kohya's settings are not read")


def test_files_that_may_be_meant_as_data_are_named(tmp_path: Path) -> None:
    captioned(tmp_path)
    for name in ("0.json", "1.mov", "rest.zip", "table.parquet"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "README.md").write_text("not a caption of a picture")
    assert read(tmp_path)[1] == ["passed over: table.parquet, 0.json, 1.mov, rest.zip"]


# Kinds of pictures


@pytest.mark.parametrize("ending", ["tif", "webp", "avif", "gif", "jp2", "jfif", "bmp"])
def test_every_kind_that_pillow_reads_is_read(tmp_path: Path, ending: str) -> None:
    kind = {"jfif": "JPEG"}.get(ending)
    picture(0, SIZES[0]).save(tmp_path / f"0.{ending}", kind)
    (tmp_path / "0.txt").write_text("a dog")
    (example,) = load_dataset(str(tmp_path))
    assert example.size == SIZES[0] and example.pixels().shape == (*SIZES[0], 3)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_picture_and_is_noted(tmp_path: Path, ending: str) -> None:
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"0.{ending}", save_all=True, append_images=[second], lossless=True)
    (tmp_path / "0.txt").write_text("a dog")
    (example,), (note,) = read(tmp_path)
    np.testing.assert_array_equal(example.pixels(), np.array(first))
    assert note == f"0.txt for 0.{ending}: an animation, of which the first picture is taken"


def test_raw_files_of_cameras_are_told_and_not_read_as_their_thumbnails(tmp_path: Path) -> None:
    captioned(tmp_path)
    picture(9, SIZES[0]).save(tmp_path / "9.NEF", "TIFF")
    (tmp_path / "9.txt").write_text("a dog")
    picture(1, SIZES[0]).save(tmp_path / "1.dng", "TIFF")  # beside its JPEG or PNG
    with pytest.raises(DatasetError) as caught:
        load_dataset(str(tmp_path))
    assert caught.value.problems == ("9.NEF: raw files can't be read; export JPEGs of them",)
    assert caught.value.notes == (
        "1.dng: passed over, for a picture of the same name is read instead",
    )


def test_heic_is_read_where_pillow_heif_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for pillow-heif, whose HEIC is a PNG behind the box that says HEIC."""
    box = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / "pillow_heif.py").write_text(
        "import io\n"
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    accept = lambda prefix: prefix[4:12] == b'ftypheic'\n"
        "    open_ = lambda file, name: Image.open(io.BytesIO(file.read()[24:]))\n"
        "    Image.register_open('STANDIN', open_, accept)\n"
    )
    data = tmp_path / "data"
    data.mkdir()
    file = io.BytesIO()
    picture(0, SIZES[1]).save(file, "PNG")
    (data / "IMG_1.HEIC").write_bytes(box + file.getvalue())
    (data / "IMG_1.txt").write_text("a dog")
    assert problems(data)[0].startswith("IMG_1.HEIC: HEIC can't be read; `pip install pillow-heif`")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        np.testing.assert_array_equal(
            read_picture((data / "IMG_1.HEIC").read_bytes()), picture(0, SIZES[1])
        )
        (example,) = load_dataset(str(data))
        np.testing.assert_array_equal(example.pixels(), np.array(picture(0, SIZES[1])))
    finally:
        sys.modules.pop("pillow_heif", None)
        Image.OPEN.pop("STANDIN", None)
        Image.ID[:] = [name for name in Image.ID if name != "STANDIN"]


# Names


def test_a_name_that_can_only_be_a_folder_is_answered_at_once_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("fluxmesh.training.data.saved_tables.hub_rows", asked)
    monkeypatch.setattr("fluxmesh.training.data.dataset.hub_rows", asked)
    (tmp_path / "data" / "dog-6").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    for name in ("dog6", "./dog6", str(tmp_path / "data" / "dog6")):
        with pytest.raises(ModelNotFoundError, match=r"no folder .*dog6; did you mean .*dog-6\?"):
            load_dataset(name)
    with pytest.raises(ModelNotFoundError, match="no folder a/b/c; check the path"):
        load_dataset("a/b/c")


def test_mistakes_in_both_data_sets_are_told_at_once(tmp_path: Path) -> None:
    for name in ("data", "prior"):
        write_pictures(tmp_path / name)
    request = TrainRequest(
        str(tmp_path / "data"),
        1,
        prior_folder=str(tmp_path / "prior"),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(DatasetError, match="2 problems") as caught:
        read_examples(request)
    assert [str(tmp_path / name) in str(caught.value) for name in ("data", "prior")] == [True, True]
