"""`metadata.jsonl` and `metadata.csv`: the captions of the pictures beside them, by file name.

The convention of `datasets`' imagefolder, which diffusers' scripts share: a row has `file_name`,
seen from the folder of its list, and the caption as `text`, `prompt` or `caption`. CSV is read as
table programs write it: with a byte order mark, `;` or tabs for commas, quotes, any line ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.errors import UsageError
from fluxmesh.training.data.dataset_files import DatasetFiles
from fluxmesh.training.data.list_files import json_object
from fluxmesh.training.data.remarks import Remarks
from fluxmesh.training.data.rows import Columns, path_in
from fluxmesh.training.data.text_files import read_text

DELIMITERS = (",", ";", "\t")

Report = Callable[[int, str], None]  # hears a line's number, and what is wrong with it


@dataclass(frozen=True)
class MetadataEntry:
    """What a metadata file says of one picture."""

    where: str  # "metadata.csv line 3"
    file: Path  # the metadata file
    image: Path | None
    caption: Any


def metadata_entries(
    files: DatasetFiles, columns: Columns, remarks: Remarks
) -> Iterator[MetadataEntry]:
    """Every entry of every metadata file of a folder."""
    for file in files.metadata:
        remarks.applied |= columns.chosen
        name = files.name(file)
        text = read_text(file, name, remarks)
        if text is None:
            continue

        def report(number: int, problem: str, name: str = name) -> None:
            remarks.problems.append(f"{name} line {number}: {problem}")

        for number, row in (_csv_rows if file.suffix == ".csv" else _json_rows)(text, report):
            try:
                image, caption = columns.image_key(row), columns.caption_key(row)
            except UsageError as error:
                report(number, str(error))
                continue
            where = f"{name} line {number}"
            yield MetadataEntry(where, file, path_in(file.parent, row[image]), row[caption])


def _json_rows(text: str, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            yield number, json_object(line)
        except UsageError as error:
            report(number, str(error))


def _csv_rows(text: str, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """A row's number is that of its last line: a caption in quotes may have several."""
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in reader:
            if len(cells) > len(header):
                report(
                    reader.line_num,
                    f"it has {len(cells)} cells and the header {len(header)}; a caption that holds "
                    f"{delimiter!r} needs quotes",
                )
            elif cells:
                yield reader.line_num, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        report(reader.line_num, f"it is not valid CSV ({error})")
