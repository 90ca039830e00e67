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

from fluxmesh.errors import ModelNotFoundError, UsageError
from fluxmesh.images.files import read_picture
from fluxmesh.training.data.dataset import DatasetError, Example, fingerprint, load_dataset
from fluxmesh.training.data.remarks import Remarks
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import read_examples
from tests.datasets import CAPTIONS, SIZES, picture, write_lines, write_pictures


def read(folder: Path, **options: str) -> tuple[list[Example], list[str]]:
    """Examples, and the notes beside them."""
    remarks = Remarks()
    return load_dataset(str(folder), remarks=remarks, **options), remarks.notes


def captions(folder: Path, **options: str) -> list[str]:
    return [example.caption for example in read(folder, **options)[0]]


def problems(folder: Path, **options: str) -> tuple[str, ...]:
    with pytest.raises(DatasetError) as caught:
        load_dataset(str(folder), **options)
    return caught.value.problems


def captioned(folder: Path, count: int = 3, ending: str = ".txt", first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, SIZES[number % 3]).save(folder / f"{number}.png")
        (folder / f"{number}{ending}").write_text(f"{CAPTIONS[number % 3]}\n")
    return folder


# metadata.jsonl and metadata.csv


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_files_give_captions_by_any_of_the_usual_names(
    tmp_path: Path, kind: str, column: str
) -> None:
    rows = list(zip(write_pictures(tmp_path), CAPTIONS, strict=True))
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, column: text}) for name, text in rows]
    else:
        lines = [f"file_name,{column}", *(f"{name},{text}" for name, text in rows)]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    examples, notes = read(tmp_path, trigger="dog")
    assert [example.caption for example in examples] == [
        text if "dog" in text else f"dog, {text}" for text in CAPTIONS
    ]
    assert not notes
    assert examples[0].where == f"metadata.{kind} line {1 if kind == 'jsonl' else 2}"


def test_csv_is_read_as_table_programs_write_it(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    text = 'file_name;text\r\n0.png;"a ""red"" dog; on\r\na table"\r\n\r\n1.png;"two, cats"\r\n'
    text += "2.png; späte Füchse \r\n"
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    read_back = [" ".join(caption.split()) for caption in captions(tmp_path)]
    assert read_back == ['a "red" dog; on a table', "two, cats", "späte Füchse"]


def test_a_comma_without_quotes_is_told_and_a_quote_without_its_other(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\n0.png,a red, happy dog\n1.png,two cats\n2.png,"the fox\n'
    )
    told = problems(tmp_path)
    assert "metadata.csv line 2: it has 3 cells and the header 2" in told[0]
    assert told[1].startswith("metadata.csv line 4: it is not valid CSV")


def test_metadata_of_subfolders_names_files_from_there_and_a_split_is_a_folder(
    tmp_path: Path,
) -> None:
    for split, first in (("train", 0), ("test", 3)):
        folder = tmp_path / split
        folder.mkdir()
        for number in range(first, first + 2):
            picture(number, SIZES[0]).save(folder / f"{number}.png")
        rows = [{"file_name": f"{n}.png", "text": f"{split} {n}"} for n in range(first, first + 2)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples, notes = read(tmp_path)
    assert [example.caption for example in examples] == ["train 0", "train 1"]
    assert notes == ["only train is read, not test; name a `split`"]
    assert captions(tmp_path, split="test") == ["test 3", "test 4"]
    assert captions(tmp_path, split="other") == ["test 3", "test 4", "train 0", "train 1"]


def test_metadata_that_names_no_file_or_lacks_a_picture_is_told_with_all_else(
    tmp_path: Path,
) -> None:
    write_pictures(tmp_path)
    rows = [
        {"file_name": "0.png", "text": "a dog"},
        {"file_name": "gone.png", "text": "a dog"},
        {"text": "a dog"},
        {"file_name": "1.png"},
        {"file_name": "2.png", "text": "a dog", "caption": "a cat"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = problems(tmp_path)
    assert "metadata.jsonl line 3: the key 'image' is missing" in told
    assert "metadata.jsonl line 4: the key 'prompt' is missing" in told
    assert (
        "metadata.jsonl line 5: 'text' and 'caption' differ; say which with `caption_column`"
        in told
    )
    assert any("metadata.jsonl line 2" in p and "gone.png does not exist" in p for p in told)
    assert any(p.startswith("no caption for 2 pictures: 1.png, 2.png") for p in told)


def test_several_metadata_files_and_caption_files_agree_or_are_told(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        f"file_name,text\n0.png,{CAPTIONS[0]}\n1.png,another thing\n2.png,\n"
    )
    assert problems(tmp_path) == (
        "1.png has a caption each in metadata.csv line 3 and 1.txt, which differ; keep one",
    )
    (tmp_path / "1.txt").unlink()
    assert captions(tmp_path) == [CAPTIONS[0], "another thing", CAPTIONS[2]]


@pytest.mark.parametrize("kind", ["train.jsonl", "index.json", "metadata.jsonl", "metadata.csv"])
def test_the_column_that_the_user_names_is_read_in_every_kind_of_list(
    tmp_path: Path, kind: str
) -> None:
    names = write_pictures(tmp_path)
    rows = [
        {"picture": name, "title": text, "prompt": "?", "text": "?", "image": "?"}
        for name, text in zip(names, CAPTIONS, strict=True)
    ]
    texts = {
        "index.json": json.dumps({"data": rows}),
        "metadata.csv": "\n".join(
            ["picture,title,prompt", *(f"{row['picture']},{row['title']},?" for row in rows)]
        ),
    }
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / kind).write_text(texts.get(kind, lines))
    columns = {"image_column": "picture", "caption_column": "title"}
    assert captions(tmp_path, **columns) == list(CAPTIONS)
    missing = problems(tmp_path, image_column="picture", caption_column="words")
    assert "the key 'words' is missing (it has picture, title, prompt" in missing[0]


@pytest.mark.parametrize(
    ("setting", "value"), [("caption_column", "title"), ("image_column", "x"), ("split", "test")]
)
def test_a_setting_that_a_data_set_has_no_use_for_is_refused(
    tmp_path: Path, setting: str, value: str
) -> None:
    captioned(tmp_path / "data")
    request = TrainRequest(
        str(tmp_path / "data"), 1, output_dir=str(tmp_path / "out"), **{setting: value}
    )
    with pytest.raises(UsageError, match=f"`{setting}` is '{value}', for which .* has no use"):
        read_examples(request)


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


def test_a_list_says_which_pictures_and_captions_it_leaves_out(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "more").mkdir()
    picture(8, SIZES[0]).save(tmp_path / "more" / "8.webp")
    write_lines(
        tmp_path, [{"image": "0.png", "prompt": "a dog"}, {"image": "./1.png", "text": "b"}]
    )
    (tmp_path / "index.json").write_text("{}")
    examples, notes = read(tmp_path)
    assert [example.caption for example in examples] == ["a dog", "b"]
    assert notes == [
        "train.jsonl leaves out 2 pictures: 2.png, more/8.webp",
        "train.jsonl has the captions, not 0.txt, 1.txt, 2.txt, index.json",
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


# What `datasets` keeps


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def table(column: str = "text"):
    import datasets

    rows = [{"image": picture(i, size), column: CAPTIONS[i]} for i, size in enumerate(SIZES)]
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, column: str) -> None:
    table(column).save_to_disk(str(tmp_path / "saved"))
    examples, _ = read(tmp_path / "saved")
    assert [example.caption for example in examples] == list(CAPTIONS)
    np.testing.assert_array_equal(examples[0].pixels(), np.array(picture(0, SIZES[0])))
    told = problems(tmp_path / "saved", caption_column="title")
    assert told == (f"there is no column 'title' (it has image, {column})",)


@pytest.mark.usefixtures("own_cache")
def test_saved_splits_are_chosen_by_name(tmp_path: Path) -> None:
    import datasets

    splits = {"train": table(), "test": table().select([1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert captions(tmp_path / "saved") == list(CAPTIONS)
    assert captions(tmp_path / "saved", split="test") == [CAPTIONS[1]]
    assert problems(tmp_path / "saved", split="validation") == (
        "it has no split 'validation' (it has train, test); name a `split`",
    )


@pytest.mark.usefixtures("own_cache")
def test_arrow_files_by_themselves_are_read(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "alone").mkdir()
    arrow.rename(tmp_path / "alone" / arrow.name)
    assert captions(tmp_path / "alone") == list(CAPTIONS)


@pytest.mark.usefixtures("own_cache")
def test_a_metadata_parquet_names_the_pictures_beside_it(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "data"
    names = write_pictures(folder)
    rows = datasets.Dataset.from_dict({"file_name": names, "text": list(CAPTIONS)})
    rows.to_parquet(str(folder / "metadata.parquet"))
    assert sorted(captions(folder)) == sorted(CAPTIONS)


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
