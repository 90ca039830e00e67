"""Safetensors files: headers read and checked, rows of a tensor read. Imports no mlx.

MLX loads a truncated file without noticing and always reads whole tensors. Here every size in a
header is checked against the file before anything is read, a short read is an error, and any range
of rows of a tensor can be read alone, which is what a shard of a model is. The safetensors package
reads rows too, but no bfloat16 into NumPy, and nothing into memory that MLX has already.

Format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fluxmesh.errors import IncompleteModelError, OutputError, WeightsError
from fluxmesh.storage import other_formats
from fluxmesh.storage.atomic import Opens, new_file

PIECE = 4 << 20  # bytes that one thread reads at once
SUFFIXES = (".safetensors", ".sft")  # of one format
MAX_HEADER = 100_000_000  # bytes; the format's own limit
NOT_THIS = "not a safetensors file, or is corrupt at its beginning; download it again"
# What numpy reads the bytes as. It has neither bfloat16 nor float8: their bytes stay as they are.
NUMPY: dict[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
_UNREAD = {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}  # bytes; may lie beside
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()} | _UNREAD
FLOATS = ("F32", "F16", "BF16")  # that a weight may be stored in, byte for byte


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `begin` to `end` of `path`, row after row."""

    path: Path
    key: str
    dtype: str  # the format's name: "F32", "BF16", ...
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


Check = Callable[[Entry, np.ndarray], None]  # of values that were read, flat, of `numpy_dtype`
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """All tensors of one file, or of the shards of one component, by name."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Reads and checks a file's header. Raises `WeightsError` naming the file and what is wrong."""
    try:
        stat = path.stat()
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_header(path: Path, size: int, _mtime: int) -> Header:
    """Headers are asked for by name, check and load: parsed once while the file stays the same."""
    try:
        with open(path, "rb") as file:
            first = file.read(other_formats.FIRST)
            length = int.from_bytes(first[:8], "little")
            if size < 8 or length > MAX_HEADER:
                raise WeightsError(f"{path} is {other_formats.what(path, first) or NOT_THIS}.")
            if 8 + length > size:
                raise WeightsError(f"{path} is truncated inside its header; download it again.")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    return parse_header(path, text, size)


def parse_header(path: Path, text: bytes, size: int) -> Header:
    """The header of a file of `size` bytes, from its JSON; the file may be elsewhere.

    Raises `WeightsError` as `read_header` does.
    """
    length = len(text)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {key: _entry(path, key, value, 8 + length, size) for key, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} has a corrupt header; download it again.") from error
    last = max((entry.end for entry in entries.values()), default=8 + length)
    if last != size:
        raise WeightsError(
            f"{path} has {size - last} bytes more than its header accounts for; download it again."
        )
    return Header(entries, metadata if isinstance(metadata, dict) else {})


def _entry(path: Path, key: str, value: Any, data: int, size: int) -> Entry:
    dtype, shape = value["dtype"], value["shape"]
    begin, end = value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise WeightsError(
            f"{path}: {key} has dtype {dtype!r}, which fluxmesh doesn't know; name a file that "
            "stores it in bfloat16, float16, float32 or fp8."
        )
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a size is not a whole number")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise WeightsError(
            f"{path} has a corrupt header: {key} of shape {tuple(shape)} and dtype {dtype} "
            f"can't be {end - begin} bytes; download it again."
        )
    if data + end > size:
        raise WeightsError(
            f"{path} is truncated: {key} ends at byte {data + end} and the file at {size}; "
            "download it again."
        )
    return Entry(path, key, dtype, tuple(shape), data + begin, data + end)


def read_headers(files: Sequence[Path]) -> Header:
    """One header of several files, each tensor in one of them."""
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        entries |= header.entries
        metadata |= header.metadata
    return Header(entries, metadata)


def read_index(path: Path) -> tuple[Path, ...]:
    """The files that a `*.safetensors.index.json` lists, in order.

    An entry must be a plain file name in the index's own folder: a path that leads elsewhere is
    refused, whoever wrote it. Raises `WeightsError`, or `IncompleteModelError` for a missing file.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; download it again.")
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if not (isinstance(name, str) and is_file_name(name) and name.endswith(SUFFIXES)):
            raise WeightsError(
                f"{path} names {name!r} in its weight_map, which is not a .safetensors file of its "
                "own folder; don't use this checkpoint."
            )
    files = tuple(path.with_name(name) for name in names)
    for file in files:
        if not file.is_file():
            raise IncompleteModelError.of(path.parent, f"{file.name}, which {path.name} names")
    return files


def is_file_name(name: str) -> bool:
    """Whether `name` stays in its folder: no separator, no drive, no `..`, not empty."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises `WeightsError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON; download it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} should hold a JSON object; download it again.")
    return value


def numpy_dtype(entry: Entry) -> type[np.generic]:
    """What the tensor's bytes are read as. Raises `WeightsError` for one that isn't read."""
    if entry.dtype not in NUMPY:
        raise WeightsError(
            f"{entry.path}: {entry.key} has dtype {entry.dtype}, which fluxmesh doesn't read; name "
            "a file that stores it in bfloat16, float16 or float32."
        )
    return NUMPY[entry.dtype]


def read_rows_into(out: np.ndarray, entry: Entry, start: int = 0) -> None:
    """Fills `out`, contiguous and of `numpy_dtype`, with the tensor's rows from `start` on.

    bfloat16 comes as uint16 of the same bits. Reads nothing else of the tensor. Raises
    `WeightsError` where the file is shorter than it was or can't be read.
    """
    read_each_into([(out, entry, start)])


def read_each_into(
    reads: Iterable[tuple[np.ndarray, Entry, int]], check: Check | None = None
) -> None:
    """As `read_rows_into`, each (out, entry, start), several at a time.

    `check` is shown each piece of a tensor as it comes, and may raise.
    """
    pieces = []
    for out, entry, start in reads:
        flat = out.reshape(-1)
        begin = entry.begin + start * row_bytes(entry)
        step = PIECE // flat.itemsize
        for i in range(0, len(flat), step):
            pieces.append((entry, flat[i : i + step], begin + i * flat.itemsize))

    def read(piece: tuple[Entry, np.ndarray, int]) -> None:
        entry, values, offset = piece
        read_bytes_into(values.view(np.uint8).data, entry, offset)
        if check is not None:
            check(entry, values)

    in_threads(read, pieces, sum(values.nbytes for _, values, _ in pieces))


def in_threads(work: Callable[[T], None], pieces: Sequence[T], nbytes: int) -> None:
    """Does the `work` of reading `nbytes` in pieces: in threads where it is worth them.

    Raises what the first piece that fails raises.
    """
    if nbytes <= PIECE:  # most tensors
        for piece in pieces:
            work(piece)
    else:
        list(_readers().map(work, pieces))


def row_bytes(entry: Entry) -> int:
    """Bytes of one row of the tensor."""
    return math.prod(entry.shape[1:]) * ITEM_BYTES[entry.dtype]


@functools.lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    """Several threads: one alone reads at a fraction of a disk's speed, or of the page cache's."""
    return ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)), thread_name_prefix="reader")


def read_bytes_into(view: memoryview, entry: Entry, offset: int) -> None:
    """Fills the memory from an offset of the tensor's file on. Raises as `read_rows_into`."""
    try:
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise WeightsError(
                        f"{entry.path} ended in the middle of {entry.key}; download it again."
                    )
                done += count
    except OSError as error:
        raise WeightsError(f"Can't read {entry.path}: {error.strerror}.") from error


def read_tensor(entry: Entry) -> np.ndarray:
    """A whole tensor, as `read_rows_into` reads it."""
    out = np.empty(entry.shape, dtype=numpy_dtype(entry))
    read_rows_into(out, entry)
    return out


def write_tensors(
    path: Path,
    arrays: Mapping[str, tuple[np.ndarray, str]],
    metadata: Mapping[str, str],
    opened: Opens = new_file,
) -> None:
    """Writes a whole safetensors file, or none. Each array comes with its dtype's name.

    bfloat16 is given as uint16 of the same bits. `opened` is `new_file`, which leaves a file of
    that name as it is, or `replaced_file`. Raises `OutputError`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (array, dtype) in arrays.items():
        span = [offset, offset + array.nbytes]
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    try:
        with opened(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array, _ in arrays.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, unless it is there. Raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The sentence for a file that can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full: {path} was not written; free some space.")
    if isinstance(error, FileExistsError):
        return OutputError(f"{path} exists already; name another, or remove it.")
    if error.errno == errno.ENAMETOOLONG:
        return OutputError(f"Can't write {path}: its name is too long; choose a shorter one.")
    return OutputError(f"Can't write {path}: {error.strerror}; check the folder's permissions.")
