"""A folder of pictures with captions beside them, in the ways that tools write them. No mlx.

- `metadata.jsonl` and `metadata.csv`, at the top or in subfolders (`metadata_files.py`)
- `0.txt` or `0.caption` beside `0.png`
- kohya's folders, `10_sks dog/` (`kohya.py`)

A picture without a caption has None for it, and is never given one: only kohya's folders name
theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.images.files import TO_JPEG, learn_heif
from fluxmesh.training.data.dataset_files import (
    ARCHIVES,
    KOHYA_FILE,
    TEXTS,
    VIDEOS,
    DatasetFiles,
    same_name,
    stem,
)
from fluxmesh.training.data.kohya import (
    MAX_REPEATS,
    KohyaFolder,
    regularization_folder,
    relative_repeats,
)
from fluxmesh.training.data.metadata_files import MetadataEntry, metadata_entries
from fluxmesh.training.data.remarks import Remarks, several
from fluxmesh.training.data.rows import Columns, DatasetRow
from fluxmesh.training.data.text_files import read_text

HEIF = (".heic", ".heics", ".heif", ".hif")


@dataclass(frozen=True)
class _Caption:
    """One that a picture has, and where."""

    where: str
    file: Path
    text: Any

    @property
    def words(self) -> str:
        """To compare it by."""
        return " ".join(str(self.text or "").split())


def folder_rows(files: DatasetFiles, columns: Columns, remarks: Remarks) -> Iterator[DatasetRow]:
    """The rows of a folder."""
    captions: dict[str, list[_Caption]] = {}
    elsewhere: dict[str, MetadataEntry] = {}  # entries whose picture is not in the folder
    for entry in metadata_entries(files, columns, remarks):
        if entry.image is None:
            remarks.problems.append(f"{entry.where}: no picture is named")
            continue
        name = same_name(entry.image)
        captions.setdefault(name, []).append(_Caption(entry.where, entry.file, entry.caption))
        elsewhere[name] = entry
    listed = set(captions)
    undecodable = _add_sidecars(files, captions, remarks)
    pictures = _chosen(files, listed, remarks)
    by_folder = []
    for picture, repeats in _repeated(pictures, files, remarks):
        name, known = same_name(picture), captions.get(same_name(picture), [])
        elsewhere.pop(name, None)
        where = files.name(picture)
        kohya = KohyaFolder.of(picture, files.folder)
        if known:
            for caption in _agreed(known, where, remarks):
                yield DatasetRow(caption.where, picture, caption.text, repeats)
        elif name in undecodable:  # which is told
            yield DatasetRow(where, picture, "?", repeats)
        elif kohya is not None and kohya.words:
            by_folder.append(where)
            yield DatasetRow(where, picture, kohya.words, repeats)
        else:
            yield DatasetRow(where, picture, None, repeats)
    passed_over = {same_name(path) for path in files.pictures}
    for name, entry in elsewhere.items():
        if name not in passed_over:
            yield DatasetRow(entry.where, entry.image, entry.caption)
    if by_folder:
        remarks.notes.append(
            f"{several(by_folder, 'picture')} without a caption file; kohya's folder names theirs"
        )
    _tell_passed_over(files, remarks)


def _add_sidecars(
    files: DatasetFiles, captions: dict[str, list[_Caption]], remarks: Remarks
) -> set[str]:
    """Adds what the caption files say; the pictures whose file can't be decoded."""
    undecodable = set()
    for file in files.captions:
        pictures = files.pictures_of(file)
        if not pictures:
            continue
        text = read_text(file, files.name(file), remarks)
        for picture in pictures:
            name = same_name(picture)
            if text is None:
                undecodable.add(name)
                continue
            where = f"{files.name(file)} for {picture.name}"
            caption = _Caption(where, file, " ".join(text.split()))
            captions.setdefault(name, []).append(caption)
    return undecodable


def _agreed(known: Sequence[_Caption], picture: str, remarks: Remarks) -> Sequence[_Caption]:
    """A picture's captions: those of one file, in which it may stand more than once."""
    filled = [caption for caption in known if caption.words] or list(known[:1])
    by_file: dict[Path, list[_Caption]] = {}
    for caption in filled:
        by_file.setdefault(caption.file, []).append(caption)
    if len({tuple(caption.words for caption in group) for group in by_file.values()}) > 1:
        places = [group[0].where.partition(" for ")[0] for group in by_file.values()]
        remarks.problems.append(
            f"{picture} has a caption each in {' and '.join(places)}, which differ; keep one"
        )
        return filled[:1]
    return by_file[filled[0].file]


def _chosen(files: DatasetFiles, listed: set[str], remarks: Remarks) -> list[Path]:
    """The pictures that are read.

    A HEIC or a camera's raw file beside a picture of the same name is that picture once more.
    Others of one name have one caption file for them all, which can't be meant, and are a problem
    unless metadata files tell them apart.
    """
    heif = {path for path in files.pictures if path.suffix.lower() in HEIF}
    plain = [path for path in files.pictures if path not in heif]
    stems = {stem(path) for path in plain}
    again = [files.name(path) for path in (*sorted(heif), *files.raw) if stem(path) in stems]
    if again:
        remarks.notes.append(
            f"{several(again)}: passed over, for a picture of the same name is read instead"
        )
    if left := [files.name(path) for path in files.raw if stem(path) not in stems]:
        remarks.problems.append(f"{several(left)}: raw files can't be read; export JPEGs of them")
    photos = [path for path in files.pictures if path in heif and stem(path) not in stems]
    if photos and not learn_heif():
        remarks.problems.append(
            f"{several([files.name(path) for path in photos])}: HEIC can't be read; `pip install "
            f"pillow-heif`, or make JPEGs of them, {TO_JPEG}"
        )
        photos = []
    chosen = [path for path in files.pictures if path in photos or path not in heif]
    return _in_known_folders(_told_apart(chosen, files, listed, remarks), files, remarks)


def _told_apart(
    pictures: Sequence[Path], files: DatasetFiles, listed: set[str], remarks: Remarks
) -> Sequence[Path]:
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path in pictures:
        if same_name(path) not in listed:
            alike.setdefault(stem(path), []).append(path)
    for group in alike.values():
        if len(group) > 1:
            names = [files.name(path) for path in group]
            remarks.problems.append(
                f"{' and '.join(names)} have one name, and so one caption file; keep one, or "
                "rename them"
            )
    return pictures


# kohya's folders


def _in_known_folders(
    pictures: Sequence[Path], files: DatasetFiles, remarks: Remarks
) -> list[Path]:
    """Without those whose folder says 0 times, as kohya's scripts leave them out."""
    folders = {path: KohyaFolder.of(path, files.folder) for path in pictures}
    never = {path for path, kohya in folders.items() if kohya is not None and not kohya.repeats}
    if never:
        names = [files.name(path) for path in sorted(never)]
        remarks.notes.append(f"{several(names, 'picture')} passed over: the folder says 0 times")
    known = [kohya for kohya in folders.values() if kohya is not None]
    prior = regularization_folder(known, files.folder)
    if prior is not None and any(prior not in path.parents for path in pictures):
        remarks.problems.append(
            f"{files.name(prior)} holds kohya's regularization pictures, which are no part of what "
            "is taught; name the folder beside it as the data set, and this one as `prior_folder`"
        )
    return [path for path in pictures if path not in never]


def _repeated(
    pictures: Sequence[Path], files: DatasetFiles, remarks: Remarks
) -> Iterator[tuple[Path, int]]:
    """Each picture, with how often it is shown beside the others."""
    folders = [KohyaFolder.of(path, files.folder) for path in pictures]
    repeats = relative_repeats([kohya.repeats if kohya else 1 for kohya in folders])
    shown: Mapping[str, int] = {
        files.name(kohya.path): times
        for kohya, times in zip(folders, repeats, strict=True)
        if kohya is not None
    }
    if too_many := [name for name, times in shown.items() if times > MAX_REPEATS]:
        remarks.problems.append(
            f"{several(too_many)}: repeated more than {MAX_REPEATS} times as often as others; "
            "rename the folder"
        )
        repeats = [1] * len(repeats)
    elif shown and len(set(repeats)) > 1:
        each = ", ".join(f"{name} {times}" for name, times in shown.items())
        remarks.notes.append(f"pictures are repeated as kohya's folders say: {each}")
    elif shown:
        remarks.notes.append(
            "kohya's folders repeat all pictures alike, which changes nothing: `iterations` says "
            "how long the training is"
        )
    yield from zip(pictures, repeats, strict=True)


def _tell_passed_over(files: DatasetFiles, remarks: Remarks) -> None:
    """Remarks on files that are no picture and that nothing has read."""
    raw = {stem(path) for path in files.raw}
    orphans = [
        files.name(path)
        for path in files.captions
        if not files.pictures_of(path) and stem(path) not in raw
    ]
    if orphans:
        remarks.notes.append(f"{several(orphans, 'text')} without a picture of the same name")
    kohya = [files.name(path) for path in files.others if KOHYA_FILE.fullmatch(path.name)]
    if kohya:
        remarks.notes.append(
            f"{several(kohya)}: kohya's settings are not read; captions come from .txt, .caption "
            "or metadata files, and repeats from folders like '10_sks dog'"
        )
    others = [
        files.name(path)
        for path in (*files.tables, *files.others)
        if path.suffix.lower() in (*VIDEOS, *ARCHIVES)
        or path in files.tables
        or (path.suffix.lower() in TEXTS and files.pictures_of(path))
    ]
    if others:
        remarks.notes.append(f"passed over: {several(others)}")
