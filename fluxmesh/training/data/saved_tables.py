"""Data sets that `datasets` reads: of the Hub, of parquet files, and what `save_to_disk` wrote.

`datasets`, and pyarrow with it, loads when one of these is named, never before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import ModelNotFoundError, NoSuchNameError, UsageError
from fluxmesh.spelling import did_you_mean
from fluxmesh.training.data.remarks import Remarks
from fluxmesh.training.data.rows import CAPTIONS, IMAGES, Columns, DatasetRow

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ONE_SAVED, SPLITS_SAVED = "state.json", "dataset_dict.json"  # that `save_to_disk` leaves


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    if (folder / SPLITS_SAVED).is_file():
        return True
    return (folder / ONE_SAVED).is_file() and any(folder.glob("*.arrow"))


def saved_rows(
    folder: Path, split: str, columns: Columns, remarks: Remarks
) -> Iterator[DatasetRow]:
    """Rows of what `save_to_disk` wrote."""
    datasets = _library(str(folder))
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(str(folder), split, error) from error
    if isinstance(table, dict):  # of splits
        remarks.applied.add("split")
        if split not in table:
            known = ", ".join(table)
            remarks.problems.append(f"it has no split {split!r} (it has {known}); name a `split`")
            return
        table = table[split]
    yield from _rows(datasets, table, folder.name, columns, remarks)


def arrow_rows(
    folder: Path, files: list[Path], columns: Columns, remarks: Remarks
) -> Iterator[DatasetRow]:
    """Rows of Arrow files that lie by themselves, as in the cache of `datasets`."""
    datasets = _library(str(folder))
    try:
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        table = datasets.concatenate_datasets(parts)
    except (OSError, ValueError) as error:
        raise _unreadable(str(folder), "train", error) from error
    yield from _rows(datasets, table, folder.name, columns, remarks)


def hub_rows(name: str, split: str, columns: Columns, remarks: Remarks) -> Iterator[DatasetRow]:
    """Rows of a data set of the Hub, or of a folder of its files; pictures stay encoded."""
    remarks.applied.add("split")
    datasets = _library(name)
    is_folder = Path(name).is_dir()
    reachable = is_folder or _is_on_the_hub(name)
    try:
        with _offline(datasets, not reachable):
            table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        if not reachable:
            raise ModelNotFoundError(
                f"There is no folder {name} here, and the Hub can't be reached; check the name, or "
                "the network."
            ) from error
        raise _unreadable(name, split, error) from error
    yield from _rows(datasets, table, name, columns, remarks)


def check_hub_name(name: str) -> None:
    """Raises `NoSuchNameError` for what can only have been meant as a folder."""
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return
    parent = Path(name).expanduser().parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    meant = did_you_mean(str(Path(name).expanduser()), folders, "; check the path.")
    raise NoSuchNameError(
        f"There is no folder {name}{meant} A data set of the Hub is named OWNER/NAME."
    )


def _rows(
    datasets: Any, table: Any, name: str, columns: Columns, remarks: Remarks
) -> Iterator[DatasetRow]:
    remarks.applied |= columns.chosen
    there = table.column_names
    image = columns.image or next((key for key in IMAGES if key in there), IMAGES[0])
    keys = [columns.caption] if columns.caption else [key for key in CAPTIONS if key in there]
    for column in (image, *(keys or CAPTIONS[:1])):
        if column not in there:
            known = ", ".join(there)
            remarks.problems.append(f"there is no column {column!r} (it has {known})")
            return
    table = table.cast_column(image, datasets.Image(decode=False))
    for number, row in enumerate(table, start=1):
        where = f"{name} row {number}"
        stored = row[image] or {}
        data, path = stored.get("bytes"), stored.get("path")
        picture = data if data is not None else Path(path) if path else None
        try:
            caption = row[columns.caption_key(row)]
        except UsageError as error:
            remarks.problems.append(f"{where}: {error}")
            continue
        yield DatasetRow(where, picture, caption)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"To read {name}, `pip install datasets`.") from None
    return datasets


def _is_on_the_hub(name: str) -> bool:
    """Asks the Hub once, and briefly: `datasets` asks five times more where nothing answers.

    False: it can't be asked. Raises `ModelNotFoundError` where it says that there is no such set.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(name, timeout=DEADLINES.hub_lists)
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no folder {name} here, and the Hub has no data set of that name, or it is "
            "private; check the spelling, or run `hf auth login`."
        ) from error
    except (TypeError, AttributeError, NameError, LookupError, AssertionError):
        raise  # a defect, here or in the library: not the network's fault
    except Exception as error:  # the library's kinds changed with every major version
        return getattr(error, "response", None) is not None  # it answers, whatever it says
    return True


@contextmanager
def _offline(datasets: Any, is_offline: bool) -> Iterator[None]:
    """Inside, `datasets` takes what its cache holds, where the Hub can't be reached."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _unreadable(name: str, split: str, error: Exception) -> ModelNotFoundError:
    reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    return ModelNotFoundError(
        f"No folder and no data set {name} with a split {split!r} could be read ({reason}); "
        "check the name."
    )
