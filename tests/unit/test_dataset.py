"""Data sets: four forms in, everything that is wrong told at once."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from fluxmesh.errors import ModelNotFoundError, UsageError
from fluxmesh.training.data.dataset import DatasetError, fingerprint, load_dataset
from fluxmesh.training.data.remarks import Remarks
from tests.datasets import CAPTIONS, SIZES, make_dataset, picture, write_lines, write_pictures


def test_train_jsonl_gives_pictures_captions_and_sizes_in_its_order(tmp_path):
    examples = load_dataset(str(make_dataset(tmp_path)))
    assert [example.caption for example in examples] == list(CAPTIONS)
    assert [example.size for example in examples] == list(SIZES)
    assert examples[1].where == "train.jsonl line 2"
    assert examples[1].content == hashlib.sha256((tmp_path / "1.png").read_bytes()).hexdigest()
    np.testing.assert_array_equal(examples[1].pixels(), np.array(picture(1, SIZES[1])))


def test_the_older_index_json_reads_the_same(tmp_path):
    names = write_pictures(tmp_path)
    data = [{"image": name, "text": text} for name, text in zip(names, CAPTIONS, strict=True)]
    (tmp_path / "index.json").write_text(json.dumps({"data": data}))
    examples = load_dataset(str(tmp_path))
    assert [example.caption for example in examples] == list(CAPTIONS)
    assert examples[2].where == "index.json entry 3"


def test_train_jsonl_wins_over_index_json(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "index.json").write_text('{"data": []}')
    assert len(load_dataset(str(tmp_path))) == len(SIZES)


def test_a_folder_of_pictures_takes_captions_from_its_txt_files(tmp_path):
    for name, text in zip(write_pictures(tmp_path), CAPTIONS, strict=True):
        (tmp_path / name).with_suffix(".txt").write_text(f"{text}\n")
    (tmp_path / "notes.md").write_text("not a picture")
    assert [example.caption for example in load_dataset(str(tmp_path))] == list(CAPTIONS)


def test_photos_of_an_iphone_are_told_all_in_one_unless_they_were_converted(tmp_path):
    write_pictures(tmp_path)
    for name in ("0.HEIC", "IMG_1.HEIC", "IMG_2.heic", "._IMG_3.heic"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    sentence = (
        "1 problem: IMG_1.HEIC, IMG_2.heic: HEIC can't be read; `pip install pillow-heif`, or"
    )
    with pytest.raises(DatasetError, match=sentence):
        load_dataset(str(tmp_path), trigger="sks")
    for number in (1, 2):
        (tmp_path / f"{number}.png").rename(tmp_path / f"IMG_{number}.png")
    remarks = Remarks()
    assert len(load_dataset(str(tmp_path), trigger="sks", remarks=remarks)) == len(SIZES)
    assert remarks.notes[0].startswith("0.HEIC, IMG_1.HEIC, IMG_2.heic: passed over")


def hub_folder(tmp_path, **columns):
    """What a Hub data set is on the disk: parquet files, pictures encoded inside."""
    import datasets

    encoded = []
    for i, size in enumerate(SIZES):
        file = io.BytesIO()
        picture(i, size).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({columns.get("image", "image"): encoded})
    table = table.cast_column(columns.get("image", "image"), datasets.Image(decode=False))
    table = table.add_column(columns.get("prompt", "prompt"), list(CAPTIONS))
    folder = tmp_path / "hub"
    folder.mkdir()
    table.to_parquet(str(folder / "train-00000.parquet"))
    return str(folder)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_a_hub_data_set_reads_the_same_and_its_columns_can_be_named(tmp_path):
    folder = hub_folder(tmp_path, image="photo", prompt="text")
    examples = load_dataset(folder, image_column="photo", caption_column="text")
    assert [example.caption for example in examples] == list(CAPTIONS)
    assert [example.size for example in examples] == list(SIZES)
    np.testing.assert_array_equal(examples[0].pixels(), np.array(picture(0, SIZES[0])))
    with pytest.raises(DatasetError, match=r"no column 'image' \(it has photo, text\)"):
        load_dataset(folder)
    with pytest.raises(ModelNotFoundError, match="split 'test'"):
        load_dataset(folder, image_column="photo", caption_column="text", split="test")


def test_everything_that_is_wrong_is_told_at_once_with_its_line(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("not a picture")
    write_lines(
        tmp_path,
        [
            {"image": "0.png", "prompt": "fine"},
            "",
            {"image": "absent.png", "prompt": "a dog"},
            {"image": "broken.png", "prompt": "a dog"},
            {"image": "text.png", "prompt": "a dog"},
            {"image": "1.png", "prompt": "  "},
            {"image": "2.png", "prompt": 7},
            "{oops",
            {"prompt": "no image"},
            {"image": 3, "prompt": "a dog"},
            "[]",
            {"image": "gone.png", "prompt": ""},
            {"image": "0.png", "prompt": "half \ud800"},
            {"image": "a\0b.png", "prompt": "a dog"},
            {"image": ".", "prompt": "a dog"},
        ],
    )
    with pytest.raises(DatasetError) as caught:
        load_dataset(str(tmp_path))
    problems = caught.value.problems
    lines = [int(problem.split("line ")[1].split(":")[0]) for problem in problems]
    assert lines == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15]
    said = dict(zip(lines, problems, strict=True))
    assert "blank" in said[2] and "absent.png does not exist" in said[3]
    assert "broken.png" in said[4] and "text.png" in said[5]
    assert "the caption is empty" in said[6] and "no text" in said[7]
    assert "JSON" in said[8] and "'image'" in said[9] and "gone.png" in said[12]
    assert "no text" in said[13] and "no file name" in said[14] and "read" in said[15]
    assert "15 problems" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == UsageError.exit_code


def test_a_last_line_that_is_blank_is_no_problem(tmp_path):
    make_dataset(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n  \n")
    assert len(load_dataset(str(tmp_path))) == len(SIZES)


@pytest.mark.parametrize("text", ["", "[]", '{"data": 3}', "{"])
def test_an_index_without_a_list_is_told(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DatasetError, match=r"index\.json"):
        load_dataset(str(tmp_path))


def test_an_empty_folder_a_file_and_a_broken_encoding_are_told(tmp_path):
    with pytest.raises(DatasetError, match="holds no pictures"):
        load_dataset(str(tmp_path))
    (tmp_path / "train.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        load_dataset(str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        load_dataset(str(tmp_path / "train.jsonl"))


def test_a_picture_without_a_caption_file_is_told_unless_there_is_a_trigger(tmp_path):
    write_pictures(tmp_path)
    with pytest.raises(DatasetError, match=r"no caption for 3 pictures: 0\.png, 1\.png, 2\.png"):
        load_dataset(str(tmp_path))
    remarks = Remarks()
    examples = load_dataset(str(tmp_path), trigger="sks", remarks=remarks)
    assert {example.caption for example in examples} == {"sks"}
    (note,) = remarks.notes
    assert "`trigger` stands alone, for 3 pictures: 0.png, 1.png, 2.png" in note
    (tmp_path / "0.txt").write_text(" \n")
    with pytest.raises(DatasetError) as caught:
        load_dataset(str(tmp_path))
    assert caught.value.problems[0] == "0.txt for 0.png: the caption is empty"


def test_the_trigger_stands_before_captions_that_lack_it(tmp_path):
    names = write_pictures(tmp_path)
    captions = ["a sks dog", "a dog", ""]
    rows = [{"image": n, "prompt": c} for n, c in zip(names, captions, strict=True)]
    write_lines(tmp_path, rows)
    loaded = [example.caption for example in load_dataset(str(tmp_path), trigger="sks")]
    assert loaded == ["a sks dog", "sks, a dog", "sks"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((20, 30), 128, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 0x8080, np.uint16))
    else:
        image = grey.convert(mode)
    image.save(tmp_path / "0.tif")
    (tmp_path / "0.txt").write_text("grey")
    (example,) = load_dataset(str(tmp_path))
    pixels = example.pixels()
    assert pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8
    if mode != "1":
        np.testing.assert_allclose(pixels, 128, atol=2)


def test_a_photo_that_was_turned_is_turned_back(tmp_path):
    upright = picture(0, (20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    upright.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "0.txt").write_text("turned")
    (example,) = load_dataset(str(tmp_path))
    assert example.size == (40, 20)
    np.testing.assert_array_equal(example.pixels(), np.rot90(np.array(upright), -1))


def test_the_fingerprint_changes_with_a_caption_and_with_a_pixel(tmp_path):
    first = fingerprint(load_dataset(str(make_dataset(tmp_path / "a"))))
    assert fingerprint(load_dataset(str(make_dataset(tmp_path / "b")))) == first
    picture(9, SIZES[0]).save(tmp_path / "b" / "0.png")
    assert fingerprint(load_dataset(str(tmp_path / "b"))) != first
    assert fingerprint(load_dataset(str(tmp_path / "a"), trigger="sks")) != first
