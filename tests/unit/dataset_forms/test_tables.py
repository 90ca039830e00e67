"""Captions in lists and tables: metadata files, columns, splits, what `datasets` keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import UsageError
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import read_examples
from tests.datasets import CAPTIONS, SIZES, picture, write_lines, write_pictures
from tests.unit.dataset_forms.folders import captioned, captions, problems, read

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
