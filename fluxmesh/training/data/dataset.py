"""Pictures and captions in: four forms of data set, checked whole before any weight loads.

- a folder with `train.jsonl`: one `{"image": path, "prompt": caption}` a line
- a folder with `index.json` (older): `{"data": [{"image": path, "text": caption}, ...]}`
- a folder of pictures, each with its caption in a `.txt` file of the same name
- a data set on the Hugging Face Hub, or a folder of its parquet files (needs `datasets`)

Everything that is wrong is told at once, each with its file and line (`DatasetError.problems`).
Imports no mlx, and `datasets` only when one of the Hub is named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.errors import ModelNotFoundError, UsageError
from fluxmesh.images import HEIF_SUFFIXES, TO_JPEG, decode_picture
from fluxmesh.storage import apple_double
from fluxmesh.training.data.bucketing import Size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHOWN = 20  # problems in the sentence of a `DatasetError`


class DatasetError(UsageError):
    """A data set with mistakes in it: `problems` has a sentence for each, with file and line."""

    def __init__(self, dataset: str, problems: list[str]) -> None:
        self.problems = tuple(problems)
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"The dataset {dataset} has {count}: {shown}{more}.")


@dataclass(frozen=True)
class Example:
    """A picture with its caption."""

    where: str  # as a message names it: "train.jsonl line 3"
    caption: str
    content: str  # SHA-256 of the picture's file, in hex
    size: Size  # pixels, as a viewer shows it
    data: Path | bytes = field(repr=False, compare=False)
    prior: bool = False  # shows what the model knew before, and is to keep

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3], EXIF rotation applied, whatever the file's mode."""
        return decode_picture(_bytes(self.data), self.where)


@dataclass(frozen=True)
class _Row:
    """An entry as the data set spells it, unchecked."""

    where: str
    image: Any
    caption: Any


def load_dataset(
    name: str,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "prompt",
    trigger: str = "",
) -> list[Example]:
    """Reads and checks a data set, in its own order; every picture is decoded once.

    `trigger` is put before each caption that does not hold it, and stands alone for an empty one.
    Raises `DatasetError` with everything that is wrong, `ModelNotFoundError` where nothing has
    this name or the Hub can't be reached.
    """
    problems: list[str] = []
    examples = []
    for row in _rows(name, problems.append, split, image_column, caption_column):
        caption = row.caption.strip() if isinstance(row.caption, str) else row.caption
        if caption is None or caption == "":
            caption = trigger
        if not isinstance(caption, str) or not _is_text(caption):
            problems.append(f"{row.where}: the caption is no text")
        elif not caption:
            problems.append(f"{row.where}: the caption is empty")
        try:
            content, size = _inspect(row)
        except UsageError as error:
            problems.append(str(error).rstrip("."))
            continue
        if isinstance(caption, str):
            data = row.image if isinstance(row.image, Path | bytes) else b""
            examples.append(Example(row.where, _triggered(caption, trigger), content, size, data))
    if not examples and not problems:
        problems.append("it holds no pictures")
    if problems:
        raise DatasetError(name, problems)
    return examples


def fingerprint(examples: list[Example]) -> str:
    """SHA-256 of pictures and captions in their order, in hex: what a resume must find again."""
    contents = [(x.content, x.caption, *(["prior"] if x.prior else [])) for x in examples]
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


def _inspect(row: _Row) -> tuple[str, Size]:
    """(SHA-256, size) of a row's picture, decoded whole; `UsageError` where that fails."""
    if not isinstance(row.image, Path | bytes):
        raise UsageError(f"{row.where}: no picture is named")
    try:
        data = _bytes(row.image)
    except UsageError as error:
        raise UsageError(f"{row.where}: {error}") from None
    name = f"{row.where}: {row.image}" if isinstance(row.image, Path) else row.where
    height, width, _ = decode_picture(data, name).shape
    return hashlib.sha256(data).hexdigest(), (height, width)


# --- the forms -----------------------------------------------------------------------------------

Report = Callable[[str], None]


def _rows(name: str, report: Report, split: str, image: str, caption: str) -> Iterator[_Row]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{name} is a file; name the folder that holds the data set.")
        return _hub(name, split, image, caption)
    if (folder / "train.jsonl").is_file():
        return _lines(folder / "train.jsonl", report)
    if (folder / "index.json").is_file():
        return _index(folder / "index.json")
    if any(apple_double.without(folder.rglob("*.parquet"))):
        return _hub(str(folder), split, image, caption)
    return _captioned(folder, report)


def _lines(file: Path, report: Report) -> Iterator[_Row]:
    """`train.jsonl`; a blank line before the last entry is a problem, as is one that is no JSON."""
    for number, line in enumerate(_text(file).rstrip().split("\n"), start=1):
        where = f"{file.name} line {number}"
        if not line.strip():
            report(f"{where}: the line is blank")
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            report(f"{where}: the line is not valid JSON")
            continue
        if not isinstance(entry, dict):
            report(f"{where}: the line holds no JSON object")
            continue
        missing = [key for key in ("image", "prompt") if key not in entry]
        if missing:
            report(f"{where}: the key {missing[0]!r} is missing")
            continue
        yield _Row(where, _path(file.parent, entry["image"]), entry["prompt"])


def _index(file: Path) -> Iterator[_Row]:
    """The older `index.json`."""
    try:
        data = json.loads(_text(file))["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DatasetError(str(file.parent), [f"{file.name}: no list called 'data'"]) from None
    if not isinstance(data, list):
        raise DatasetError(str(file.parent), [f"{file.name}: 'data' is no list"])
    for number, entry in enumerate(data, start=1):
        entry = entry if isinstance(entry, dict) else {}
        where = f"{file.name} entry {number}"
        yield _Row(where, _path(file.parent, entry.get("image")), entry.get("text"))


def _captioned(folder: Path, report: Report) -> Iterator[_Row]:
    """Pictures by name, each with a `.txt` file; without one, the trigger alone must do.

    Photos of an iPhone are a problem, all in one, where no picture that can be read is beside them.
    """
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    read = {file.stem for file in files if file.suffix.lower() in SUFFIXES}
    photos = [
        file.name
        for file in files
        if file.suffix.lower() in HEIF_SUFFIXES and file.stem not in read
    ]
    if photos:
        more = f" and {len(photos) - 1} more" if len(photos) > 1 else ""
        report(f"{photos[0]}{more}: HEIC can't be read; make JPEGs of them, {TO_JPEG}")
    for file in files:
        if file.suffix.lower() in SUFFIXES:
            text = file.with_suffix(".txt")
            caption = " ".join(_text(text).split()) if text.is_file() else ""
            yield _Row(f"{text.name} for {file.name}", file, caption)


def _hub(name: str, split: str, image: str, caption: str) -> Iterator[_Row]:
    """Rows of a data set that `datasets` loads; pictures stay encoded."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{name} is no folder here; for a data set of the Hub, `pip install datasets`."
        ) from None
    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelNotFoundError(
            f"No folder and no data set {name} with a split {split!r} could be read ({reason}); "
            "check the name."
        ) from error
    for column in (image, caption):
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            raise DatasetError(name, [f"there is no column {column!r} (it has {known})"])
    table = table.cast_column(image, datasets.Image(decode=False))
    for number, row in enumerate(table, start=1):
        stored = row[image] or {}
        data = stored.get("bytes")
        path = stored.get("path")
        picture = data if data is not None else Path(path) if path else None
        yield _Row(f"{name} row {number}", picture, row[caption])


def _path(folder: Path, image: Any) -> Path | None:
    return folder / image if isinstance(image, str) and image else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"Can't read {file}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not valid UTF-8; save it as UTF-8.") from None
