"""Pictures and captions in, in every form that people have them; checked whole, before any weight.

- a folder with `train.jsonl`: one `{"image": path, "prompt": caption}` a line (`list_files.py`)
- a folder with `index.json` (older): `{"data": [{"image": path, "text": caption}, ...]}`
- a folder of pictures, with captions beside them or in `metadata.jsonl` (`picture_folder.py`)
- what `datasets` reads (`saved_tables.py`): of the Hugging Face Hub, parquet, `save_to_disk`

Everything that is wrong is told at once, each with its file and line (`DatasetError.problems`), and
so is all that is passed over (`Remarks.notes`). Imports no mlx, and `datasets` only when needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.images.files import decode_picture, is_moving
from fluxmesh.training.data.bucketing import Size
from fluxmesh.training.data.dataset_files import DatasetFiles
from fluxmesh.training.data.list_files import INDEX, LINES, listed_rows
from fluxmesh.training.data.picture_folder import folder_rows
from fluxmesh.training.data.remarks import SHOWN, Remarks, several
from fluxmesh.training.data.rows import Columns, DatasetRow
from fluxmesh.training.data.saved_tables import (
    arrow_rows,
    check_hub_name,
    hub_rows,
    is_saved,
    saved_rows,
)


class DatasetError(UsageError):
    """A data set with mistakes in it: `problems` has a sentence for each, with file and line.

    `notes` are what was passed over, which may be why.
    """

    def __init__(self, dataset: str, problems: list[str], notes: list[str] | None = None) -> None:
        self.dataset, self.problems, self.notes = dataset, tuple(problems), tuple(notes or ())
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        beside = "".join(f" Also: {note}." for note in self.notes)
        super().__init__(f"The dataset {dataset} has {count}: {shown}{more}.{beside}")

    @classmethod
    def of(cls, errors: list[DatasetError]) -> DatasetError:
        """Those of several data sets as one."""
        if len(errors) == 1:
            return errors[0]
        named = [f"{error.dataset}: {problem}" for error in errors for problem in error.problems]
        notes = [f"{error.dataset}: {note}" for error in errors for note in error.notes]
        return cls(" and ".join(error.dataset for error in errors), named, notes)


@dataclass(frozen=True)
class Example:
    """A picture with its caption."""

    where: str  # as a message names it: "train.jsonl line 3"
    caption: str
    content: str  # SHA-256 of the picture's file, in hex
    size: Size  # pixels, as a viewer shows it
    data: Path | bytes = field(repr=False, compare=False)
    prior: bool = False  # shows what the model knew before, and is to keep
    repeats: int = 1  # how often it is shown in an epoch

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3], EXIF rotation applied, whatever the file's mode."""
        return decode_picture(_bytes(self.data), self.where)


def load_dataset(
    name: str,
    *,
    split: str = "train",
    image_column: str = "",
    caption_column: str = "",
    trigger: str = "",
    remarks: Remarks | None = None,
) -> list[Example]:
    """Reads and checks a data set, in its own order; every picture is decoded once.

    A column that is "" is whichever of the usual ones is there. `trigger` is put before each
    caption that does not hold it, and stands alone for an empty one, which is noted. `remarks`
    hears what was passed over.
    Raises `DatasetError` with everything that is wrong, `ModelNotFoundError` where nothing has
    this name or the Hub can't be reached.
    """
    remarks = Remarks() if remarks is None else remarks
    columns = Columns(image_column, caption_column)
    examples: list[Example] = []
    bare: list[str] = []  # rows without a caption
    moving: list[str] = []
    for row in _rows(name, split, columns, remarks):
        caption = row.caption.strip() if isinstance(row.caption, str) else row.caption
        if caption is None or (caption == "" and trigger):
            bare.append(row.where)
            caption = trigger
        elif not isinstance(caption, str) or not _is_text(caption):
            remarks.problems.append(f"{row.where}: the caption is no text")
        elif not caption:
            remarks.problems.append(f"{row.where}: the caption is empty")
        try:
            content, size, moves = _inspect(row)
        except UsageError as error:
            remarks.problems.append(str(error).rstrip("."))
            continue
        if moves:
            moving.append(row.where)
        if isinstance(caption, str):
            data = row.image if isinstance(row.image, Path | bytes) else b""
            text = _triggered(caption, trigger)
            examples.append(Example(row.where, text, content, size, data, repeats=row.repeats))
    if moving:
        remarks.notes.append(
            f"{several(moving)}: an animation, of which the first picture is taken"
        )
    _tell_bare(bare, trigger, remarks)
    _tell_twice(examples, remarks)
    if remarks.undecodable:
        names = several(remarks.undecodable, "file")
        remarks.problems.append(
            f"not valid UTF-8 in {names}; save them as UTF-8 (`iconv -f latin1 -t utf-8`)"
        )
    if not examples and not remarks.problems:
        remarks.problems.append("it holds no pictures")
    if remarks.problems:
        raise DatasetError(name, remarks.problems, remarks.notes)
    return examples


def _rows(name: str, split: str, columns: Columns, remarks: Remarks) -> Iterator[DatasetRow]:
    """By the form that a data set has."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{name} is a file; name the folder that holds the data set.")
        check_hub_name(name)
        return hub_rows(name, split, columns, remarks)
    if is_saved(folder):
        return saved_rows(folder, split, columns, remarks)
    files = DatasetFiles.of(folder)
    for list_name in (LINES, INDEX):
        if (folder / list_name).is_file():
            return listed_rows(folder / list_name, files, columns, remarks)
    if files.tables and not files.captions and not files.metadata:
        arrow = [path for path in files.tables if path.suffix == ".arrow"]
        if len(arrow) == len(files.tables):
            return arrow_rows(folder, arrow, columns, remarks)
        return hub_rows(str(folder), split, columns, remarks)
    return folder_rows(_of_split(files, split, remarks), columns, remarks)


def _of_split(files: DatasetFiles, split: str, remarks: Remarks) -> DatasetFiles:
    """The folder of a split, where all pictures are in such folders, as imagefolder has them."""
    tops = {path.relative_to(files.folder).parts[0] for path in (*files.pictures, *files.raw)}
    if split not in tops or not (files.folder / split).is_dir():
        return files
    remarks.applied.add("split")
    if any(not (files.folder / top).is_dir() for top in tops):
        return files
    if others := sorted(tops - {split}):
        remarks.notes.append(f"only {split} is read, not {several(others)}; name a `split`")
    return DatasetFiles.of(files.folder / split)


def _tell_bare(bare: list[str], trigger: str, remarks: Remarks) -> None:
    if not bare:
        return
    names = several(bare, "picture")
    if trigger:
        remarks.notes.append(f"no caption, so that `trigger` stands alone, for {names}")
    else:
        remarks.problems.append(
            f"no caption for {names}; write each into a .txt file of the picture's name, or give a "
            "`trigger` for all"
        )


def _tell_twice(examples: list[Example], remarks: Remarks) -> None:
    """Notes pictures that stand there twice with the same caption, whatever they are called."""
    alike: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        alike.setdefault((example.content, example.caption), []).append(example.where)
    twice = [" = ".join(places) for places in alike.values() if len(places) > 1]
    if twice:
        remarks.notes.append(f"the same picture with the same caption: {several(twice)}")


def fingerprint(examples: list[Example]) -> str:
    """SHA-256 of pictures and captions in their order, in hex: what a resume must find again."""
    contents = [
        (
            x.content,
            x.caption,
            *(["prior"] if x.prior else []),
            *([x.repeats] if x.repeats > 1 else []),
        )
        for x in examples
    ]
    text = json.dumps(contents)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_text(caption: str) -> bool:
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a pair, as JSON can spell it
        return False
    return True


def _triggered(caption: str, trigger: str) -> str:
    return caption if trigger in caption else f"{trigger}, {caption}"


def _bytes(data: Path | bytes) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return data.read_bytes()
    except ValueError:  # a NUL in the name
        raise UsageError(f"{str(data)!r} is no file name") from None
    except FileNotFoundError:
        raise UsageError(f"{data} does not exist") from None
    except OSError as error:
        raise UsageError(f"{data} can't be read ({error.strerror})") from error


def _inspect(row: DatasetRow) -> tuple[str, Size, bool]:
    """(SHA-256, size, whether it moves) of a row's picture, decoded whole.

    Raises `UsageError` where that fails.
    """
    if not isinstance(row.image, Path | bytes):
        raise UsageError(f"{row.where}: no picture is named")
    try:
        data = _bytes(row.image)
    except UsageError as error:
        raise UsageError(f"{row.where}: {error}") from None
    name = f"{row.where}: {row.image}" if isinstance(row.image, Path) else row.where
    height, width, _ = decode_picture(data, name).shape
    return hashlib.sha256(data).hexdigest(), (height, width), is_moving(data)
