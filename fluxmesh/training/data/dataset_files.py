"""What lies in a folder of pictures: found once, sorted by kind. Opens no file.

Subfolders belong to it. What is hidden, and the companions that macOS and Windows leave
(`._0.png`, `__MACOSX`, `Thumbs.db`), is as if it were not there.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fluxmesh.images.files import RAW_SUFFIXES, SUFFIXES

CAPTIONS = (".txt", ".caption")  # of diffusers' and ai-toolkit's users, and of kohya's
METADATA = ("metadata.jsonl", "metadata.csv")  # of `datasets`' imagefolder
TABLES = (".parquet", ".arrow")
VIDEOS = (".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
TEXTS = (".json", ".tags", ".tag", ".cap", ".wd14", ".md", ".xml", ".csv")  # captions elsewhere
# Settings and lists of kohya's scripts, which are written for these.
KOHYA_FILE = re.compile(r"meta_(cap|clean|lat|cap_dd)\w*\.json|[\w-]*(dataset|config)[\w-]*\.toml")
PROGRESS = re.compile(r"\d{7,}_progress\.png")  # of a training whose output is in the folder


@dataclass
class DatasetFiles:
    """The files of one folder, each list in the order of their names."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    raw: list[Path] = field(default_factory=list)  # of cameras, not yet developed
    captions: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    _by_stem: dict[tuple[Path, str], list[Path]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, folder: Path) -> DatasetFiles:
        """Looks through `folder` and all below it."""
        files = cls(folder)
        for path in _walk(folder):
            files._sort_in(path)
        for picture in files.pictures:
            files._by_stem.setdefault(stem(picture), []).append(picture)
        return files

    def _sort_in(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if PROGRESS.fullmatch(path.name):
            return
        if path.name in METADATA:
            self.metadata.append(path)
        elif suffix in SUFFIXES:
            self.pictures.append(path)
        elif suffix in RAW_SUFFIXES:
            self.raw.append(path)
        elif suffix in CAPTIONS:
            self.captions.append(path)
        elif suffix in TABLES:
            self.tables.append(path)
        else:
            self.others.append(path)

    def name(self, path: Path) -> str:
        """As messages call it: seen from the folder."""
        return path.relative_to(self.folder).as_posix()

    def pictures_of(self, caption: Path) -> list[Path]:
        """The pictures beside a file that have its name, but for the ending."""
        return self._by_stem.get(stem(caption), [])


def stem(path: Path) -> tuple[Path, str]:
    """Equal for a picture and its caption: macOS may spell an accent in two ways."""
    return path.parent, unicodedata.normalize("NFC", path.stem)


def same_name(path: Path) -> str:
    """Equal for two ways to write one path. Follows no link: two links are two pictures."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file, those of a folder before those of its subfolders; each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if _is_shown(name))
        yield from (Path(place, name) for name in sorted(names) if _is_shown(name))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db", "desktop.ini")
