"""Lists of pictures with their captions: `train.jsonl`, and the older `index.json`. No mlx.

A list is all that counts in its folder: pictures that it does not name, and captions that lie
beside it, are passed over with a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fluxmesh.errors import UsageError
from fluxmesh.training.data.dataset_files import DatasetFiles, same_name
from fluxmesh.training.data.remarks import Remarks, several
from fluxmesh.training.data.rows import Columns, DatasetRow, path_in
from fluxmesh.training.data.text_files import read_text

LINES, INDEX = "train.jsonl", "index.json"


def listed_rows(
    file: Path, folder: DatasetFiles, columns: Columns, remarks: Remarks
) -> Iterator[DatasetRow]:
    """The rows of a list, and remarks on what it leaves out."""
    remarks.applied |= columns.chosen
    read = _lines if file.name == LINES else _index
    named: set[str] = set()
    for row in read(file, columns, remarks):
        if isinstance(row.image, Path):
            named.add(same_name(row.image))
        yield row
    left_out = [folder.name(path) for path in folder.pictures if same_name(path) not in named]
    if left_out:
        remarks.notes.append(f"{file.name} leaves out {several(left_out, 'picture')}")
    beside = [path for path in folder.captions if folder.pictures_of(path)] + folder.metadata
    if (other := file.with_name(INDEX)).is_file() and other != file:
        beside.append(other)
    if beside:
        names = [folder.name(path) for path in beside]
        remarks.notes.append(f"{file.name} has the captions, not {several(names)}")


def _lines(file: Path, columns: Columns, remarks: Remarks) -> Iterator[DatasetRow]:
    """`train.jsonl`; a blank line before the last entry is a problem, as is one that is no JSON."""
    text = read_text(file, file.name, remarks)
    if text is None:
        return
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        where = f"{file.name} line {number}"
        try:
            entry = json_object(line)
            image, caption = columns.image_key(entry), columns.caption_key(entry)
        except UsageError as error:
            remarks.problems.append(f"{where}: {error}")
            continue
        yield DatasetRow(where, path_in(file.parent, entry[image]), entry[caption])


def json_object(line: str) -> dict[str, object]:
    """An entry of a list with an object a line. Raises `UsageError` without a period."""
    if not line.strip():
        raise UsageError("the line is blank")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("the line is not valid JSON") from None
    if not isinstance(entry, dict):
        raise UsageError("the line holds no JSON object")
    return entry


def _index(file: Path, columns: Columns, remarks: Remarks) -> Iterator[DatasetRow]:
    """The older `index.json`: an object with the list `data`."""
    text = read_text(file, file.name, remarks)
    if text is None:
        return
    try:
        entries = json.loads(text)["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        remarks.problems.append(f"{file.name}: no list called 'data'")
        return
    if not isinstance(entries, list):
        remarks.problems.append(f"{file.name}: 'data' is no list")
        return
    for number, entry in enumerate(entries, start=1):
        where = f"{file.name} entry {number}"
        try:
            if not isinstance(entry, dict):
                raise UsageError("it is no JSON object")
            image, caption = columns.image_key(entry), columns.caption_key(entry)
        except UsageError as error:
            remarks.problems.append(f"{where}: {error}")
            continue
        yield DatasetRow(where, path_in(file.parent, entry[image]), entry[caption])
